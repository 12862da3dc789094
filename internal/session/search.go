package session

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/wire"
)

// searchTime is how long a subscribe may look for its place in the log before
// the disk counts as stalled; the session's other frames wait behind it.
const searchTime = 5 * time.Second

// stalled is the refusal of what a disk keeps from being done in [searchTime].
func stalled(format string, args ...any) error {
	e := bus.Errorf(bus.CodeStorageStalled, format, args...)
	e.RetryAfter = searchTime
	return e
}

// prepareInTime is prepare, given up on when the disk does not answer.
func (s *Session) prepareInTime(r request) (*Subscription, error) {
	if _, owned := wire.TopicVM(r.topic); !owned && r.cursor == "" && r.from.Kind == wire.FromNow {
		return s.prepare(r) // reads nothing
	}
	refusal := stalled("the place in the event log was not found in %v; subscribe again later, or with a nearer from", searchTime)
	select {
	case <-s.lost:
		s.lost = nil
	default:
		if s.lost != nil {
			// Each further one would wait for the same disk, and be kept for as long.
			return nil, refusal
		}
	}
	type result struct {
		sub *Subscription
		err error
	}
	done := make(chan result, 1) // for the one result
	var settled atomic.Bool      // either it is given, or nobody waits any more
	ended := make(chan struct{})
	s.background.Go(func() {
		defer close(ended)
		sub, err := s.prepare(r)
		if settled.CompareAndSwap(false, true) {
			done <- result{sub, err}
		} else if err == nil {
			if sub.found != nil {
				s.found = sub.found // for who asks again
			}
			sub.drop()
		}
	})
	t := time.NewTimer(searchTime)
	defer t.Stop()
	select {
	case res := <-done:
		return res.sub, res.err
	case <-t.C:
	}
	if !settled.CompareAndSwap(false, true) { // just in time after all
		res := <-done
		return res.sub, res.err
	}
	s.lost = ended
	return nil, refusal
}

// searchSlice is how long a search may go on while others wait for their turn, and after
// its session has ended: what takes no longer a hand-over does not cut short.
const searchSlice = 50 * time.Millisecond

// found is what a search for the n last records on topic has come to: up to end there are as
// many from start on, or all that there are. Those from mark on, fewer than n, have come
// since the search began; mark means nothing while newer is 0.
type found struct {
	topic      string
	n          uint64
	start, end uint64
	mark       uint64
	newer      uint64
}

// search looks for the n-th last record that the subscription may hear.
//
// Where an earlier search for the same was given up on, it goes on from what that has come
// to: in a log that takes longer than [searchTime] none would ever be done in time. It then
// begins with what were the n last a moment ago, and up to n-1 that have come since are
// heard besides: which of the oldest to leave out for them only another search could tell.
func (sub *Subscription) search(n uint64) (uint64, error) {
	s := sub.s
	if !s.guest.Search() {
		return 0, stalled("this VM is searching the event log already; subscribe again when that is done")
	}
	defer s.guest.SearchDone()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	s.searching.Store(&stop)
	defer s.searching.Store(nil)
	if s.ended.Load() != nil { // before there was anything to stop
		stop()
	}
	if s.found == nil || s.found.topic != sub.topic || s.found.n != n {
		return sub.scan(ctx, n)
	}
	f := *s.found
	if err := sub.catchUp(ctx, &f); err != nil {
		return 0, err
	}
	s.found, sub.found = nil, &f
	oldest, err := sub.oldest()
	return max(f.start, oldest), err // what has expired since is no gap
}

// stopSearch ends a search of the log. Call it once the session has ended, or is handed over.
func (s *Session) stopSearch() {
	if stop := s.searching.Load(); stop != nil {
		(*stop)()
	}
}

func cutShort() error {
	return stalled("castrad restarts, and has not searched the event log to the end; subscribe again")
}

// catchUp takes in what has come since f was found. It needs no turn: it reads little, and
// that forwards, as any subscriber does.
func (sub *Subscription) catchUp(ctx context.Context, f *found) error {
	end := sub.s.opts.Log.Committed()
	r, err := sub.readFrom(f.end + 1)
	if err != nil {
		return err
	}
	defer r.Close()
	var rec eventlog.Record
	for r.Position() <= end {
		if ctx.Err() != nil {
			return cutShort()
		}
		ok, err := r.Next(&rec)
		if _, gone := errors.AsType[*eventlog.Gap](err); gone {
			continue
		}
		if err != nil {
			return err
		}
		if !ok || rec.Seq > end {
			break
		}
		if !sub.hears(&rec) {
			continue
		}
		if f.newer == 0 {
			f.mark = rec.Seq
		}
		if f.newer++; f.newer == f.n { // those before are not among the last any more
			f.start, f.newer = f.mark, 0
		}
	}
	f.end = end
	return nil
}

// scan reads the log backwards. It takes turns with others, so that a search through all
// that is kept does not hold up one for the last few records.
func (sub *Subscription) scan(ctx context.Context, n uint64) (start uint64, err error) {
	s := sub.s
	var began time.Time
	turn := func() bool { // those who wait come first
		select {
		case s.opts.Scans <- struct{}{}:
			began = time.Now()
			return true
		case <-ctx.Done():
			return false
		}
	}
	if !turn() {
		return 0, cutShort()
	}
	holds, looked := true, 0
	defer func() {
		if holds {
			<-s.opts.Scans
		}
	}()
	hears := func(rec *eventlog.Record) (bool, error) {
		looked++
		over := ctx.Err() != nil // which takes less time than to look at the clock
		if (over || looked%256 == 0) && time.Since(began) >= searchSlice {
			<-s.opts.Scans
			if holds = !over && turn(); !holds {
				return false, cutShort()
			}
		}
		return sub.hears(rec), nil
	}
	end := s.opts.Log.Committed()
	if sub.own() {
		start, err = s.opts.Log.LastMatchingOf(s.vm, n, hears)
	} else {
		start, err = s.opts.Log.LastMatching(n, hears)
	}
	if err == nil {
		sub.found = &found{topic: sub.topic, n: n, start: start, end: end}
	}
	return start, err
}
