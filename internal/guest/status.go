package guest

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/castrabus/castra/internal/backoff"
	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/token"
)

// Summary says in one line how things stand.
func (a *Agent) Summary() string {
	link, c := a.uplink.snapshot(), a.outbox.counts()
	text := link.describe(a.id.name)
	if a.stopping.Load() {
		text = "stopping; " + text
	}
	if c.records > 0 {
		text += fmt.Sprintf(", %d spooled", c.records)
	}
	if why := a.spoolReason(&c); why != "" && a.opts.SpoolDir != "" {
		text += "; the spool: " + why
	}
	return text
}

// spoolReason says why what is published while the host is away is not kept on
// disk; empty: it is.
func (a *Agent) spoolReason(c *counts) string {
	switch {
	case a.memory != "":
		return "in memory: " + a.memory
	case c.trouble != "":
		return c.trouble
	default:
		return ""
	}
}

// Status describes this agent and its own VM, if that is among those asked for.
func (a *Agent) Status(vms []string) bus.Status {
	link, c := a.uplink.snapshot(), a.outbox.counts()
	st := bus.Status{
		Broker: bus.Broker{
			Kind:       "guest",
			Version:    a.opts.Version,
			State:      "connecting",
			Faults:     []bus.Fault{},
			PID:        os.Getpid(),
			UptimeMS:   time.Since(a.started).Milliseconds(),
			Listen:     []string{link.address},
			HeadSeq:    a.head.Load(),
			SpoolCount: c.records,
			SpoolBytes: c.bytes,

			SpoolDurable: &c.durable,
			SpoolReason:  a.spoolReason(&c),
		},
		VMs:     []bus.VM{},
		Refused: []bus.Refused{},
	}
	b := &st.Broker
	r := link.refused()
	switch {
	case link.token != "":
		b.State, b.ConnectedTo = "running", link.address
		b.Sessions, b.Reachable = 1, 1
	case r != nil:
		b.State = r.Error()
		st.Refused = append(st.Refused, bus.Refused{VM: a.id.name, Reason: r.reason, HasKey: r.hasKey, AgeMS: time.Since(link.failed).Milliseconds()})
	}
	if a.stopping.Load() {
		b.State = "stopping"
	}
	if len(vms) == 0 || slices.Contains(vms, a.id.name) {
		st.VMs = append(st.VMs, a.vm(&link, &c))
	}
	return st
}

// vm describes the VM that this is. Whether the host has registered it is known
// only where it has proven so.
func (a *Agent) vm(link *linkState, c *counts) bus.VM {
	topics := a.subs.topics()
	vm := bus.VM{
		VM:                 a.id.name,
		State:              bus.StateUnreachable,
		Reason:             "disconnected",
		Keyed:              a.id.key != nil,
		LastHandshakeAgeMS: age(link.handshake),
		LastPublishAgeMS:   age(c.lastPublish),
		LastHeartbeatAgeMS: age(link.heartbeat),
		BusSubscribed:      len(topics) > 0,
		Subscriptions:      topics,
		Capabilities:       a.id.list(),
		Published:          c.published,
		RateLimited:        c.limited,
		LastLimitedAgeMS:   age(c.lastLimited),
		Forwards:           []string{},
	}
	if r := link.refused(); r != nil {
		vm.Reason = r.reason
	}
	if link.token != "" {
		vm.State, vm.Reachable, vm.Reason = bus.StateReachable, true, ""
		vm.Session, vm.RemoteAddr, vm.Registered = link.token, link.local, vm.Keyed
	}
	return vm
}

func age(t time.Time) *int64 {
	if t.IsZero() {
		return nil
	}
	ms := time.Since(t).Milliseconds()
	return &ms
}

// noticeEvery bounds how often watchers are told, so that a busy publisher does not
// make each of its records a change of STATUS=.
const noticeEvery = 250 * time.Millisecond

// watchers are told of changes, by one goroutine.
type watchers struct {
	agent *Agent
	// dirty has room for one: several changes are told as one.
	dirty chan struct{}

	mu   sync.Mutex
	next int
	fns  map[int]*watcher
}

type watcher struct {
	call sync.Mutex // held while fn runs, so that cancel can wait for it
	fn   func(vm bus.VM, removed bool)
	gone bool // guarded by call
}

func (w *watchers) init(a *Agent) {
	w.agent, w.dirty, w.fns = a, make(chan struct{}, 1), make(map[int]*watcher)
}

// note says that something has changed. It does not wait.
func (w *watchers) note() { token.Leave(w.dirty) }

// run tells of changes until ctx is done.
func (w *watchers) run(ctx context.Context) {
	var summary string
	var shown bus.VM
	for {
		select {
		case <-w.dirty:
		case <-ctx.Done():
			return
		}
		a := w.agent
		if text := a.Summary(); text != summary {
			summary = text
			if a.opts.OnState != nil {
				a.opts.OnState()
			}
		}
		link, c := a.uplink.snapshot(), a.outbox.counts()
		if vm := a.vm(&link, &c); differs(&vm, &shown) {
			shown = vm
			w.tell(vm)
		}
		backoff.Sleep(ctx, noticeEvery)
	}
}

func (w *watchers) tell(vm bus.VM) {
	w.mu.Lock()
	all := make([]*watcher, 0, len(w.fns))
	for _, f := range w.fns {
		all = append(all, f)
	}
	w.mu.Unlock()
	for _, f := range all {
		f.run(vm)
	}
}

func (f *watcher) run(vm bus.VM) {
	f.call.Lock()
	defer f.call.Unlock()
	if !f.gone {
		f.fn(vm, false)
	}
}

// differs says whether a person would watch the change.
func differs(a, b *bus.VM) bool {
	return a.State != b.State || a.Session != b.Session || a.Registered != b.Registered || !slices.Equal(a.Subscriptions, b.Subscriptions)
}

// Watch has fn called after each change of this VM that a person would watch, from
// one goroutine and under no lock that the agent takes. No call begins once cancel
// has returned; fn must not call cancel.
func (a *Agent) Watch(fn func(vm bus.VM, removed bool)) (cancel func()) {
	f := &watcher{fn: fn}
	w := &a.watchers
	w.mu.Lock()
	id := w.next
	w.next++
	w.fns[id] = f
	w.mu.Unlock()
	return func() {
		w.mu.Lock()
		delete(w.fns, id)
		w.mu.Unlock()
		f.call.Lock()
		f.gone = true
		f.call.Unlock()
	}
}
