package broker

import (
	"context"
	"errors"
	"strings"
	"sync"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/session"
	"github.com/castrabus/castra/internal/wire"
)

// presenceTopic is where the broker announces who comes and goes.
const presenceTopic = "castra.presence"

// Append commits a batch of a session's records.
func (b *Broker) Append(ctx context.Context, batch *eventlog.Batch) error {
	return b.events.Append(ctx, batch)
}

// AppendHere is Append by the goroutine that reads for the session, where that is free
// to, and the delivery to the one session that hears of it. Before the goroutine waits,
// for a disk or for that session's guest, heldUp is called with what became of the batch.
func (b *Broker) AppendHere(ctx context.Context, batch *eventlog.Batch, heldUp func(error)) error {
	led, err := b.events.AppendHere(ctx, batch, func() { heldUp(eventlog.ErrStalled) })
	if led {
		b.couriers.Help(func() { heldUp(nil) })
	}
	return err
}

// Publish stores a message of the host's and gives its number once it would
// survive a power cut. The error is a *bus.Error.
func (b *Broker) Publish(ctx context.Context, req bus.PublishRequest) (uint64, error) {
	payload, err := wire.Compact(req.Payload)
	switch {
	case !wire.ValidTopic(req.Topic):
		return 0, bus.Errorf(bus.CodeBadTopic, "%q is no topic: 1 to %d of A-Za-z0-9._:/-, and behind vm: a VM's name", req.Topic, wire.MaxTopic)
	case strings.HasPrefix(req.Topic, wire.BrokerPrefix):
		return 0, bus.Errorf(bus.CodeForbidden, "topics beginning castra. are published by castrad itself; choose another")
	case req.Reply != "" && !wire.ValidTopic(req.Reply):
		return 0, bus.Errorf(bus.CodeBadTopic, "reply %q is no topic", req.Reply)
	case req.ID != "" && !wire.ValidID(req.ID):
		return 0, bus.Errorf(bus.CodeInvalidArg, "an id takes 1 to %d bytes of UTF-8", wire.MaxID)
	case err != nil:
		return 0, bus.Errorf(bus.CodeInvalidArg, "the payload is not JSON as the bus takes it: %v", err)
	case len(payload) > wire.MaxPayload:
		return 0, bus.Errorf(bus.CodeTooLarge, "the payload takes %d bytes without white space, %d more than a message may", len(payload), len(payload)-wire.MaxPayload)
	}
	batch := &eventlog.Batch{Entries: []eventlog.Entry{{VM: bus.HostVM, Topic: []byte(req.Topic), Payload: payload}}}
	e := &batch.Entries[0]
	if req.ID != "" {
		e.ID = []byte(req.ID)
	}
	if req.Reply != "" {
		e.Reply = []byte(req.Reply)
	}
	if err := b.events.Append(ctx, batch); err != nil {
		return 0, session.Refuse(err)
	}
	if e.Err != nil {
		return 0, session.Refuse(e.Err)
	}
	return e.Seq, nil
}

// Acknowledged notes a guest's word that it has processed a delivery.
func (b *Broker) Acknowledged(sub *session.Subscription, seq uint64) {
	b.cursors.move(sub, seq)
	b.acks.wake()
}

// WaitAck waits until a guest has acknowledged the record seq and gives its
// name. The error is a *bus.Error; CodeNoAck when ctx ended first.
func (b *Broker) WaitAck(ctx context.Context, seq uint64) (string, error) {
	topic, err := b.topicOf(seq)
	if err != nil {
		return "", err
	}
	woken, leave := b.acks.join()
	defer leave()
	for {
		if vm, ok := b.acked.find(topic, seq); ok {
			return vm, nil
		}
		subs := b.topics.subscribers(topic)
		for _, sub := range subs {
			if sub.Started() <= seq && sub.Acked() >= seq {
				return sub.Session().VM(), nil
			}
		}
		select {
		case <-woken:
		case <-ctx.Done():
			if len(subs) == 0 {
				return "", bus.Errorf(bus.CodeNoAck, "nobody is subscribed to %s; record %d is stored", topic, seq)
			}
			return "", bus.Errorf(bus.CodeNoAck, "no subscriber of %s has acknowledged record %d in time; it is stored", topic, seq)
		case <-b.ctx.Done():
			return "", bus.Errorf(bus.CodeShuttingDown, "castrad is ending; record %d is stored", seq)
		}
	}
}

// topicOf reads a record's topic.
func (b *Broker) topicOf(seq uint64) (string, error) {
	r := b.events.NewReader(seq)
	defer r.Close()
	var rec eventlog.Record
	ok, err := r.Next(&rec)
	var gap *eventlog.Gap
	if errors.As(err, &gap) || err == nil && (!ok || rec.Seq != seq) {
		return "", bus.Errorf(bus.CodeInvalidArg, "there is no record %d", seq)
	}
	if err != nil {
		return "", bus.Errorf(bus.CodeInternal, "reading record %d: %v", seq, err)
	}
	return string(rec.Topic), nil
}

// ackMemory remembers how far those had acknowledged who are subscribed no
// longer: who asks for an ack may ask a moment too late.
type ackMemory struct {
	mu   sync.Mutex
	past []pastAck // oldest first, at most ackMemorySize
}

const ackMemorySize = 256

type pastAck struct {
	vm         string
	pattern    wire.Pattern
	start, end uint64
}

// note remembers a subscription that ends.
func (m *ackMemory) note(sub *session.Subscription) {
	if sub.Acked() == 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.past = append(m.past, pastAck{sub.Session().VM(), sub.Pattern(), sub.Started(), sub.Acked()})
	m.past = m.past[max(0, len(m.past)-ackMemorySize):]
}

// find gives who had acknowledged the record seq on topic.
func (m *ackMemory) find(topic string, seq uint64) (vm string, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range m.past {
		if p.start <= seq && seq <= p.end && p.pattern.Match(topic) {
			return p.vm, true
		}
	}
	return "", false
}
