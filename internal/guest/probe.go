package guest

import (
	"context"
	"slices"
	"strconv"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

const (
	// quietFor is how long nothing must come, behind two heartbeats answered, until a
	// subscription counts as having nothing to replay. The broker has found where a
	// subscription begins before it acknowledges it, and delivers at once.
	quietFor = 100 * time.Millisecond
	// quietBytes of deliveries in that time may come on other subscriptions: the
	// broker serves one after the other, as much as this in a turn, so with less
	// none is kept waiting by another's replay.
	quietBytes = 64 << 10
	// busyFor bounds the wait where there is always more than that.
	busyFor = 2 * time.Second
)

// begin asks for the newest records and subscribes, so that catchUp knows when it has
// shown everything.
func (t *tail) begin(ctx context.Context, from string) error {
	newest, err := t.probe(ctx)
	if err != nil {
		return err
	}
	t.mu.Lock()
	for i, f := range t.merge.feeds {
		f.last = newest[i]
		if f.last < t.req.From {
			f.last = 0 // it begins behind that
		}
	}
	horizon := t.merge.horizon
	if from == "" { // only what is new is wanted: what lies behind the horizon
		t.merge.settle()
		if from = `"start"`; horizon > 0 {
			from = strconv.FormatUint(horizon+1, 10)
		}
	}
	t.mu.Unlock()
	if err := t.subscribe(from); err != nil {
		return err
	}
	if t.req.Since.IsZero() {
		return nil
	}
	// Whether there is anything since then is seen only by trying.
	empty := func(f *feed) bool { return f.passed == 0 && f.last > 0 }
	err = t.quiet(ctx,
		func() bool { return !slices.Contains(t.ready, false) },
		func() bool { return slices.ContainsFunc(t.merge.feeds, empty) })
	t.mu.Lock()
	for _, f := range t.merge.feeds {
		if empty(f) {
			f.last = 0
		}
	}
	t.mu.Unlock()
	return err
}

// again asks for the newest records once more, for a tail that has fallen behind.
func (t *tail) again(ctx context.Context) error {
	newest, err := t.probe(ctx)
	t.mu.Lock()
	for i := range newest {
		t.merge.feeds[i].last = newest[i]
	}
	t.mu.Unlock()
	return err
}

// probe asks for the newest record that there is for each feed, and sets the horizon.
//
// Several feeds are asked twice. What the first round finds is the horizon: records
// up to it were all committed before the second round, whose answers therefore say
// for each feed exactly how much of them it has still to bring.
func (t *tail) probe(ctx context.Context) (newest []uint64, err error) {
	t.mu.Lock()
	t.behind = false // what falls behind from here on makes another probe
	t.mu.Unlock()
	if newest, err = t.newest(ctx); err != nil {
		return nil, err
	}
	horizon := slices.Max(newest)
	if len(newest) > 1 && horizon > 0 {
		if newest, err = t.newest(ctx); err != nil {
			return nil, err
		}
	}
	t.mu.Lock()
	t.merge.horizon = horizon
	t.mu.Unlock()
	return newest, nil
}

// newest gives the newest record that there is for each feed now, 0 where there is
// none.
func (t *tail) newest(ctx context.Context) ([]uint64, error) {
	n := len(t.merge.feeds)
	sinks := make([]*probeSink, n)
	subs := make([]*subscription, n)
	defer func() {
		for _, s := range subs {
			if s != nil {
				t.agent.subs.remove(s)
			}
		}
	}()
	for i, f := range t.merge.feeds {
		sinks[i] = &probeSink{tail: t}
		s := &subscription{topic: f.pattern.String(), from: "-1", sink: sinks[i]}
		live, err := t.agent.subs.add(s)
		if err != nil {
			return nil, err
		}
		subs[i] = s
		if !live {
			t.lost()
		}
	}
	err := t.quiet(ctx,
		func() bool { return !slices.ContainsFunc(sinks, func(s *probeSink) bool { return !s.taken }) },
		func() bool { return slices.ContainsFunc(sinks, func(s *probeSink) bool { return s.seq == 0 }) })
	if err != nil {
		return nil, err
	}
	newest := make([]uint64, n)
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, s := range sinks {
		newest[i] = s.seq
	}
	return newest, nil
}

// quiet waits until the host has taken what was asked for, and then until nothing is
// missing or nothing comes any more. ready and missing are called with the tail's
// lock held.
func (t *tail) quiet(ctx context.Context, ready, missing func() bool) error {
	for {
		t.mu.Lock()
		err, asked, lacks := t.err, ready(), missing()
		t.mu.Unlock()
		switch {
		case err != nil:
			return err
		case asked && !lacks:
			return nil
		}
		if asked {
			sess := t.agent.uplink.session()
			if err := t.settle(ctx, sess, missing); err != nil {
				return err
			}
			t.mu.Lock()
			same := ready() && t.err == nil
			t.mu.Unlock()
			// All of it must have happened on one session.
			if same && sess != nil && sess == t.agent.uplink.session() {
				return nil
			}
			continue
		}
		if err := await(ctx, t, t.wake); err != nil {
			return err
		}
	}
}

// settle returns when nothing is missing or nothing comes any more on the session.
func (t *tail) settle(ctx context.Context, sess *session, missing func() bool) error {
	if sess == nil { // it has just ended; the sinks hear of it in a moment
		return await(ctx, t, t.wake)
	}
	for range 2 {
		if err := await(ctx, t, sess.beats.fence()); err != nil {
			return err
		}
	}
	end := time.Now().Add(busyFor)
	quiet := time.NewTimer(quietFor)
	defer quiet.Stop()
	for heard := sess.heard.Load(); ; {
		t.mu.Lock()
		done := !missing() || t.err != nil
		t.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-t.wake:
			continue
		case <-quiet.C:
		case <-t.agent.ended:
			return errEnded
		case <-ctx.Done():
			return ctx.Err()
		}
		now := sess.heard.Load()
		if now-heard < quietBytes || time.Now().After(end) {
			return nil
		}
		heard = now
		quiet.Reset(quietFor)
	}
}

// await waits for c, not beyond ctx or the agent's end.
func await[T any](ctx context.Context, t *tail, c <-chan T) error {
	select {
	case <-c:
		return nil
	case <-t.agent.ended:
		return errEnded
	case <-ctx.Done():
		return ctx.Err()
	}
}

// probeSink takes the first delivery of a subscription that begins with the newest
// record.
type probeSink struct {
	*tail
	taken bool   // by the host, on this session; guarded by the tail's lock, as is
	seq   uint64 // the record's number; 0: none came
}

func (s *probeSink) begun(*subscription) {
	s.mu.Lock()
	s.taken = true
	s.mu.Unlock()
	s.nudge()
}

func (s *probeSink) suspended(*subscription) {
	s.mu.Lock()
	s.taken = false
	s.mu.Unlock()
	s.lost()
}

func (s *probeSink) refused(_ *subscription, err *bus.Error) { s.fail(err) }

func (s *probeSink) deliver(_ *subscription, m *wire.Message) bool {
	s.mu.Lock()
	s.seq = max(s.seq, m.Seq)
	s.mu.Unlock()
	s.nudge()
	return true
}

func (*probeSink) gap(*subscription, uint64, uint64) bool { return true }
