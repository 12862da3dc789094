package broker

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/castrabus/castra/internal/backoff"
	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/presence"
	"github.com/castrabus/castra/internal/wire"
)

const (
	// announceBatch is how many presence changes are committed at once.
	announceBatch = 512

	// announceRetry is how long to wait after the log refused them.
	announceRetry = time.Second

	// watchInterval bounds how often those who watch the VMs are called.
	watchInterval = 50 * time.Millisecond
)

// announce publishes presence changes and tells those who watch, until the
// broker ends. What cannot be stored is merged per VM and tried again.
func (b *Broker) announce() {
	a := announcer{pending: b.left}
	retry := time.NewTimer(time.Hour)
	retry.Stop()
	first := make(chan struct{}, 1) // one token: there may be something from the start
	first <- struct{}{}
	for ended := false; !ended; {
		select {
		case <-first:
		case <-b.table.Wake:
		case <-b.health.changed:
			b.tellWatchers([]string{""})
			continue
		case <-a.stuck.Done():
			b.settle(&a)
		case <-retry.C:
		case <-b.ctx2.Done():
			ended = true // once more, for what the end itself has changed
		}
		changes, touched := b.table.Changes()
		a.pending = append(a.pending, changes...)
		if b.publishPresence(&a); len(a.pending) > 0 {
			a.pending = presence.MergeChanges(a.pending)
			retry.Reset(announceRetry)
		}
		for _, name := range touched {
			if !b.table.Has(name) {
				b.records.handshake(name) // its file goes
			}
		}
		b.tellWatchers(touched)
	}
}

// announcer is what is still to be announced.
type announcer struct {
	pending []presence.Change
	// stuck is a batch that a stalled disk has kept; until it is known what
	// became of it, publishing its changes again could store them twice.
	stuck *eventlog.Batch
	sent  []presence.Change // what is in it
}

// settle takes back what the disk did not store of the stuck batch. Call it when the
// batch is done with: that is told once.
func (b *Broker) settle(a *announcer) {
	a.pending = append(b.noteSaid(a.stuck, a.sent), a.pending...)
	a.stuck, a.sent = nil, nil
}

// noteSaid takes in which of the changes the log has stored, and gives the others.
func (b *Broker) noteSaid(batch *eventlog.Batch, changes []presence.Change) (refused []presence.Change) {
	var stored []presence.Change
	for i := range batch.Entries {
		if batch.Entries[i].Err != nil {
			refused = append(refused, changes[i])
		} else {
			stored = append(stored, changes[i])
		}
	}
	b.words.stored(stored)
	if len(stored) > 0 {
		b.records.listDue()
	}
	return refused
}

// publishPresence stores as many of the changes as it can.
func (b *Broker) publishPresence(a *announcer) {
	if a.stuck != nil {
		select {
		case <-a.stuck.Done():
			b.settle(a)
		default:
			return
		}
	}
	for len(a.pending) > 0 {
		now := a.pending[:min(len(a.pending), announceBatch)]
		batch := &eventlog.Batch{}
		for _, c := range now {
			batch.Entries = append(batch.Entries, presenceEntry(c))
		}
		b.words.begin()
		err := b.events.Append(context.Background(), batch)
		switch {
		case err == nil:
			if left := b.noteSaid(batch, now); len(left) > 0 {
				a.pending = append(left, a.pending[len(now):]...)
				return
			}
			a.pending = a.pending[len(now):]
		case errors.Is(err, eventlog.ErrStalled) && !errors.Is(err, eventlog.ErrNotQueued):
			a.stuck, a.sent = batch, now
			a.pending = a.pending[len(now):]
			return
		default:
			b.words.stored(nil)
			return
		}
	}
}

func presenceEntry(c presence.Change) eventlog.Entry {
	state := bus.StateUnreachable
	if c.Reachable {
		state = bus.StateReachable
	}
	payload := wire.AppendString([]byte(`{"vm":`), c.VM)
	payload = wire.AppendString(append(payload, `,"state":`...), state)
	payload = append(wire.AppendString(append(payload, `,"reason":`...), c.Reason), '}')
	return eventlog.Entry{VM: bus.HostVM, Topic: []byte(presenceTopic), Payload: payload}
}

// watchers are those who want to be told of every change a person would watch.
// They are all called by the announcing goroutine.
type watchers struct {
	mu   sync.Mutex
	fns  map[int]func(bus.VM, bool)
	next int
}

func (w *watchers) list() []func(bus.VM, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	fns := make([]func(bus.VM, bool), 0, len(w.fns))
	for _, fn := range w.fns {
		fns = append(fns, fn)
	}
	return fns
}

// Watch makes the broker call fn, from one goroutine and never under a lock, on
// each change of a VM that a person would watch; removed says that the VM is
// no longer known. Of vm there is the name alone, since nobody looks at all of what
// changes while ten thousand connect; without one it stands for the broker itself. fn
// must not wait.
func (b *Broker) Watch(fn func(vm bus.VM, removed bool)) (cancel func()) {
	w := &b.watchers
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.fns == nil {
		w.fns = make(map[int]func(bus.VM, bool))
	}
	id := w.next
	w.next++
	w.fns[id] = fn
	return func() {
		w.mu.Lock()
		delete(w.fns, id)
		w.mu.Unlock()
	}
}

// tellWatchers tells of the VMs in touched, the empty name being the broker's,
// and then lets a moment pass, so that a storm of changes is told of once a VM
// and not once a change.
func (b *Broker) tellWatchers(touched []string) {
	fns := b.watchers.list()
	if len(fns) == 0 || len(touched) == 0 {
		return
	}
	for _, name := range touched {
		removed := name != "" && !b.table.Has(name)
		for _, fn := range fns {
			fn(bus.VM{VM: name}, removed)
		}
	}
	backoff.Sleep(b.ctx2, watchInterval)
}
