package broker

import (
	"bytes"
	"context"
	"errors"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/eventlog"
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

// pace is how often a VM may connect: often enough for any restart, seldom enough
// that one guest cannot fill the presence history and the event files alone.
var pace = presence.Rate{Records: 10, Burst: 100, Bytes: 1}

// Admit makes s the session of its VM. An older one of the same VM is ended; it
// was entitled to the name by the same means. The guest is judged once more,
// together with its entry into the table: a name removed or a key replaced during
// the handshake lets nobody in, and one replaced later finds the session.
func (b *Broker) Admit(ctx context.Context, s *session.Session, h wire.Hello, proven []byte) (session.Guest, session.Decision) {
	if wait := b.table.Pace(h.VM, pace); wait > 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
		}
	}
	caps := h.Capabilities()
	b.admission.RLock()
	d := b.Decide(h)
	if d.Refuse == "" && !bytes.Equal(d.Key, proven) {
		d.Refuse = wire.ReasonAuthFailed
	}
	if d.Refuse != "" {
		b.admission.RUnlock()
		return nil, d
	}
	v, old, err := b.table.Connect(h.VM, s, s.Remote(), caps)
	b.admission.RUnlock()
	switch {
	case errors.Is(err, presence.ErrTooManySessions):
		return nil, session.Decision{Refuse: reasonTooManySessions}
	case err != nil:
		return nil, session.Decision{Refuse: reasonTooManyVMs}
	}
	if o, isSession := old.(*session.Session); isSession {
		o.End(session.TroubleSuperseded, "a newer session of this VM replaced this one")
	}
	b.table.Admitted(h.VM)
	b.records.event(handshakeEvent(s.VM(), caps, "granted", "", s.Remote()))
	b.records.handshake(h.VM)
	b.entry(s).Info("guest connected")
	return &account{VM: v, broker: b, key: proven}, session.Decision{}
}

// Release notes the end of a session.
func (b *Broker) Release(s *session.Session, end session.End) {
	b.parking.stopped(s, false)
	if a, ok := s.Account().(*account); ok && b.table.Disconnect(a.VM, s) {
		b.records.handshake(s.VM()) // its subscriptions have ended
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
	reason := r.Reason
	if reason == reasonTooManyVMs || reason == reasonTooManySessions {
		reason = wire.ReasonForbidden // the file's reasons are a closed list
	}
	b.records.event(handshakeEvent(vm, r.Capabilities, r.Outcome, reason, r.Remote))
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
	key    []byte // what the session has proved to hold; nil: nothing
}

// Allow takes a record off the VM's share of the broker.
func (a *account) Allow(n int) time.Duration {
	wait := a.Limit.Take(a.broker.settings.Load().Rate, n, time.Now())
	if wait > 0 {
		a.Limited()
	}
	return wait
}
