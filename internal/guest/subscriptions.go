package guest

import (
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

// sink receives what the host sends for one subscription. Its methods are called
// by the session's goroutines, one at a time and under no lock, and must not block:
// behind them wait all other subscriptions and the acks.
type sink interface {
	// begun says that the host has taken the subscription, suspended that there is
	// no session now and that it will be made, or made again, on the next one.
	begun(s *subscription)
	suspended(s *subscription)
	// refused says that the host does not take it. It is tried again on the next
	// session unless it is removed.
	refused(s *subscription, err *bus.Error)
	// deliver and gap give false where there is no room: the subscription is then
	// paused, and goes on without loss once it is resumed.
	deliver(s *subscription, m *wire.Message) bool
	gap(s *subscription, from, to uint64) bool
}

// subscription is something that somebody in this guest listens to. It outlives
// sessions.
type subscription struct {
	topic  string // as the host knows it
	from   string // where it begins: the member's JSON; empty: now
	cursor string // empty: none
	sink   sink

	// Guarded by the table's lock.
	state   subState
	name    string // on this session; a new one each time, so that what is still under way for an earlier one is not taken for it
	next    uint64 // the first record not delivered yet; 0: not known
	since   time.Time
	given   uint64 // the newest record handed to the sink
	done    uint64 // the newest record that has been processed here
	pending bool   // in table.acks
	resumed bool   // its sink has room again, before the table knew that it had none
}

type subState uint8

const (
	subIdle   subState = iota // not on the session, or there is none
	subAsked                  // to be sent, or unanswered
	subLive                   // the host has taken it
	subPaused                 // its sink has no room
)

// quietAfter is how long after the ack what there was to replay has surely begun to
// arrive.
const quietAfter = 10 * time.Second

// maxSubscriptions bounds what is kept here for clients; the host has its own bound
// for each session (16, contract 2), and the refusal is then the host's.
const maxSubscriptions = 256

// table is all that this guest is subscribed to, and what is to be said to the host
// about it.
type table struct {
	wake func() // something is to be sent; must not block
	note func() // what the host has taken changed; must not block
	// shorter says that the host's log ends at end, before what was heard of it.
	shorter func(end uint64)

	mu    sync.Mutex
	live  bool
	count uint64          // names given on all sessions
	all   []*subscription // in the order in which they were made
	names map[string]*subscription
	ask   []*subscription // to be subscribed
	drop  []string        // names to be unsubscribed; each was once sent
	asked []*subscription // sent and unanswered, in order; one that was removed since stays as its place
	acks  []*subscription // with something processed that the host has not heard
	left  []string        // names whose unsubscribe is sent and unanswered, in order
	says  bool            // the host says on this session where a subscription begins
}

func newTable() *table { return &table{names: make(map[string]*subscription)} }

// add makes a subscription and says whether there is a session for it now.
func (t *table) add(s *subscription) (live bool, err error) {
	t.mu.Lock()
	if len(t.all) >= maxSubscriptions {
		t.mu.Unlock()
		return false, bus.Errorf(bus.CodeTooManySubscriptions, "this guest has %d subscriptions; unsubscribe from one first", maxSubscriptions)
	}
	t.all = append(t.all, s)
	if live = t.live; live {
		t.enqueue(s)
	}
	t.mu.Unlock()
	t.wake()
	return live, nil
}

// enqueue puts s on the session. Call with the lock held.
func (t *table) enqueue(s *subscription) {
	t.count++
	s.name = "s" + strconv.FormatUint(t.count, 10)
	s.state = subAsked
	t.names[s.name] = s
	t.ask = append(t.ask, s)
}

// remove ends a subscription. Nothing more is given to its sink, but for a delivery
// just under way.
func (t *table) remove(s *subscription) {
	t.mu.Lock()
	t.all = slices.DeleteFunc(t.all, func(o *subscription) bool { return o == s })
	t.leave(s)
	t.mu.Unlock()
	t.wake()
	t.note()
}

// leave takes s off the session. Call with the lock held.
func (t *table) leave(s *subscription) {
	if s.state == subAsked || s.state == subLive {
		if i := slices.Index(t.ask, s); i >= 0 {
			t.ask = slices.Delete(t.ask, i, i+1)
		} else {
			t.drop = append(t.drop, s.name)
		}
	}
	delete(t.names, s.name)
	if s.pending {
		t.acks = slices.DeleteFunc(t.acks, func(o *subscription) bool { return o == s })
		s.pending = false
	}
	s.state = subIdle
}

// resume goes on with a subscription whose sink had no room, once for each time.
func (t *table) resume(s *subscription) {
	t.mu.Lock()
	if s.state == subPaused {
		t.restart(s)
	} else {
		s.resumed = true
	}
	t.mu.Unlock()
	t.wake()
}

// restart is resume with the lock held.
func (t *table) restart(s *subscription) {
	s.state, s.resumed = subIdle, false
	if t.live {
		t.enqueue(s)
	}
}

// processed says that everything delivered on s up to seq has been processed.
func (t *table) processed(s *subscription, seq uint64) {
	t.mu.Lock()
	fresh := seq > s.done && seq <= s.given // else it is of a log that is no more
	if fresh {
		s.done = seq
		if s.state == subLive && !s.pending {
			s.pending = true
			t.acks = append(t.acks, s)
		}
	}
	t.mu.Unlock()
	if fresh {
		t.wake()
	}
}

// begin starts a session with everything that is not paused.
func (t *table) begin() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.live = true
	t.says = false
	for _, s := range t.all {
		if s.state != subPaused {
			t.enqueue(s)
		}
	}
	t.sound()
}

// end forgets the session, and tells every sink.
func (t *table) end() {
	t.mu.Lock()
	t.live = false
	clear(t.names)
	t.ask, t.drop, t.asked, t.acks, t.left = nil, nil, nil, nil, nil
	all := slices.Clone(t.all)
	for _, s := range all {
		s.pending = false
		if s.state != subPaused {
			s.state = subIdle
		}
	}
	t.mu.Unlock()
	for _, s := range all {
		s.sink.suspended(s)
	}
	t.note()
}

// take appends the frames that are to be sent: unsubscribes first, to make room for
// what replaces them.
func (t *table) take(dst []byte) []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.live {
		return dst
	}
	for _, name := range t.drop {
		dst = wire.AppendUnsubscribeFrame(dst, name)
	}
	t.left = append(t.left, t.drop...)
	for _, s := range t.ask {
		dst = wire.AppendSubscribeFrame(dst, s.topic, s.name, s.where(), s.cursor)
		t.asked = append(t.asked, s)
	}
	for _, s := range t.acks {
		s.pending = false
		dst = wire.AppendGuestAckFrame(dst, s.name, s.done)
	}
	t.drop, t.ask, t.acks = t.drop[:0], t.ask[:0], t.acks[:0]
	return dst
}

// where gives the `from` that s is to be subscribed with now.
func (s *subscription) where() string {
	switch {
	case s.next > 0:
		return strconv.FormatUint(s.next, 10)
	case len(s.from) > 0 && s.from[0] == '-' && !s.since.IsZero() && time.Since(s.since) > quietAfter:
		// Nothing matched when it was made. What has come since may be more than
		// the last N, and all of it is new.
		return `"start"`
	default:
		return s.from
	}
}

// answer takes the host's ack of a subscribe. It reports false where none is
// awaited.
func (t *table) answer(m *wire.Message) bool {
	t.mu.Lock()
	if len(t.asked) == 0 {
		t.mu.Unlock()
		return false
	}
	s := t.asked[0]
	t.asked = t.asked[1:]
	ok := string(m.Status) == "ok"
	t.says = t.says || m.HasSeq
	// One that was removed, or paused and resumed under another name, since it was
	// asked for no longer cares.
	current := s.state == subAsked && !slices.Contains(t.ask, s) && !slices.Contains(t.asked, s)
	switch {
	case !current:
	case ok:
		s.state = subLive
		if s.since.IsZero() {
			s.since = time.Now()
		}
		if m.HasSeq && s.next == 0 {
			s.next = m.Seq + 1 // a host that says behind which record it begins
		}
	default:
		delete(t.names, s.name)
		s.state = subIdle
	}
	t.mu.Unlock()
	switch {
	case !current:
	case ok:
		s.sink.begun(s)
		t.note()
	default:
		s.sink.refused(s, &bus.Error{Code: bus.Code(wire.Clip(m.Code)), Reason: string(m.Reason), RetryAfter: time.Duration(min(m.RetryAfterMS, maxRetryMS)) * time.Millisecond})
	}
	return true
}

// dropped takes the host's ack of an unsubscribe. One that the host's disk has kept
// from being done is sent again, or the host would go on delivering for nobody: with
// whatever is sent next, a heartbeat at the latest, so that a slow host is not pressed.
func (t *table) dropped(m *wire.Message) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.left) == 0 {
		return
	}
	name := t.left[0]
	t.left = t.left[1:]
	if bus.Code(m.Code) == bus.CodeStorageStalled {
		t.drop = append(t.drop, name)
	}
}

// deliver passes a delivery on. Only the session's reader calls it and gap.
func (t *table) deliver(m *wire.Message) {
	if s, _ := t.expecting(m.Subscription, m.Seq); s != nil {
		t.passed(s, m.Seq, m.Seq, s.sink.deliver(s, m))
	}
}

// gap passes a gap on.
func (t *table) gap(m *wire.Message) {
	if s, next := t.expecting(m.Subscription, m.GapTo); s != nil {
		from := max(m.GapFrom, next, 1)
		t.passed(s, from, m.GapTo, s.sink.gap(s, from, m.GapTo))
	}
}

// expecting gives the subscription of that name and the record that it expects,
// nil if there is none or it was given the record seq already: with a cursor, the
// host begins with what it has not heard to be processed.
func (t *table) expecting(name []byte, seq uint64) (s *subscription, next uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s = t.names[string(name)]
	if s == nil || seq < s.next {
		return nil, 0
	}
	s.given = seq
	return s, s.next
}

// passed notes that s was given the records from from to to, or that it had no room
// for them.
func (t *table) passed(s *subscription, from, to uint64, taken bool) {
	t.mu.Lock()
	switch {
	case taken:
		s.next = to + 1
	case s.state == subLive || s.state == subAsked:
		if s.next == 0 {
			s.next = from
		}
		t.leave(s)
		s.state = subPaused
		if s.resumed {
			t.restart(s)
		}
	}
	t.mu.Unlock()
	if !taken {
		t.wake()
	}
}

// topics lists what the host has taken, each once.
func (t *table) topics() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	topics := []string{}
	for _, s := range t.all {
		if s.state == subLive && !slices.Contains(topics, s.topic) {
			topics = append(topics, s.topic)
		}
	}
	return topics
}
