package broker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/backoff"
	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/logging"
	"github.com/castrabus/castra/internal/presence"
	"github.com/castrabus/castra/internal/session"
	"github.com/castrabus/castra/internal/wire"
)

// Decide judges a hello (contract 2). Nothing that it refuses leaves a trace
// beyond the record of the refusal.
func (b *Broker) Decide(h wire.Hello) session.Decision {
	refuse := func(reason string) session.Decision { return session.Decision{Refuse: reason} }
	accept := b.settings.Load().AcceptUnknown
	switch {
	case h.HasVM && wire.Reserved(h.VM):
		return refuse(wire.ReasonReservedIdentity)
	case h.HasVM && !wire.ValidName(h.VM):
		return refuse(wire.ReasonInvalidName)
	case h.Has(wire.CapHostBus):
		return refuse(wire.ReasonForbidden)
	case !h.HasVM && !accept:
		return refuse(wire.ReasonUnknownVM)
	case !h.HasVM && h.Has(wire.CapBus):
		return refuse(wire.ReasonInvalidName) // a session needs a name
	case !h.HasVM:
		return session.Decision{}
	}
	e, registered := b.opts.Registry.Lookup(h.VM)
	switch {
	case !registered && !accept:
		return refuse(wire.ReasonUnknownVM)
	case !registered || e.Key == nil:
		return session.Decision{}
	case !h.Has(wire.CapAuth) || h.Nonce == "":
		return refuse(wire.ReasonAuthRequired)
	default:
		return session.Decision{Key: e.Key}
	}
}

// Attend notes a handshake-only guest.
func (b *Broker) Attend(ctx context.Context, h wire.Hello, remote string) session.Decision {
	if !h.HasVM {
		return session.Decision{}
	}
	if d := b.pace(ctx, h.VM); d.Refuse != "" {
		return d
	}
	attended := b.table.Attend(h.VM, remote, h.Capabilities())
	b.tellForgotten()
	if !attended {
		return session.Decision{Refuse: wire.ReasonTooManyVMs}
	}
	b.records.handshake(h.VM)
	return session.Decision{}
}

// pace lets a guest that may have the name it asks for wait until its VM's share of
// handshakes allows it: one guest must not fill the presence history and the event
// files alone. Only who has proved the name comes so far, so nobody can use up the
// share of a VM that has a key.
func (b *Broker) pace(ctx context.Context, vm string) session.Decision {
	s := b.settings.Load()
	if s.HandshakeRate.Records <= 0 {
		return session.Decision{}
	}
	wait, ok := b.table.Pace(vm, s.HandshakeRate, s.HandshakeTimeout/2)
	if !ok {
		b.bite(limitHandshakeRate, vm, "", session.TroubleRateLimited, session.ActionReject, "this VM connects too often")
		return session.Decision{Refuse: wire.ReasonRateLimited}
	}
	return waited(ctx, wait)
}

// waited waits. Who could not be told any more that he is let in is not.
func waited(ctx context.Context, wait time.Duration) session.Decision {
	if wait > 0 {
		backoff.Sleep(ctx, wait)
	}
	if ctx.Err() != nil {
		return session.Decision{Refuse: wire.ReasonReadTimeout}
	}
	return session.Decision{}
}

// contend slows down those who replace each other's sessions under one name.
func (b *Broker) contend(ctx context.Context, s *session.Session) session.Decision {
	old, ok := b.table.SessionOf(s.VM()).(*session.Session)
	if !ok || old.Left() {
		return session.Decision{}
	}
	wait, ok, begun := b.table.Contend(s.VM(), b.settings.Load().HandshakeTimeout/2)
	if begun {
		b.entry(s).WithField("other", old.Remote()).
			Warn("two guests with this VM's identity keep replacing each other, as clones do; they are slowed down: give each a name and key of its own")
		b.trouble(s.VM(), s.Token(), session.TroubleSuperseded, session.ActionThrottle,
			fmt.Sprintf("contended: %s and %s keep replacing each other", old.Remote(), s.Remote()))
	}
	if !ok {
		return session.Decision{Refuse: wire.ReasonRateLimited}
	}
	return waited(ctx, wait)
}

// Admit makes s the session of its VM. An older one of the same VM is ended; it
// was entitled to the name by the same means. The guest is judged once more,
// together with its entry into the table: a name removed or a key replaced during
// the handshake lets nobody in, and one replaced later finds the session.
func (b *Broker) Admit(ctx context.Context, s *session.Session, h wire.Hello, proven []byte) (session.Guest, session.Decision) {
	d := b.pace(ctx, h.VM)
	if d.Refuse == "" {
		d = b.contend(ctx, s)
	}
	if d.Refuse != "" {
		return nil, d
	}
	caps := h.Capabilities()
	if b.enter(ctx, h.VM) != nil {
		return nil, session.Decision{Refuse: wire.ReasonReadTimeout}
	}
	d = b.Decide(h)
	if d.Refuse == "" && !bytes.Equal(d.Key, proven) {
		d.Refuse = wire.ReasonAuthFailed
	}
	if d.Refuse != "" {
		b.admission.RUnlock()
		return nil, d
	}
	displaced := b.table.MakeWay(h.VM)
	v, old, err := b.table.Connect(h.VM, s, s.Remote(), caps)
	b.admission.RUnlock()
	b.tellForgotten()
	if o, isSession := displaced.(*session.Session); isSession {
		o.End(session.TroubleQueueFull, "limits.max_sessions is reached, and a registered VM goes before one that is not")
		b.bite(limitSessions, o.VM(), o.Token(), session.TroubleQueueFull, session.ActionDisconnect, "its session made way for "+h.VM)
		b.records.handshake(o.VM()) // its subscriptions have ended, and Release finds no session of it
	}
	switch {
	case errors.Is(err, presence.ErrTooManySessions):
		b.bite(limitSessions, h.VM, "", session.TroubleQueueFull, session.ActionReject, "too many sessions")
		return nil, session.Decision{Refuse: wire.ReasonTooManySessions}
	case err != nil:
		return nil, session.Decision{Refuse: wire.ReasonTooManyVMs}
	}
	if b.ctx.Err() != nil { // Close has looked through the table, or is about to
		s.End(session.TroubleShutdown, ending)
	}
	if o, isSession := old.(*session.Session); isSession {
		o.End(session.TroubleSuperseded, "a newer session of this VM replaced this one")
	}
	if b.shares.take(noteGranted, s.VM(), b.registered(s.VM()), s.Remote(), "") {
		b.records.event(handshakeEvent(s.VM(), caps, "granted", "", s.Remote(), 0))
	}
	b.records.handshake(h.VM)
	logging.GuestConnected.On(b.entry(s)).Info("guest connected")
	return &account{VM: v, broker: b, key: proven}, session.Decision{}
}

// tellForgotten tells of names that made room for others.
func (b *Broker) tellForgotten() {
	for _, vm := range b.table.TakeForgotten() {
		b.bite(limitVMs, vm, "", session.TroubleQueueFull, session.ActionReject, "too many names that nobody registered, the one heard of longest ago is forgotten")
	}
}

func (b *Broker) registered(vm string) bool {
	_, ok := b.opts.Registry.Lookup(vm)
	return ok
}

// Release notes the end of a session.
func (b *Broker) Release(s *session.Session, end session.End) {
	b.parking.stopped(s, false)
	if a, ok := s.Account().(*account); ok && b.table.Disconnect(a.VM, s) {
		b.records.handshake(s.VM()) // its subscriptions have ended
	}
	e := logging.GuestDisconnected.On(b.entry(s))
	switch end.Reason {
	case "", session.TroubleShutdown:
		e.Info("guest disconnected")
		return
	case session.TroubleRevoked, session.TroubleQueueFull:
		e.Infof("guest disconnected: %s", end.Detail)
		return
	case session.TroubleSuperseded:
		logging.GuestSuperseded.On(e).WithField("reason", end.Reason).Info("guest connected anew; its older session is closed")
	default:
		e.WithField("reason", end.Reason).Warnf("guest disconnected: %s", end.Detail)
	}
	b.trouble(s.VM(), s.Token(), end.Reason, session.ActionDisconnect, end.Detail)
	if end.Reason == session.TroubleSlowConsumer {
		b.limited.hit(limitUnsent)
		b.tellLimit(limitUnsent, s.VM(), end.Detail)
	}
}

// Refused records a handshake that granted nothing, and lets its answer wait where
// there are too many.
func (b *Broker) Refused(r session.Refusal) {
	b.noteRefused(r)
	if r.Reason != wire.ReasonMissingCapability && r.Reason != wire.ReasonIOError {
		b.tarpit(b.ctx)
	}
}

func (b *Broker) noteRefused(r session.Refusal) {
	vm := r.VM
	if vm == "" {
		vm = r.Remote
	}
	known := r.VM != "" && b.registered(r.VM)
	reason := r.Reason
	switch reason {
	case wire.ReasonTooManyVMs:
		b.bite(limitVMs, vm, "", session.TroubleQueueFull, session.ActionReject, "too many names that nobody registered")
		fallthrough
	case wire.ReasonTooManySessions, wire.ReasonRateLimited:
		reason = wire.ReasonForbidden // the file's reasons are a closed list
	}
	if b.shares.take(noteRefused, vm, known, r.Remote, reason) {
		b.records.event(handshakeEvent(vm, r.Capabilities, r.Outcome, reason, r.Remote, 0))
	}
	if r.VM == "" || r.Reason == wire.ReasonMissingCapability {
		return
	}
	b.table.Refuse(r.VM, r.Reason, slices.Contains(r.Capabilities, wire.CapAuth))
	if b.shares.take(noteLog, r.VM, known, r.Remote, r.Reason) {
		logging.GuestRefused.On(b.log).WithFields(logrus.Fields{"vm": r.VM, "reason": r.Reason, "remote": r.Remote}).
			Warn("guest refused; castractl status shows how to let it in")
	}
}

// Trouble records what befell a session.
func (b *Broker) Trouble(s *session.Session, reason, action, detail string) {
	switch reason {
	case session.TroubleRateLimited: // counted where each is refused
		b.tellLimit(limitPublish, s.VM(), detail)
	case session.TroubleSlowConsumer:
		b.limited.hit(limitUnsent)
		b.tellLimit(limitUnsent, s.VM(), detail)
	case session.TroubleQueueFull:
		b.limited.hit(limitSubscriptions)
		b.tellLimit(limitSubscriptions, s.VM(), detail)
	}
	b.trouble(s.VM(), s.Token(), reason, action, detail)
}

// trouble writes a line of bus-events.jsonl, as far as the VM's share allows.
func (b *Broker) trouble(vm, token, reason, action, detail string) {
	if b.shares.take(noteTrouble, vm, b.registered(vm), vm, reason) {
		b.records.event(busEvent(vm, token, reason, action, detail, 0))
	}
}

func (b *Broker) entry(s *session.Session) *logrus.Entry {
	return b.log.WithFields(logrus.Fields{"vm": s.VM(), "session": s.Token(), "remote": s.Remote()})
}

// Subscribed notes what s is subscribed to now.
func (b *Broker) Subscribed(s *session.Session, topics []string) {
	if a, ok := s.Account().(*account); ok {
		b.table.Subscribed(a.VM, s, topics)
		b.records.handshake(s.VM())
	}
}

// Visible gives what the guest vm may hear: what the host publishes, what
// anybody publishes on the topics that guests share, and its own topic.
func (b *Broker) Visible(vm string) func(*eventlog.Record) bool {
	return func(rec *eventlog.Record) bool {
		if b.audible(rec) {
			return true
		}
		owner, ok := wire.TopicVM(rec.Topic)
		return ok && string(owner) == vm
	}
}

// account is a VM's share of the broker.
type account struct {
	*presence.VM
	broker *Broker
	key    []byte // what the session has proved to hold; nil: nothing
}

// leastFrames is how many frames a second any guest may send, whatever they are: a
// hundredth of what a processor can take in.
const leastFrames = 10_000

// Spend takes n frames off what the VM may make the broker look at: a multiple of
// what it may publish, for it has to be told what is refused.
func (a *account) Spend(n int) time.Duration {
	r := a.broker.settings.Load().Rate
	rate := max(leastFrames, 4*r.Records, 4*r.Bytes/1024)
	return a.Frames.Spend(presence.Rate{Records: rate, Burst: rate, Bytes: 1}, n, time.Now())
}

// Allow takes a record off the VM's share of the broker.
func (a *account) Allow(n int, now time.Time) time.Duration {
	wait := a.Limit.Take(a.broker.settings.Load().Rate, n, now)
	if wait > 0 {
		a.Limited()
		a.broker.limited.hit(limitPublish)
	}
	return wait
}
