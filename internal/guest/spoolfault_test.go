package guest

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/castrabus/castra/internal/bubble"
	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

func pointer(err error) *error { return &err }

// A disk that refuses refuses publishers, while the host is away and no longer.
func TestSpoolOnAFailingDisk(t *testing.T) {
	for _, tt := range []struct {
		name  string
		fault func(*badFS) *atomic.Pointer[error]
		err   error
		state string
	}{
		{"full", func(b *badFS) *atomic.Pointer[error] { return &b.write }, syscall.ENOSPC, "disk full"},
		{"write", func(b *badFS) *atomic.Pointer[error] { return &b.write }, syscall.EIO, "disk error"},
		{"sync", func(b *badFS) *atomic.Pointer[error] { return &b.sync }, syscall.EIO, "disk error"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble.Test(t, func(t *testing.T) {
				dir := t.TempDir()
				b := openBox(t, dir, 1<<20)
				h := &host{seqs: make(map[string]uint64)}
				b.publish("before")
				synctest.Wait()
				if r := b.heard("before"); !r.queued || !r.durable {
					t.Fatalf("%+v", r)
				}
				tt.fault(b.fs).Store(pointer(tt.err))
				for _, id := range []string{"1", "2", "3"} {
					b.publish(id)
					synctest.Wait()
					if r := b.heard(id); r.err == nil || r.err.Code != bus.CodeStorageFull || r.err.RetryAfter <= 0 {
						t.Errorf("%s was told %+v", id, r)
					}
				}
				if c := b.counts(); c.records != 1 || !c.durable || c.trouble != tt.state {
					t.Errorf("%+v", c)
				}
				// With the host there is no need of the disk.
				b.begin()
				h.take(b, 100)
				b.publish("live")
				time.Sleep(2 * spillAfter)
				if r := b.heard("live"); r != (result{}) {
					t.Errorf("told %+v before the host said anything", b.heard("live"))
				}
				h.take(b, 100)
				if r := b.heard("live"); r.seq != 2 {
					t.Errorf("%+v", r)
				}
				// On its way when the connection breaks: the host may have it.
				b.publish("open")
				b.wantSent("open")
				b.end()
				synctest.Wait()
				if r := b.heard("open"); r.err == nil || r.err.Code != bus.CodeStorageStalled {
					t.Errorf("%+v", r)
				}
				tt.fault(b.fs).Store(nil)
				time.Sleep(2 * time.Second)
				b.publish("after")
				synctest.Wait()
				if r := b.heard("after"); !r.queued || !r.durable {
					t.Errorf("when the disk works again: %+v", r)
				}
				if b.logs.count("the spool cannot be written") != 1 || b.logs.count("takes messages again") != 1 {
					t.Error(b.logs)
				}
				b.stop()
				b = openBox(t, dir, 1<<20)
				b.begin()
				h.take(b, 100)
				if want := []string{"before", "live", "after"}; !slices.Equal(h.ids, want) {
					t.Errorf("the host has %q, want %q", h.ids, want)
				}
			})
		})
	}
}

// A disk that blocks keeps nobody waiting for ever: not publishers, not the session,
// not the end.
func TestSpoolOnABlockedDisk(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		b := openBox(t, t.TempDir(), 1<<20)
		h := &host{seqs: make(map[string]uint64)}
		time.Sleep(time.Second)
		wait := make(chan struct{})
		b.fs.blocked.Store(&wait)
		begun := time.Now()
		b.publish("a", "b")
		time.Sleep(storePatience + time.Second)
		synctest.Wait()
		if r := b.heard("b"); r.err == nil || r.err.Code != bus.CodeStorageStalled || time.Since(begun) > 2*storePatience {
			t.Errorf("after %v: %+v", time.Since(begun), r)
		}
		if err := b.try("c"); refusalOf(err).Code != bus.CodeStorageStalled {
			t.Errorf("while it blocks: %v", err)
		}
		if c := b.counts(); c.trouble != "disk stalled" {
			t.Errorf("%+v", c)
		}
		b.begin()
		b.publish("live")
		h.take(b, 100)
		if r := b.heard("live"); r.seq != 1 {
			t.Errorf("%+v", b.heard("live"))
		}
		b.publish("slow") // the host does not answer it
		b.wantSent("slow")
		time.Sleep(ackPatience)
		synctest.Wait()
		if r := b.heard("slow"); r.err == nil || r.err.Code != bus.CodeStorageStalled {
			t.Errorf("%+v", r)
		}
		// What was on its way to the disk is there in the end, and goes out.
		b.fs.blocked.Store(nil)
		close(wait)
		b.end()
		b.begin()
		h.take(b, 100)
		slices.Sort(h.ids)
		if want := []string{"a", "b", "live", "slow"}; !slices.Equal(h.ids, want) {
			t.Errorf("the host has %q, want %q", h.ids, want)
		}
		if n := b.counts().records; n != 0 {
			t.Errorf("%d records are left", n)
		}
	})
}

func TestAgentEndsThoughItsDiskBlocks(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		bad := newBadFS()
		f := runAgent(t, func(o *Options) { o.SpoolDir, o.fs = t.TempDir(), bad })
		f.net.refuse(errRefusedConnection)
		wait := make(chan struct{})
		bad.blocked.Store(&wait)
		done := f.publish(bus.PublishRequest{Topic: "t"})
		if err := f.Probe(t.Context()); err != nil {
			t.Error(err)
		}
		begun := time.Now()
		f.stop()
		if d := time.Since(begun); d > drainFor+3*diskPatience {
			t.Errorf("ended after %v", d)
		}
		if r := <-done; refusalOf(r.err).Code != bus.CodeStorageStalled {
			t.Errorf("%+v", r)
		}
		close(wait)
	})
}

// On a disk that the spool itself has filled there is no room for the note of what is
// released, before what is released has gone.
func TestSpoolThatFilledItsDisk(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		b := openBox(t, dir, 512<<10)
		h := &host{seqs: make(map[string]uint64)}
		segments := func() int {
			files, _ := filepath.Glob(filepath.Join(dir, "web1", "*.jsonl"))
			return len(files)
		}
		for i := 0; segments() < 4; i++ {
			b.publish(fmt.Sprint(i))
			synctest.Wait()
		}
		b.fs.create.Store(pointer(syscall.ENOSPC))
		b.begin()
		h.take(b, 1<<30)
		time.Sleep(2 * saveEvery)
		synctest.Wait()
		if n := segments(); n != 1 {
			t.Errorf("the host has everything, and %d segments are left", n)
		}
		b.stop() // without a note
		b = openBox(t, dir, 512<<10)
		if n := b.counts().records; n >= len(h.ids) {
			t.Errorf("%d records wait again of %d", n, len(h.ids))
		}
		b.publish("after")
		arrived := len(h.ids)
		b.begin()
		h.take(b, 1<<30)
		if len(h.ids) != arrived+1 || h.ids[arrived] != "after" {
			t.Errorf("the host has %q after the restart", h.ids[arrived:])
		}
	})
}

// A publisher that is faster than the disk waits; it is not told that the spool is
// full, which it is not.
func TestPublisherWaitsForTheDisk(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		b := openBox(t, t.TempDir(), 4<<20)
		payload := []byte(`"` + strings.Repeat("x", wire.MaxPayload-2) + `"`)
		for i := range 40 {
			if err := b.put(Record{Topic: "t", ID: fmt.Sprint(i), Payload: payload}, func(result) {}); err != nil {
				t.Fatal(i, err)
			}
		}
	})
}
