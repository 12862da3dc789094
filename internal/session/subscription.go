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

	// brokerPrefix begins the topics that only the broker publishes on and
	// only the host hears.
	brokerPrefix = "castra."

	// scanLimit is how many records a subscription looks at in one turn: one
	// that catches up through much that is not for it must let acks through.
	scanLimit = 4096
)

func brokersOwn(topic []byte) bool { return bytes.HasPrefix(topic, []byte(brokerPrefix)) }

// Subscription is a cursor into the log: what one session hears on one topic or
// pattern. It costs the same however far it is behind.
type Subscription struct {
	s       *Session
	name    string
	topic   string
	pattern wire.Pattern
	cursor  string // durable position; "": none
	start   uint64 // the first record that it may hear; set before the broker knows it
	prefix  []byte // what each delivery begins with
	visible func(*eventlog.Record) bool

	// Of whoever holds the session's token:
	reader *eventlog.Reader

	// position is the newest record passed; hint the oldest one committed since
	// that matches, 0 if there is none; behind tells that there may be older
	// ones still to be looked at.
	position atomic.Uint64
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
func (sub *Subscription) Started() uint64 { return sub.start }

// Notify tells that the record seq matches. Call it in the order of seq. Where
// it gives true the session is to be woken; otherwise it is about to look.
func (sub *Subscription) Notify(seq uint64) bool { return sub.hint.CompareAndSwap(0, seq) }

func (sub *Subscription) lag(committed uint64) uint64 {
	if pos := sub.position.Load(); pos < committed && (sub.behind.Load() || sub.hint.Load() != 0) {
		return committed - pos
	}
	return 0
}

// fill appends deliveries to out. Call with the session's token.
func (sub *Subscription) fill(out []byte) (_ []byte, more bool, err error) {
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
	var rec eventlog.Record
	for range scanLimit {
		if len(out) >= deliverySize {
			return out, true, nil
		}
		ok, err := sub.reader.Next(&rec)
		var gap *eventlog.Gap
		switch {
		case errors.As(err, &gap):
			out = wire.AppendGapFrame(out, sub.name, gap.From, gap.To)
			sub.position.Store(gap.To)
			continue
		case err != nil:
			return out, false, fmt.Errorf("reading for subscription %s: %w", sub.name, err)
		case !ok:
			sub.behind.Store(false)
			return out, false, nil
		}
		sub.position.Store(rec.Seq)
		if sub.hears(&rec) {
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
	from                wire.From
}

func (s *Session) copyRequest(m *wire.Message) request {
	r := request{
		subscribe: m.Type == wire.TypeSubscribe,
		topic:     string(m.Topic), hasTopic: m.Topic != nil,
		cursor: string(m.Cursor), from: m.From,
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
	a := wire.Ack{Kind: "unsubscribe", Topic: []byte(r.topic), Subscription: []byte(r.name)}
	if !r.hasTopic {
		a.Topic = nil
	}
	var sub *Subscription
	var err error
	if r.subscribe {
		a.Kind = "subscribe"
		sub, err = s.prepare(r)
	} else if r.name == "" {
		err = bus.Errorf(bus.CodeBadFrame, "an unsubscribe names a subscription or a topic")
	}
	if err != nil {
		refuse(&a, err)
		return s.write(wire.AppendAckFrame(nil, &a))
	}
	s.writer <- struct{}{}
	defer func() { <-s.writer }()
	s.replace(r.name, sub)
	if err := s.send(wire.AppendAckFrame(nil, &a)); err != nil {
		return err
	}
	if sub != nil {
		s.Wake()
	}
	return nil
}

// replace removes the subscription called name and puts sub, if not nil, in
// its place. Call with the token.
func (s *Session) replace(name string, sub *Subscription) {
	subs := slices.Clone(s.subscriptions())
	if i := slices.IndexFunc(subs, func(o *Subscription) bool { return o.name == name }); i >= 0 {
		s.broker.Unsubscribe(subs[i])
		subs[i].reader.Close()
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
	pattern, err := wire.ParsePattern(r.topic)
	if err != nil {
		return nil, bus.Errorf(bus.CodeBadTopic, "%v", err)
	}
	if owner, owned := pattern.VM(); owned && owner != s.vm {
		return nil, bus.Errorf(bus.CodeForbidden, "topic %s belongs to another VM", r.topic)
	}
	if strings.HasPrefix(r.topic, brokerPrefix) {
		return nil, bus.Errorf(bus.CodeForbidden, "topics beginning %s are heard by the host alone", brokerPrefix)
	}
	held := s.subscriptions()
	known := slices.ContainsFunc(held, func(o *Subscription) bool { return o.name == r.name })
	if !known && len(held) >= s.opts.MaxSubscriptions {
		return nil, bus.Errorf(bus.CodeTooManySubscriptions, "a session may have %d subscriptions; unsubscribe from one first", s.opts.MaxSubscriptions)
	}
	sub := &Subscription{s: s, name: r.name, topic: r.topic, pattern: pattern, cursor: r.cursor}
	sub.visible = s.broker.Visible(s.vm)
	sub.prefix = append(wire.AppendString([]byte(`{"type":"publish","subscription":`), r.name), ',')
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
		if start = log.Oldest(); sub.own() {
			start, err = log.OldestOf(vm)
		}
	case wire.FromSeq:
		start = max(1, from.N)
	case wire.FromLast:
		if sub.own() {
			start, err = log.LastMatchingOf(vm, from.N, sub.hears)
		} else {
			start, err = log.LastMatching(from.N, sub.hears)
		}
	case wire.FromTime:
		start, err = log.FirstSince(from.Time)
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

func (sub *Subscription) open(start uint64) error {
	log := sub.s.opts.Log
	sub.start = start
	sub.position.Store(start - 1)
	sub.behind.Store(true)
	sub.reader = log.NewReader(start)
	if sub.own() && start <= log.Committed() {
		r, err := log.NewVMReader(sub.s.vm, start)
		if err != nil {
			sub.s.broker.Unsubscribe(sub)
			return err
		}
		sub.reader = r
	}
	return nil
}

// acknowledged takes in the guest's word that it has processed what it was
// sent. Numbers that it was never sent, or said before, are passed over.
func (s *Session) acknowledged(m *wire.Message) {
	name := string(m.Subscription)
	for _, sub := range s.subscriptions() {
		if sub.name == name && m.HasSeq && m.Seq >= sub.start && m.Seq <= sub.position.Load() && m.Seq > sub.acked.Load() {
			sub.acked.Store(m.Seq)
			s.broker.Acknowledged(sub, m.Seq)
		}
	}
}

// refuse makes a the refusal of a frame. The wire has no word for an end or a
// fault of castrad's own; storage-stalled says what the guest needs to know:
// that it is open whether the record was stored, and to retry.
func refuse(a *wire.Ack, err error) {
	r := Refuse(err)
	if r.Code == bus.CodeInternal || r.Code == bus.CodeShuttingDown {
		r.Code, r.RetryAfter = bus.CodeStorageStalled, time.Second
	}
	a.Code, a.Reason, a.RetryAfterMS = string(r.Code), r.Reason, r.RetryAfter.Milliseconds()
}

// Refuse gives the refusal that a caller is to see for an error of the broker
// or of the log. The error is new: the caller may change it.
func Refuse(err error) *bus.Error {
	var refusal *bus.Error
	var write *eventlog.WriteError
	switch {
	case errors.As(err, &refusal):
		own := *refusal
		return &own
	case errors.Is(err, eventlog.ErrStalled):
		refusal = bus.Errorf(bus.CodeStorageStalled, "the host's disk does not answer; retry with the same id")
		refusal.RetryAfter = 5 * time.Second
	case errors.As(err, &write) && write.Full:
		refusal = bus.Errorf(bus.CodeStorageFull, "the host's disk is full; nothing was stored")
		refusal.RetryAfter = time.Second
	case errors.As(err, &write):
		refusal = bus.Errorf(bus.CodeStorageFull, "the host cannot write its log (%v); nothing was stored", write.Err)
		refusal.RetryAfter = time.Second
	case errors.Is(err, eventlog.ErrClosed):
		refusal = bus.Errorf(bus.CodeShuttingDown, "castrad is ending; retry when it is back")
		refusal.RetryAfter = time.Second
	default:
		refusal = bus.Errorf(bus.CodeInternal, "%v", err)
	}
	return refusal
}

// ackKind is the word that an answer to m carries.
func ackKind(m *wire.Message) string {
	switch m.Type {
	case wire.TypePublish:
		return "publish"
	case wire.TypeSubscribe:
		return "subscribe"
	case wire.TypeUnsubscribe:
		return "unsubscribe"
	case wire.TypeHeartbeat:
		return "heartbeat"
	case wire.TypeAck:
		return "ack"
	default:
		return clip(m.TypeName)
	}
}

// clip keeps what a guest sent short enough for a message.
func clip(b []byte) string {
	const most = 64
	if len(b) > most {
		return strings.ToValidUTF8(string(b[:most]), "") + "…"
	}
	return string(b)
}

// noteLimited records a refusal for the rate, at most one a second.
func (s *Session) noteLimited() {
	if now := time.Now(); now.Sub(s.limitedAt) >= time.Second {
		s.limitedAt = now
		s.broker.Trouble(s, TroubleRateLimited, ActionThrottle, "publish_rate, publish_burst or publish_bytes exceeded")
	}
}
