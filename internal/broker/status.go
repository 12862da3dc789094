package broker

import (
	"context"
	"os"
	"slices"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/logging"
	"github.com/castrabus/castra/internal/session"
)

// Status describes the broker and the named VMs, or all of them if names is
// empty. It waits for no guest and no disk.
func (b *Broker) Status(names []string) bus.Status {
	sessions, reachable := b.Counts()
	settings := b.settings.Load()
	s := bus.Status{
		Broker: bus.Broker{
			Kind: "host", Version: b.opts.Version, State: b.State(), Faults: b.health.list(), PID: os.Getpid(),
			UptimeMS: time.Since(b.began).Milliseconds(),
			Listen:   b.Addresses(), LogDir: b.opts.LogDir, StateDir: b.opts.StateDir,
			UnknownVMs: "reject", Sync: b.opts.SyncName,
			HeadSeq:  b.events.Committed(),
			Sessions: sessions, Reachable: reachable, Registered: b.opts.Registry.Len(),
			Limited: b.limited.snapshot(),
		},
		VMs:     b.describe(names),
		Refused: b.table.Refused(),
	}
	if settings.AcceptUnknown {
		s.Broker.UnknownVMs = "accept"
	}
	if s.Broker.HeadSeq > 0 {
		s.Broker.OldestSeq = b.events.Oldest()
	}
	return s
}

// State says in a few words how the broker is.
func (b *Broker) State() string {
	switch why := b.health.word(); {
	case b.ctx.Err() != nil:
		return "stopping"
	case why != "":
		return "degraded: " + why
	default:
		return "running"
	}
}

// Addresses lists the listeners' addresses.
func (b *Broker) Addresses() []string {
	out := []string{}
	for _, l := range b.listening() {
		out = append(out, l.Addr().String())
	}
	return out
}

// describe joins what presence and registry know of VMs.
func (b *Broker) describe(names []string) []bus.VM {
	vms := b.table.Snapshot(names)
	for i := range vms {
		e, ok := b.opts.Registry.Lookup(vms[i].VM)
		vms[i].Registered, vms[i].Keyed = ok, ok && e.Key != nil
		if len(e.Forwards) > 0 {
			vms[i].Forwards = slices.Clone(e.Forwards)
		}
	}
	return vms
}

// AddVM registers a VM; see [identity.Registry.Add].
func (b *Broker) AddVM(_ context.Context, req bus.AddVMRequest) (created bool, key []byte, err error) {
	created, key, err = b.opts.Registry.Add(req)
	if err == nil && created {
		b.table.Know(req.Name)
		b.table.Admitted(req.Name)
		if key != nil { // who was let in as a stranger does not have it
			b.admission.Lock()
			b.endSession(req.Name, "the VM has a key now")
			b.admission.Unlock()
		}
		logging.VMAdded.On(b.log).WithField("vm", req.Name).Info("VM registered")
	}
	return created, key, err
}

// RemoveVM forgets a VM and ends its session.
func (b *Broker) RemoveVM(_ context.Context, name string) error {
	if err := b.opts.Registry.Remove(name); err != nil {
		return err
	}
	b.admission.Lock()
	b.endSession(name, "the VM was removed from the registry")
	if _, again := b.opts.Registry.Lookup(name); !again {
		b.table.Forget(name)
	}
	b.admission.Unlock()
	logging.VMRemoved.On(b.log).WithField("vm", name).Info("VM removed")
	return nil
}

// RekeyVM gives a VM a new key. A session made with the old one ends.
func (b *Broker) RekeyVM(_ context.Context, name string) (key []byte, err error) {
	if key, err = b.opts.Registry.Rekey(name); err != nil {
		return nil, err
	}
	b.admission.Lock()
	b.endSession(name, "the VM has a new key")
	b.admission.Unlock()
	logging.VMRekeyed.On(b.log).WithField("vm", name).Info("VM has a new key")
	return key, nil
}

func (b *Broker) endSession(name, why string) {
	if s, ok := b.table.SessionOf(name).(interface{ End(reason, detail string) }); ok {
		s.End(session.TroubleRevoked, why)
	}
}

// Counts tells how many VMs have a session and how many are reachable.
func (b *Broker) Counts() (sessions, reachable int) { return b.table.Counts() }
