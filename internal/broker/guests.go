package broker

import (
	"time"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/presence"
	"github.com/castrabus/castra/internal/session"
	"github.com/castrabus/castra/internal/wire"
)

// Decide judges a hello (contract 2). Nothing that it refuses leaves a trace
// beyond the record of the refusal.
func (b *Broker) Decide(h wire.Hello, _ string) session.Decision {
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
func (b *Broker) Attend(h wire.Hello, remote string) session.Decision {
	if !h.HasVM {
		return session.Decision{}
	}
	if !b.table.Attend(h.VM, remote, h.Capabilities()) {
		return session.Decision{Refuse: reasonTooManyVMs}
	}
	b.table.Admitted(h.VM)
	b.records.handshake(h.VM)
	return session.Decision{}
}

// Refusals beyond the contract's list: limits that only a misuse reaches.
const (
	reasonTooManyVMs      = "too-many-vms"
	reasonTooManySessions = "too-many-sessions"
)

// Admit makes s the session of its VM. An older one of the same VM is ended; it
// was entitled to the name by the same means.
func (b *Broker) Admit(s *session.Session, h wire.Hello) (session.Guest, session.Decision) {
	if n := b.sessions.Add(1); n > int64(b.settings.Load().MaxSessions) {
		b.sessions.Add(-1)
		return nil, session.Decision{Refuse: reasonTooManySessions}
	}
	caps := h.Capabilities()
	v, old, ok := b.table.Connect(h.VM, s, s.Remote(), caps)
	if !ok {
		b.sessions.Add(-1)
		return nil, session.Decision{Refuse: reasonTooManyVMs}
	}
	if o, isSession := old.(*session.Session); isSession {
		o.End(session.TroubleSuperseded, "a newer session of this VM replaced this one")
	}
	b.table.Admitted(h.VM)
	b.records.event(handshakeEvent(s.VM(), caps, "granted", "", s.Remote()))
	b.records.handshake(h.VM)
	b.entry(s).Info("guest connected")
	return &account{VM: v, broker: b}, session.Decision{}
}

// Release notes the end of a session.
func (b *Broker) Release(s *session.Session, end session.End) {
	b.sessions.Add(-1)
	if a, ok := s.Account().(*account); ok {
		b.table.Disconnect(a.VM, s)
	}
	e := b.entry(s)
	switch end.Reason {
	case "", session.TroubleShutdown:
		e.Info("guest disconnected")
		return
	case session.TroubleRevoked:
		e.Infof("guest disconnected: %s", end.Detail)
		return
	case session.TroubleSuperseded:
		e.WithField("reason", end.Reason).Info("guest connected anew; its older session is closed")
	default:
		e.WithField("reason", end.Reason).Warnf("guest disconnected: %s", end.Detail)
	}
	b.Trouble(s, end.Reason, session.ActionDisconnect, end.Detail)
}

// Refused records a handshake that granted nothing.
func (b *Broker) Refused(r session.Refusal) {
	vm := r.VM
	if vm == "" {
		vm = r.Remote
	}
	b.records.event(handshakeEvent(vm, r.Capabilities, r.Outcome, r.Reason, r.Remote))
	if r.VM == "" || r.Reason == wire.ReasonMissingCapability {
		return
	}
	b.table.Refuse(r.VM, r.Reason)
	b.log.WithFields(logrus.Fields{"vm": r.VM, "reason": r.Reason, "remote": r.Remote}).
		Warn("guest refused; castractl status shows how to let it in")
}

// Trouble records what befell a session.
func (b *Broker) Trouble(s *session.Session, reason, action, detail string) {
	b.records.event(busEvent(s.VM(), s.Token(), reason, action, detail))
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
		owner, ok := wire.TopicVM(string(rec.Topic))
		return ok && owner == vm
	}
}

// account is a VM's share of the broker.
type account struct {
	*presence.VM
	broker *Broker
}

// Allow takes a record off the VM's share of the broker.
func (a *account) Allow(n int) time.Duration {
	wait := a.Limit.Take(a.broker.settings.Load().Rate, n, time.Now())
	if wait > 0 {
		a.Limited()
	}
	return wait
}
