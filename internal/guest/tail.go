package guest

import (
	"context"
	"errors"
	"io"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

const (
	// reorderFor is how long a live record waits for one that belongs before it and
	// comes through another of the tail's subscriptions. A host sends what it
	// committed together in one go or two; should it take longer, the late record is
	// shown out of order, and not lost.
	reorderFor = 20 * time.Millisecond
	// ringBytes bounds what is kept to find the last lines of several subscriptions.
	ringBytes = 4 << 20
	// stalledAfter is when a replay that brings nothing any more has failed.
	stalledAfter = 30 * time.Second
	// tailWrite is about how much is written at once.
	tailWrite = 64 << 10
)

// tail shows what this guest hears to one reader.
//
// A guest's subscription has one pattern, and the broker sends no word when it has
// come to the newest record. So a tail of several patterns merges as many
// subscriptions, each record shown through the first that matches; and where it must
// know the newest record it asks for that first, by a subscription from -1 for each
// pattern (see probe).
//
// While it follows, records are shown in order as far as that can be known: after a
// lost session, or a reader that was slow, the newest record is asked for again and
// everything up to it merged.
type tail struct {
	agent *Agent
	req   bus.TailRequest
	w     io.Writer
	subs  []*subscription // one for each feed; nil: not made yet

	// wake has room for one: something came.
	wake chan struct{}

	mu     sync.Mutex
	merge  merge
	ready  []bool // by feed: the host has taken it on this session
	behind bool   // some feed may be behind the others, more than by chance
	err    *bus.Error

	// Of the tail's own goroutine:
	out  []byte
	ring [][]byte // the last lines, while they are not known to be the last
	size int      // bytes in ring
	keep bool     // lines go to ring
	over bool     // the end that was asked for is reached
}

// Tail writes what req selects of what this guest may hear, a line each, until all
// is written, ctx is done, w fails or the agent stops. A w that is slow only lags.
// Without Follow it needs the host: a tail without a session, or one that loses it,
// ends with the code not-connected.
func (a *Agent) Tail(ctx context.Context, req bus.TailRequest, w io.Writer) error {
	t := &tail{agent: a, req: req, w: w, wake: make(chan struct{}, 1)}
	topics := req.Topics
	if len(topics) == 0 {
		// Wildcards match no vm: topic unless it is spelled out.
		topics = []string{">", selfTopic, selfTopic + "/>"}
	}
	for _, topic := range topics {
		topic = a.own(topic)
		if err := a.checkPattern(topic); err != nil {
			return err
		}
		p, err := wire.ParsePattern(topic)
		if err != nil {
			return bus.Errorf(bus.CodeBadTopic, "%v", err)
		}
		if !slices.ContainsFunc(t.merge.feeds, func(f *feed) bool { return f.pattern.String() == topic }) {
			t.merge.feeds = append(t.merge.feeds, &feed{pattern: p})
		}
	}
	t.subs = make([]*subscription, len(t.merge.feeds))
	t.ready = make([]bool, len(t.merge.feeds))
	defer t.close()
	err := t.run(ctx)
	if errors.Is(err, errEnded) {
		return nil
	}
	return err
}

// errEnded ends a tail because the agent does.
var errEnded = errors.New("the agent has ended")

// close ends the subscriptions.
func (t *tail) close() {
	for _, s := range t.subs {
		if s != nil {
			t.agent.subs.remove(s)
		}
	}
}

func (t *tail) run(ctx context.Context) error {
	several := len(t.merge.feeds) > 1
	from := t.from()
	if !t.req.Follow && from == "" {
		return nil // what is there is not wanted, and what comes is not awaited
	}
	// Of several patterns, or with a filter of our own, the last lines are not those
	// that the host would choose.
	t.keep = t.req.Lines > 0 && (several || t.req.VM != "")
	if t.req.Follow && from != "" && !several && !t.keep {
		// What comes on one subscription is what is to be shown.
		if err := t.subscribe(from); err != nil {
			return err
		}
	} else {
		if err := t.begin(ctx, from); err != nil {
			return err
		}
		if err := t.catchUp(ctx); err != nil {
			return err
		}
		if err := t.release(); err != nil {
			return err
		}
	}
	for t.req.Follow && !t.over {
		if err := t.live(ctx); err != nil || t.over {
			return err
		}
		if err := t.again(ctx); err != nil {
			return err
		}
		if err := t.catchUp(ctx); err != nil {
			return err
		}
	}
	return nil
}

// from gives the `from` of the subscriptions; empty: nothing is to be replayed.
func (t *tail) from() string {
	switch {
	case t.req.All, t.req.Lines > 0 && t.req.VM != "":
		return `"start"`
	case t.req.From > 0:
		return strconv.FormatUint(t.req.From, 10)
	case !t.req.Since.IsZero():
		return `"` + t.req.Since.UTC().Format(time.RFC3339Nano) + `"`
	case t.req.Lines > 0:
		return "-" + strconv.FormatUint(t.req.Lines, 10)
	default:
		return ""
	}
}

// subscribe makes the tail's subscriptions, where they are not made yet.
func (t *tail) subscribe(from string) error {
	for i, f := range t.merge.feeds {
		if t.subs[i] != nil {
			continue
		}
		t.subs[i] = &subscription{topic: f.pattern.String(), from: from, sink: feedSink{t, i}}
		live, err := t.agent.subs.add(t.subs[i])
		if err != nil {
			t.subs[i] = nil
			return err
		}
		if !live {
			t.lost()
		}
	}
	return nil
}

// catchUp shows everything up to the horizon, in order.
func (t *tail) catchUp(ctx context.Context) error {
	stalled := time.NewTimer(stalledAfter)
	defer stalled.Stop()
	for {
		t.mu.Lock()
		err, done := t.err, false
		var items []item
		for err == nil {
			it, ok := t.merge.ordered()
			if !ok {
				if done = t.merge.caughtUp(); done {
					t.merge.settle()
				}
				break
			}
			if it, ok = t.merge.fresh(it); ok {
				items = append(items, it)
			}
		}
		t.mu.Unlock()
		if err != nil {
			return err
		}
		if err := t.show(items); err != nil {
			return err
		}
		t.resume()
		if done || t.over {
			return nil
		}
		if len(items) > 0 {
			stalled.Reset(stalledAfter)
		}
		select {
		case <-t.wake:
		case <-stalled.C:
			if !t.req.Follow { // one that follows waits for the host as long as it takes
				return bus.Errorf(CodeNotConnected, "the host has sent nothing for %v in the middle of a replay", stalledAfter)
			}
		case <-t.agent.ended:
			return errEnded
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// live shows what comes, until feeds have fallen behind each other.
func (t *tail) live(ctx context.Context) error {
	var end <-chan time.Time
	if !t.req.Until.IsZero() {
		timer := time.NewTimer(time.Until(t.req.Until))
		defer timer.Stop()
		end = timer.C
	}
	ending := false
	hold := time.NewTimer(0)
	defer hold.Stop()
	several := len(t.merge.feeds) > 1
	for !t.over {
		t.mu.Lock()
		err, behind := t.err, t.behind && several
		var items []item
		var wait time.Duration
		if head := t.merge.head(); err == nil && !behind && head != nil {
			if several && !ending {
				wait = time.Until(head.items[0].at.Add(reorderFor))
			}
			for wait <= 0 {
				it, ok := t.merge.any()
				if !ok {
					break
				}
				if it, ok = t.merge.fresh(it); ok {
					items = append(items, it)
				}
			}
		}
		t.mu.Unlock()
		if err != nil {
			return err
		}
		if behind {
			return nil
		}
		if err := t.show(items); err != nil {
			return err
		}
		t.resume()
		t.over = t.over || ending
		if t.over {
			break
		}
		if wait > 0 {
			hold.Reset(wait)
		} else {
			hold.Stop()
		}
		select {
		case <-t.wake:
		case <-hold.C:
		case <-end:
			ending = true // what has come is still shown
		case <-t.agent.ended:
			return errEnded
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// show writes items, or keeps them while it is not known whether they are among the
// last.
func (t *tail) show(items []item) error {
	for _, it := range items {
		if it.over {
			t.over = true
			break
		}
		if t.keep {
			t.ring = append(t.ring, it.line)
			t.size += len(it.line)
			if uint64(len(t.ring)) > t.req.Lines {
				t.size -= len(t.ring[0])
				t.ring = t.ring[1:]
			}
			if t.size > ringBytes {
				return bus.Errorf(bus.CodeInvalidArg, "the last %d records are more than %d bytes, which a guest does not keep; ask for fewer, or begin with --since or --from", t.req.Lines, ringBytes)
			}
			continue
		}
		if err := t.write(it.line); err != nil {
			return err
		}
	}
	if err := t.flush(); err != nil {
		return err
	}
	t.processed()
	return nil
}

// release shows the lines that were kept.
func (t *tail) release() error {
	ring := t.ring
	t.ring, t.keep, t.size = nil, false, 0
	for _, line := range ring {
		if err := t.write(line); err != nil {
			return err
		}
	}
	return t.flush()
}

func (t *tail) write(line []byte) error {
	t.out = append(t.out, line...)
	if len(t.out) < tailWrite {
		return nil
	}
	return t.flush()
}

func (t *tail) flush() error {
	if len(t.out) == 0 {
		return nil
	}
	_, err := t.w.Write(t.out)
	t.out = t.out[:0]
	return err
}

// processed tells the host how far this tail has come.
func (t *tail) processed() {
	for i, f := range t.merge.feeds {
		t.mu.Lock()
		seq := f.shown
		if len(f.items) == 0 {
			seq = f.brought
		}
		t.mu.Unlock()
		if seq > 0 {
			t.agent.subs.processed(t.subs[i], seq)
		}
	}
}

// resume goes on with feeds that have room again.
func (t *tail) resume() {
	for i, f := range t.merge.feeds {
		t.mu.Lock()
		room := f.full && f.bytes <= feedBuffer/2
		if room {
			f.full = false
		}
		t.mu.Unlock()
		if room {
			t.agent.subs.resume(t.subs[i])
		}
	}
}
