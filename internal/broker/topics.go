package broker

import (
	"slices"
	"sync"
	"sync/atomic"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/session"
	"github.com/castrabus/castra/internal/token"
	"github.com/castrabus/castra/internal/wire"
)

// index finds the subscriptions that a topic concerns.
type index struct {
	mu    sync.RWMutex
	exact map[string][]*session.Subscription
	wild  []*session.Subscription

	woken []*session.Session // the committer's, kept for its room
}

func (x *index) init() { x.exact = make(map[string][]*session.Subscription) }

// Subscribe makes sub hear what is committed from now on.
func (b *Broker) Subscribe(sub *session.Subscription) {
	x := &b.topics
	x.mu.Lock()
	defer x.mu.Unlock()
	if sub.Pattern().Literal() {
		x.exact[sub.Topic()] = append(x.exact[sub.Topic()], sub)
	} else {
		x.wild = append(x.wild, sub)
	}
}

// Unsubscribe ends that.
func (b *Broker) Unsubscribe(sub *session.Subscription) {
	b.acked.note(sub)
	x := &b.topics
	x.mu.Lock()
	defer x.mu.Unlock()
	is := func(o *session.Subscription) bool { return o == sub }
	if !sub.Pattern().Literal() {
		x.wild = slices.DeleteFunc(x.wild, is)
		return
	}
	if rest := slices.DeleteFunc(x.exact[sub.Topic()], is); len(rest) > 0 {
		x.exact[sub.Topic()] = rest
	} else {
		delete(x.exact, sub.Topic())
	}
}

// committed tells the subscriptions that a commit concerns; the committer calls
// it. One notice is enough for any number of records, so a run of records on
// one topic costs one look-up.
func (b *Broker) committed(c eventlog.Commit) {
	x := &b.topics
	var topic []byte
	var all bool
	x.mu.RLock()
	if len(x.exact)+len(x.wild) > 0 {
		c.Runs(func(rec *eventlog.Record) {
			audible := b.audible(rec)
			if topic != nil && audible == all && string(topic) == string(rec.Topic) {
				return
			}
			topic, all = rec.Topic, audible
			x.notify(rec, audible)
		})
	}
	x.mu.RUnlock()
	b.tails.wake()
	if len(x.woken) > 0 {
		if len(x.woken) == 1 && c.Led() {
			b.couriers.Leave(x.woken[0])
		} else {
			b.couriers.Wake(x.woken...)
		}
		clear(x.woken) // not to keep sessions alive
		x.woken = x.woken[:0]
	}
}

// notify tells the subscriptions that match rec. Where it is not audible only
// the VM whose topic it is may hear it.
func (x *index) notify(rec *eventlog.Record, audible bool) {
	tell := func(sub *session.Subscription) {
		if sub.Notify(rec.Seq) {
			x.woken = append(x.woken, sub.Session())
		}
	}
	_, owned := wire.TopicVM(rec.Topic)
	if !audible && !owned {
		return
	}
	for _, sub := range x.exact[string(rec.Topic)] {
		tell(sub)
	}
	for _, sub := range x.wild {
		if sub.Pattern().Match(string(rec.Topic)) {
			tell(sub)
		}
	}
}

// subscribers lists the subscriptions that match topic.
func (x *index) subscribers(topic string) []*session.Subscription {
	x.mu.RLock()
	defer x.mu.RUnlock()
	subs := slices.Clone(x.exact[topic])
	for _, sub := range x.wild {
		if sub.Pattern().Match(topic) {
			subs = append(subs, sub)
		}
	}
	return subs
}

// audible tells whether guests other than a vm: topic's owner may hear rec.
func (b *Broker) audible(rec *eventlog.Record) bool {
	if string(rec.VM) == bus.HostVM {
		return true
	}
	for _, p := range b.settings.Load().GuestTopics {
		if p.Match(string(rec.Topic)) {
			return true
		}
	}
	return false
}

// waiters are goroutines that want to look again when something has happened.
type waiters struct {
	mu  sync.Mutex
	all atomic.Pointer[[]chan struct{}] // replaced, never changed in place
}

// join gives a channel with room for one token: one says all that more could.
func (w *waiters) join() (ch chan struct{}, leave func()) {
	ch = make(chan struct{}, 1)
	w.change(func(all []chan struct{}) []chan struct{} { return append(all, ch) })
	return ch, func() {
		w.change(func(all []chan struct{}) []chan struct{} {
			return slices.DeleteFunc(all, func(c chan struct{}) bool { return c == ch })
		})
	}
}

func (w *waiters) change(f func([]chan struct{}) []chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []chan struct{}
	if p := w.all.Load(); p != nil {
		all = slices.Clone(*p)
	}
	all = f(all)
	w.all.Store(&all)
}

func (w *waiters) wake() {
	p := w.all.Load()
	if p == nil {
		return
	}
	for _, ch := range *p {
		token.Leave(ch)
	}
}
