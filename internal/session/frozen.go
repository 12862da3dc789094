package session

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"strings"
	"syscall"
	"time"

	"github.com/castrabus/castra/internal/wire"
)

// A session that is handed over stops between two frames of its guest's. What it
// had read of the next one, and what it has not written yet, goes with its
// connection to the castrad that comes next, as a Frozen.

// Frozen is a session at rest. Whoever changes what it holds changes the version
// of the hand-over.
type Frozen struct {
	Token  string `json:"token"`
	Remote string `json:"remote"`
	// Unread is the beginning of a frame, or more, that was read and not acted on.
	Unread []byte `json:"unread,omitempty"`
	// Unsent is what the guest has still to get: the rest of a frame that went out
	// in part, and whole ones behind it.
	Unsent        []byte               `json:"unsent,omitempty"`
	Ordered       bool                 `json:"ordered,omitempty"` // it has wire.CapOrdered
	Held          *Held                `json:"held,omitempty"`
	Subscriptions []FrozenSubscription `json:"subscriptions,omitempty"`
}

// FrozenSubscription is where a subscription stood.
type FrozenSubscription struct {
	Name     string `json:"name"`
	Topic    string `json:"topic"`
	Cursor   string `json:"cursor,omitempty"`
	Start    uint64 `json:"start"`    // the first record that it may hear
	Position uint64 `json:"position"` // the newest one that it has passed
	Sent     uint64 `json:"sent"`     // the newest one that the guest was given; 0: Position may be
	Next     uint64 `json:"next"`     // the next to look at: between it and Position nothing matches
	Acked    uint64 `json:"acked,omitempty"`
}

// maxFrozen bounds what a session may leave unsent. A burst of the smallest frames,
// each refused at length, comes to half of it.
const maxFrozen = 4 << 20

// handingOver is the end of a session that goes on in another process.
var handingOver = &End{Reason: TroubleShutdown, Detail: "castrad restarts"}

// HandOver makes the session stop, and then call [Broker.Park], or [Broker.Release] if
// it ends all the same. It does not wait. It gives false, and does nothing, where the
// session ends already, and may have called Release before.
func (s *Session) HandOver() bool {
	if !s.ended.CompareAndSwap(nil, handingOver) {
		return false
	}
	_ = s.conn.SetDeadline(time.Unix(1, 0)) // as End does
	s.stopSearch()
	s.opts.Idle.wake(s)
	return true
}

// isHandingOver tells whether what cannot be written is to be kept.
func (s *Session) isHandingOver() bool { return s.ended.Load() == handingOver }

// keep is what becomes of b, of which nothing can be written any more. Call with
// the right to write. It gives nil where b is kept, so that all goes on as if it had
// been written, and the answers that wait for that are kept behind it.
func (s *Session) keep(b []byte) error {
	if !s.isHandingOver() {
		return errEnded
	}
	s.unsent = append(s.unsent, b...)
	return nil
}

// park is the end of run for a session that is handed over. Where that does not
// come about it ends like any other.
func (s *Session) park() {
	s.deliveries.wait()
	if !s.broker.Park(s) {
		s.ended.Store(&End{Reason: TroubleShutdown, Detail: "castrad is ending"})
		s.bye(*s.ended.Load())
		return
	}
	_ = s.conn.Close() // the copy that is handed over stays open
	s.background.Wait()
}

// Freeze describes a parked session, and gives the descriptor of its connection,
// which is the session's until Park returns. quiet is a record such that every one
// up to it of which a subscription is to be notified has been notified of; 0: none
// is known to be.
func (s *Session) Freeze(quiet uint64) (f *Frozen, fd int, err error) {
	if len(s.unsent) > maxFrozen {
		return nil, 0, fmt.Errorf("%d bytes wait to be sent to the guest", len(s.unsent))
	}
	cerr := s.raw.Control(func(n uintptr) { fd = int(n) })
	if cerr != nil {
		return nil, 0, cerr
	}
	f = &Frozen{Token: s.token, Remote: s.remote, Unread: s.unread, Unsent: s.unsent, Ordered: s.ordered, Held: s.held}
	for _, sub := range s.subscriptions() {
		f.Subscriptions = append(f.Subscriptions, sub.freeze(quiet))
	}
	return f, fd, nil
}

func (sub *Subscription) freeze(quiet uint64) FrozenSubscription {
	next := sub.reader.Position()
	if hint := sub.hint.Load(); !sub.behind.Load() {
		// All before the hint has been looked at or is known not to match; a
		// subscription that heard nothing for days must not read days of the log.
		if hint == 0 {
			hint = quiet + 1
		}
		next = max(next, hint)
	}
	return FrozenSubscription{
		Name: sub.name, Topic: sub.topic, Cursor: sub.cursor,
		Start: sub.start.Load(), Position: sub.position.Load(), Sent: sub.sent.Load(), Next: next, Acked: sub.acked.Load(),
	}
}

// check tells whether f can be the state of a session of vm's.
func (f *Frozen) check(vm string) error {
	token, ok := strings.CutPrefix(f.Token, tokenPrefix)
	switch {
	case !ok || len(token) != 2*tokenBytes || strings.Trim(token, "0123456789abcdef") != "":
		return errors.New("it has no token")
	case len(f.Unread) > readSize:
		return fmt.Errorf("%d bytes are unread, which is more than a frame", len(f.Unread))
	case len(f.Unsent) > maxFrozen:
		return fmt.Errorf("%d bytes are unsent", len(f.Unsent))
	}
	if f.Held != nil && (!f.Ordered || !wire.ValidID(f.Held.ID) || f.Held.RetryAfterMS <= 0) {
		return errors.New("what it holds back is no publish")
	}
	names := make(map[string]bool)
	for i := range f.Subscriptions {
		sub := &f.Subscriptions[i]
		if names[sub.Name] {
			return fmt.Errorf("subscription %.*q is there twice", wire.MaxTopic, sub.Name)
		}
		names[sub.Name] = true
		if err := sub.check(vm); err != nil {
			return fmt.Errorf("subscription %.*q: %w", wire.MaxTopic, sub.Name, err)
		}
	}
	return nil
}

// sent is Sent, where it is known.
func (f *FrozenSubscription) sent() uint64 { return cmp.Or(f.Sent, f.Position) }

func (f *FrozenSubscription) check(vm string) error {
	pattern, err := wire.ParsePattern(f.Topic)
	owner, owned := pattern.VM()
	switch {
	case err != nil:
		return err
	case owned && owner != vm, brokersOwn([]byte(f.Topic)):
		return fmt.Errorf("%s may not hear %s", vm, f.Topic)
	case f.Name != f.Topic && !wire.ValidSubName(f.Name):
		return errors.New("its name is none")
	case f.Cursor != "" && !wire.ValidSubName(f.Cursor):
		return errors.New("its cursor's name is none")
	case f.Start == 0 || f.Next < f.Start, f.Position < f.Start-1 || f.Position >= f.Next, f.Sent > f.Position || f.Acked > f.sent():
		return fmt.Errorf("its numbers do not fit each other: %d, %d, %d, %d, %d", f.Start, f.Position, f.Next, f.Sent, f.Acked)
	}
	return nil
}

// Thaw makes the session that f describes over conn. It is known to nobody yet,
// [Session.Enrol] and [Session.Resume] follow; conn stays the caller's until then.
// An error says what about f cannot be.
func Thaw(vm string, conn Conn, b Broker, opts *Options, f *Frozen) (*Session, error) {
	if err := f.check(vm); err != nil {
		return nil, err
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	s := newSession(conn, raw, b, opts)
	s.vm, s.token, s.remote = vm, f.Token, f.Remote
	s.ordered, s.held = f.Ordered, f.Held
	s.unread, s.waiting = f.Unread, f.Unsent
	s.torn = len(f.Unsent) > 0 // what there is may be the rest of a frame
	return s, nil
}

// Enrol makes the subscriptions that f names hear what is committed from now on, for
// the account of guest's. Nothing is delivered before Resume.
func (s *Session) Enrol(guest Guest, f *Frozen) {
	s.guest = guest
	// What was left unsent goes first, and neither reading nor subscribing waits
	// for that.
	s.writer <- struct{}{}
	s.deliveries.start()
	if err := s.thawSubscriptions(f.Subscriptions); err != nil {
		s.End(TroubleShutdown, err.Error())
	}
}

// Resume runs a session that was enrolled, and calls done when its connection is closed,
// which may be long after it returns.
func (s *Session) Resume(done func()) {
	go func() {
		if err := s.release(nil); err != nil && !errors.Is(err, errEnded) {
			s.End(TroubleIOError, err.Error())
		}
		s.opts.Couriers.again(s)
	}()
	s.done = done
	early := s.unread
	s.unread = nil
	s.run(early)
}

func (s *Session) thawSubscriptions(frozen []FrozenSubscription) error {
	subs := make([]*Subscription, 0, len(frozen))
	defer func() { s.subs.Store(&subs) }()
	for _, f := range frozen {
		sub, err := s.newSubscription(f.Name, f.Topic, f.Cursor)
		if err != nil {
			return err
		}
		s.broker.Subscribe(sub)
		if f.Cursor != "" { // it is there already, and only to be known
			if _, err := s.broker.OpenCursor(sub, f.Next); err != nil {
				return err
			}
		}
		if err := sub.open(f.Next); err != nil {
			return err
		}
		// Where nothing is committed beyond, all that comes is notified of. Looking
		// for it would have thousands of sessions search what the first of them publish.
		sub.behind.Store(f.Next <= s.opts.Log.Committed())
		sub.start.Store(f.Start)
		sub.position.Store(f.Position)
		sub.sent.Store(f.sent())
		sub.acked.Store(f.Acked)
		subs = append(subs, sub)
		if f.Acked > 0 {
			s.broker.Acknowledged(sub, f.Acked)
		}
	}
	return nil
}

// newSession makes a session that nothing is known of but what it runs over.
func newSession(conn Conn, raw syscall.RawConn, b Broker, opts *Options) *Session {
	return &Session{
		opts: opts, broker: b, conn: conn, raw: raw,
		reading: make(chan struct{}, 1), writer: make(chan struct{}, 1),
	}
}

// newSubscription makes one that nobody knows of yet.
func (s *Session) newSubscription(name, topic, cursor string) (*Subscription, error) {
	pattern, err := wire.ParsePattern(topic)
	if err != nil {
		return nil, err
	}
	sub := &Subscription{s: s, name: name, topic: topic, pattern: pattern, cursor: cursor}
	sub.start.Store(math.MaxUint64)
	sub.visible = s.broker.Visible(s.vm)
	const begins = `{"type":"publish","subscription":`
	sub.prefix = append(wire.AppendString(append(make([]byte, 0, len(begins)+len(name)+3), begins...), name), ',')
	return sub, nil
}
