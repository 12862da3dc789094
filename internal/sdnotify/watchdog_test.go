package sdnotify

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/castrabus/castra/internal/bubble"
)

// fakeProbe answers after a while, or with an error, as it is told to.
type fakeProbe struct {
	after   atomic.Int64 // a time.Duration
	fail    atomic.Bool
	running atomic.Int32
	most    atomic.Int32 // that ran at a time
}

func (p *fakeProbe) run(ctx context.Context) error {
	p.most.Store(max(p.most.Load(), p.running.Add(1)))
	defer p.running.Add(-1)
	if p.fail.Load() {
		return errors.New("the committer is gone")
	}
	select {
	case <-time.After(time.Duration(p.after.Load())):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// complaints are what a watchdog reports.
type complaints struct {
	mu  sync.Mutex
	all []error
}

func (c *complaints) add(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all = append(c.all, err)
}

// take gives those that came since it was last asked.
func (c *complaints) take() []error {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := c.all
	c.all = nil
	return all
}

func TestWatchdogIsFedByAnswersAlone(t *testing.T) {
	m := newManager(t)
	bubble.Test(t, func(t *testing.T) {
		const interval = 30 * time.Second
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		var quick, slow fakeProbe
		var heard complaints
		go func() {
			defer close(done)
			RunWatchdog(ctx, interval, heard.add, quick.run, slow.run)
		}()
		// step waits, and checks how often the watchdog was fed and complained meanwhile.
		step := func(what string, wait time.Duration, fed, complained int) []error {
			t.Helper()
			time.Sleep(wait)
			synctest.Wait()
			told, complaints := m.told(t), heard.take()
			if len(told) != fed || slices.ContainsFunc(told, func(s string) bool { return s != "WATCHDOG=1" }) || len(complaints) != complained {
				t.Errorf("%s: told %q and complained %v; want %d and %d", what, told, complaints, fed, complained)
			}
			return complaints
		}
		synctest.Wait()
		step("both answer at once", 35*time.Second, 4, 0) // at 0, 10, 20, 30

		slow.after.Store(int64(9 * time.Second))
		step("one takes its time", 30*time.Second, 2, 0) // at 49, 59

		slow.after.Store(int64(time.Hour))
		// The round that began before answers at 69; then at 80, 90 … 120.
		for _, err := range step("one hangs", 60*time.Second, 1, 5) {
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("a probe that hangs is reported as %v", err)
			}
		}
		if quick.most.Load() != 1 || slow.most.Load() != 1 {
			t.Errorf("%d and %d probes at a time", quick.most.Load(), slow.most.Load())
		}

		slow.after.Store(0)
		step("it answers again", 30*time.Second, 3, 1) // the last round that hung ends at 130
		quick.fail.Store(true)
		step("the other fails", 30*time.Second, 0, 3)
		quick.fail.Store(false)

		slow.after.Store(int64(time.Hour))
		step("one hangs at the end", 15*time.Second, 0, 1)
		cancel()
		<-done
		if told, complaints := m.told(t), heard.take(); len(told) > 0 || len(complaints) > 0 {
			t.Errorf("after the end: told %q, complained %v", told, complaints)
		}
	})
}

func TestWatchdogSaysThatItCannotFeed(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", t.TempDir()+"/gone")
	bubble.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var got error
		RunWatchdog(ctx, time.Second, func(err error) { got = err; cancel() })
		if got == nil {
			t.Error("a sign of life that went nowhere is no error")
		}
	})
}
