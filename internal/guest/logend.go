package guest

import (
	"slices"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

// sessionSubscriptions is how many a session may have by default (contract 2). Where all
// are in use none is left to ask with, and castrad would say that the limit was reached.
const sessionSubscriptions = 16

// sound asks where the host's log ends, behind all that is subscribed to at the start
// of a session. Call with the lock held.
//
// A subscription goes on behind what it has heard. Where the host's log was begun
// anew, or restored, that number may lie beyond its end, and the host would have
// nothing for it until the log has grown as long again: the guest would hear nothing,
// and nobody would be told. The ack of a subscription to what is new says where the
// log ends.
func (t *table) sound() {
	if len(t.all) >= sessionSubscriptions {
		return
	}
	if i := slices.IndexFunc(t.all, func(s *subscription) bool { return s.state == subAsked && s.next > 0 }); i >= 0 {
		t.enqueue(&subscription{topic: t.all[i].topic, sink: logEnd{t}})
	}
}

// logEnd is the sink of the subscription that sound makes.
type logEnd struct{ t *table }

func (e logEnd) begun(s *subscription) { e.t.sounded(s) }

func (logEnd) suspended(*subscription) {}

// refused leaves open where the log ends.
func (logEnd) refused(*subscription, *bus.Error) {}

func (logEnd) deliver(*subscription, *wire.Message) bool { return true }

func (logEnd) gap(*subscription, uint64, uint64) bool { return true }

// sounded takes what the ack of sound's subscription said. What lies beyond the log's
// end goes on behind it, and is told that it misses what is there already.
func (t *table) sounded(sounding *subscription) {
	t.mu.Lock()
	t.leave(sounding)
	end := max(sounding.next, 1) - 1 // of an empty log nothing is said
	var beyond []*subscription
	for _, s := range t.all {
		if !t.says || s.next <= end+1 {
			continue
		}
		beyond = append(beyond, s)
		s.next, s.given, s.done = end+1, end, 0
		if s.state == subAsked || s.state == subLive {
			t.leave(s)
			t.enqueue(s)
		}
	}
	t.mu.Unlock()
	t.wake()
	if len(beyond) == 0 {
		return
	}
	t.shorter(end)
	for _, s := range beyond {
		if end > 0 {
			s.sink.gap(s, 1, end)
		}
	}
}
