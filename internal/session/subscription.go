package session

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/wire"
)

const (
	// defaultTopic is where a publish without a topic goes (contract 2).
	defaultTopic = "broadcast"

	// scanLimit is how many records a subscription looks at in one turn: one
	// that catches up through much that is not for it must let acks through.
	scanLimit = 4096
)

func brokersOwn(topic []byte) bool { return bytes.HasPrefix(topic, []byte(wire.BrokerPrefix)) }

// Subscription is a cursor into the log: what one session hears on one topic or
// pattern. It costs the same however far it is behind.
type Subscription struct {
	s       *Session
	name    string
	topic   string
	pattern wire.Pattern
	cursor  string        // durable position; "": none
	start   atomic.Uint64 // the first record that it may hear; the largest number until it is known
	prefix  []byte        // what each delivery begins with
	visible func(*eventlog.Record) bool
	found   *found // what was searched for it; nil: nothing was

	reader *eventlog.Reader // of whoever may read

	// position is the newest record passed, sent the newest given to the guest or told
	// as gone; hint the oldest one committed since that matches, 0 if there is none;
	// behind tells that there may be older ones still to be looked at.
	position atomic.Uint64
	sent     atomic.Uint64
	hint     atomic.Uint64
	behind   atomic.Bool
	acked    atomic.Uint64
}

// Topic gives the topic or pattern.
func (sub *Subscription) Topic() string { return sub.topic }

// Pattern gives it parsed.
func (sub *Subscription) Pattern() wire.Pattern { return sub.pattern }

// Session gives whose it is.
func (sub *Subscription) Session() *Session { return sub.s }

// Cursor gives the name of its durable position, "" if it has none.
func (sub *Subscription) Cursor() string { return sub.cursor }

// Acked gives the newest record that the guest has said to have processed.
func (sub *Subscription) Acked() uint64 { return sub.acked.Load() }

// Started gives the first record that it may hear.
func (sub *Subscription) Started() uint64 { return sub.start.Load() }

// Notify tells that the record seq matches. Call it in the order of seq. Where
// it gives true the session is to be woken; otherwise it is about to look.
func (sub *Subscription) Notify(seq uint64) bool { return sub.hint.CompareAndSwap(0, seq) }

// pending tells whether there may be something to deliver.
func (sub *Subscription) pending() bool { return sub.behind.Load() || sub.hint.Load() != 0 }

func (sub *Subscription) lag(committed uint64) uint64 {
	if pos := sub.position.Load(); pos < committed && sub.pending() {
		return committed - pos
	}
	return 0
}

// fill appends deliveries to out. Call with the right to read.
func (sub *Subscription) fill(w *courier, out []byte) (_ []byte, more bool, err error) {
	hint := sub.hint.Swap(0)
	if !sub.behind.Load() {
		if hint == 0 {
			return out, false, nil
		}
		if hint > sub.reader.Position() {
			sub.reader.Skip(hint) // nothing between matches
		}
		sub.behind.Store(true)
	}
	defer sub.reader.Rest() // the guest may take its time over these
	var rec eventlog.Record
	for range scanLimit {
		if len(out) >= deliverySize {
			return out, true, nil
		}
		if !sub.reader.Near() {
			w.leave()
		}
		ok, err := sub.reader.Next(&rec)
		gap, gone := errors.AsType[*eventlog.Gap](err)
		switch {
		case gone:
			out = wire.AppendGapFrame(out, sub.name, gap.From, gap.To)
			sub.position.Store(gap.To)
			sub.sent.Store(gap.To)
			continue
		case err != nil:
			return out, false, fmt.Errorf("reading for subscription %s: %w", sub.name, err)
		case !ok:
			sub.behind.Store(false)
			return out, false, nil
		}
		sub.position.Store(rec.Seq)
		if sub.hears(&rec) {
			sub.sent.Store(rec.Seq)
			out = sub.appendDelivery(out, &rec)
		}
	}
	return out, true, nil
}

func (sub *Subscription) hears(rec *eventlog.Record) bool {
	return sub.pattern.Match(string(rec.Topic)) && sub.visible(rec)
}

// appendDelivery appends a frame: the record as it stands in the log behind
// the subscription's name.
func (sub *Subscription) appendDelivery(out []byte, rec *eventlog.Record) []byte {
	out, mark := wire.BeginFrame(out)
	out = append(out, sub.prefix...)
	out = append(out, rec.Body...)
	wire.EndFrame(out, mark)
	return out
}

// request is a subscribe or unsubscribe frame, copied out of the workspace.
type request struct {
	subscribe           bool
	topic, name, cursor string
	hasTopic            bool
	id                  []byte
	from                wire.From
}

func (s *Session) copyRequest(m *wire.Message) request {
	r := request{
		subscribe: m.Type == wire.TypeSubscribe,
		topic:     string(m.Topic), hasTopic: m.Topic != nil,
		cursor: string(m.Cursor), from: m.From, id: slices.Clone(m.ID),
	}
	switch {
	case r.subscribe && m.Sub != nil:
		r.name = string(m.Sub)
	case !r.subscribe && m.Subscription != nil:
		r.name = string(m.Subscription)
	default:
		r.name = r.topic
	}
	return r
}

// change carries a subscribe or unsubscribe out and answers it.
func (s *Session) change(r request) error {
	a := wire.Ack{Kind: "unsubscribe", Topic: []byte(r.topic), Subscription: []byte(r.name), ID: r.id}
	if !r.hasTopic {
		a.Topic = nil
	}
	var sub *Subscription
	var err error
	if r.subscribe {
		a.Kind = "subscribe"
		sub, err = s.prepareInTime(r)
	} else if r.name == "" {
		err = bus.Errorf(bus.CodeBadFrame, "an unsubscribe names a subscription or a topic")
	}
	if err == nil && !s.takeReading() {
		if sub != nil {
			sub.drop()
		}
		err = stalled("a delivery has waited for the host's disk for %v; try again later", searchTime)
	}
	if err != nil {
		refuse(&a, err)
		return s.write(nil, wire.AppendAckFrame(nil, &a))
	}
	defer func() { <-s.reading }()
	if sub != nil {
		// Where it begins: a guest that loses the connection before the first
		// delivery can go on from there.
		a.Seq = sub.Started() - 1
	}
	s.writer <- struct{}{}
	s.replace(r.name, sub)
	if err := s.send(nil, wire.AppendAckFrame(nil, &a)); err != nil {
		<-s.writer
		return err
	}
	if sub != nil && sub.pending() { // else the first notice wakes it
		s.opts.Couriers.Wake(s)
	}
	return s.release(nil)
}

// takeReading takes the right to read. It gives false where who delivers has it and
// waits for a disk: the session's other frames, heartbeats among them, would wait, too.
// Where one frame of a burst has waited in vain, those behind it do not wait: a guest that
// is back sends all its subscriptions at once.
func (s *Session) takeReading() bool {
	select {
	case s.reading <- struct{}{}:
		return true
	default:
	}
	for left := searchTime; ; left -= restStep {
		switch {
		case s.ended.Load() != nil && !s.isHandingOver(): // one that goes on elsewhere has its answer kept
			return false
		case s.stuck.Load() > 0:
			left = searchTime // it is the guest that is waited for, to read
		case s.gaveUp || left <= 0:
			s.gaveUp = true
			return false
		}
		select {
		case s.reading <- struct{}{}:
			return true
		case <-time.After(restStep):
		}
	}
}

// drop ends a subscription that nobody delivers to. Only who prepared it calls it, or who
// has the right to read.
func (sub *Subscription) drop() {
	sub.s.broker.Unsubscribe(sub)
	sub.reader.Close()
}

// replace removes the subscription called name and puts sub, if not nil, in
// its place. Call with both rights.
func (s *Session) replace(name string, sub *Subscription) {
	subs := slices.Clone(s.subscriptions())
	if i := slices.IndexFunc(subs, func(o *Subscription) bool { return o.name == name }); i >= 0 {
		subs[i].drop()
		subs = slices.Delete(subs, i, i+1)
	}
	if sub != nil {
		subs = append(subs, sub)
	}
	s.subs.Store(&subs)
	topics := make([]string, 0, len(subs))
	for _, o := range subs {
		if !slices.Contains(topics, o.topic) {
			topics = append(topics, o.topic)
		}
	}
	s.broker.Subscribed(s, topics)
}

// prepare checks a subscribe frame and makes the subscription, already known
// to the broker but not yet to the session.
func (s *Session) prepare(r request) (*Subscription, error) {
	sub, err := s.newSubscription(r.name, r.topic, r.cursor)
	if err != nil {
		return nil, bus.Errorf(bus.CodeBadTopic, "%v", err)
	}
	if owner, owned := sub.pattern.VM(); owned && owner != s.vm {
		return nil, bus.Errorf(bus.CodeForbidden, "topic %s belongs to another VM", r.topic)
	}
	if strings.HasPrefix(r.topic, wire.BrokerPrefix) {
		return nil, bus.Errorf(bus.CodeForbidden, "topics beginning %s are heard by the host alone", wire.BrokerPrefix)
	}
	held := s.subscriptions()
	known := slices.ContainsFunc(held, func(o *Subscription) bool { return o.name == r.name })
	if !known && len(held) >= s.opts.MaxSubscriptions {
		s.noteSubscriptions()
		return nil, bus.Errorf(bus.CodeTooManySubscriptions, "a session may have %d subscriptions; unsubscribe from one first", s.opts.MaxSubscriptions)
	}
	start, err := sub.begin(r.from)
	if err == nil && r.cursor != "" {
		start, err = s.broker.OpenCursor(sub, start)
	}
	if err != nil {
		return nil, err
	}
	if err := sub.open(start); err != nil {
		return nil, err
	}
	return sub, nil
}

// begin gives the first record that the subscription is to hear. It makes the
// broker tell it what is committed from here on.
func (sub *Subscription) begin(from wire.From) (uint64, error) {
	log, vm := sub.s.opts.Log, sub.s.vm
	sub.s.broker.Subscribe(sub)
	start := log.Committed() + 1 // read after Subscribe: nothing can fall between the two
	var err error
	switch from.Kind {
	case wire.FromStart:
		start, err = sub.oldest()
	case wire.FromSeq:
		start = max(1, from.N)
	case wire.FromLast:
		start, err = sub.search(from.N)
	case wire.FromTime:
		if sub.own() {
			start, err = log.FirstSinceOf(vm, from.Time)
		} else {
			start, err = log.FirstSince(from.Time)
		}
	}
	if err != nil {
		sub.s.broker.Unsubscribe(sub)
	}
	return start, err
}

// own tells whether everything that the subscription may hear is in its VM's
// own stream.
func (sub *Subscription) own() bool {
	_, owned := sub.pattern.VM()
	return owned
}

// oldest gives the first record that is kept of what it may hear, the first of all where
// nothing is, as where no segment could be made yet.
func (sub *Subscription) oldest() (oldest uint64, err error) {
	if sub.own() {
		oldest, err = sub.s.opts.Log.OldestOf(sub.s.vm)
	} else {
		oldest = sub.s.opts.Log.Oldest()
	}
	return max(1, oldest), err
}

func (sub *Subscription) open(start uint64) error {
	sub.start.Store(start)
	sub.position.Store(start - 1)
	sub.sent.Store(start - 1)
	// What is committed from here on, it is notified of.
	sub.behind.Store(start <= sub.s.opts.Log.Committed())
	r, err := sub.readFrom(start)
	if err != nil {
		sub.s.broker.Unsubscribe(sub)
		return err
	}
	sub.reader = r
	return nil
}

// readFrom gives a reader of what it may hear, and of what else is committed. The VM's own
// stream has nothing that is still to be.
func (sub *Subscription) readFrom(seq uint64) (*eventlog.Reader, error) {
	log := sub.s.opts.Log
	if sub.own() && seq <= log.Committed() {
		return log.NewVMReader(sub.s.vm, seq)
	}
	return log.NewReader(seq), nil
}

// acknowledged takes in the guest's word that it has processed what it was
// sent. Numbers that it was never sent, or said before, are passed over.
func (s *Session) acknowledged(m *wire.Message) {
	name := string(m.Subscription)
	for _, sub := range s.subscriptions() {
		if sub.name == name && m.HasSeq && m.Seq >= sub.Started() && m.Seq <= sub.sent.Load() && m.Seq > sub.acked.Load() {
			sub.acked.Store(m.Seq)
			s.broker.Acknowledged(sub, m.Seq)
		}
	}
}
