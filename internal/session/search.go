package session

import (
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

// searchSlice is how long a search may go on while others wait for their turn.
const searchSlice = 50 * time.Millisecond

// search looks for the n-th last record that the subscription may hear. It takes
// turns with others, so that a search through all that is kept does not hold up one
// for the last few records.
func (sub *Subscription) search(n uint64) (uint64, error) {
	s := sub.s
	if !s.guest.Search() {
		return 0, stalled("this VM is searching the event log already; subscribe again when that is done")
	}
	defer s.guest.SearchDone()
	s.opts.Scans <- struct{}{}
	defer func() { <-s.opts.Scans }()
	began, looked := time.Now(), 0
	hears := func(rec *eventlog.Record) bool {
		if looked++; looked%256 == 0 && time.Since(began) >= searchSlice {
			<-s.opts.Scans
			s.opts.Scans <- struct{}{} // those who wait come first
			began = time.Now()
		}
		return sub.hears(rec)
	}
	if sub.own() {
		return s.opts.Log.LastMatchingOf(s.vm, n, hears)
	}
	return s.opts.Log.LastMatching(n, hears)
}
