package presence

import (
	"slices"
	"strings"
	"time"

	"github.com/castrabus/castra/internal/bus"
)

// Snapshot describes the named VMs, or all if names is empty, sorted by name.
// Names that are not known are left out. It waits for no guest.
func (t *Table) Snapshot(names []string) []bus.VM {
	t.mu.Lock()
	now := t.now()
	var out []bus.VM
	var sessions []Session
	add := func(v *VM) {
		d, s := t.describe(v, now)
		out = append(out, d)
		sessions = append(sessions, s)
	}
	n := len(names)
	if n == 0 {
		n = len(t.vms)
	}
	out, sessions = make([]bus.VM, 0, n), make([]Session, 0, n)
	if len(names) == 0 {
		for _, v := range t.vms {
			add(v)
		}
	}
	for _, name := range names {
		if v := t.vms[name]; v != nil {
			add(v)
		}
	}
	t.mu.Unlock()
	for i, s := range sessions {
		if s != nil {
			out[i].Session, out[i].Lag = s.Token(), s.Lag()
		}
	}
	slices.SortFunc(out, func(a, b bus.VM) int { return strings.Compare(a.VM, b.VM) })
	return out
}

// describe gives what the table holds of v. Call with the lock held.
func (t *Table) describe(v *VM, now int64) (bus.VM, Session) {
	d := bus.VM{
		VM: v.name, Reachable: v.reachable, State: bus.StateUnreachable,
		LastPublishAgeMS: ageMS(now, v.publish.Load()), LastHeartbeatAgeMS: ageMS(now, v.heartbeat.Load()),
		BusSubscribed: len(v.topics) > 0, Subscriptions: append([]string{}, v.topics...),
		RemoteAddr: v.remote, Capabilities: append([]string{}, v.caps...),
		Published: v.published.Load(), RateLimited: v.limited.Load(), LastLimitedAgeMS: ageMS(now, v.limitedAt.Load()),
		Superseded: v.rivals.total, Contended: v.rivals.contended(),
		Forwards: []string{},
	}
	if v.reachable {
		d.State = bus.StateReachable
	} else {
		d.Reason = v.reason
	}
	if !v.handshake.IsZero() {
		ms := time.Since(v.handshake).Milliseconds()
		d.LastHandshakeAgeMS = &ms
	}
	return d, v.session
}

func ageMS(now, at int64) *int64 {
	if at == 0 {
		return nil
	}
	ms := max(0, time.Duration(now-at).Milliseconds())
	return &ms
}

// Counts tells how many VMs have a session and how many are reachable.
func (t *Table) Counts() (sessions, reachable int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, v := range t.vms {
		if v.reachable {
			reachable++
		}
	}
	return t.live, reachable
}

// Strangers tells how many VMs are known that nobody registered.
func (t *Table) Strangers() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.strange
}

// Last is what the file of a VM's last handshake tells; times are wall clock,
// zero where never. Its slices are not to be changed.
type Last struct {
	Handshake, Publish, Heartbeat, Subscribe time.Time
	Capabilities, Topics                     []string
}

// Last gives it for one VM, ok=false if the name is not known.
func (t *Table) Last(name string) (last Last, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	v := t.vms[name]
	if v == nil {
		return Last{}, false
	}
	return v.last(), true
}

// Record is Last for who writes it down: [Table.Unrecorded] knows of it.
func (t *Table) Record(name string) (last Last, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	v := t.vms[name]
	if v == nil {
		return Last{}, false
	}
	v.recorded, v.beatRecorded = t.now(), v.heartbeat.Load() != 0
	return v.last(), true
}

// last collects it. Call with the lock held; the slices are replaced, never changed in
// place.
func (v *VM) last() Last {
	t := v.table
	return Last{
		Handshake: v.handshake, Publish: t.wall(v.publish.Load()), Heartbeat: t.wall(v.heartbeat.Load()), Subscribe: v.subscribed,
		Capabilities: v.caps, Topics: v.topics,
	}
}

// Unrecorded lists the VMs of which something was heard since they were recorded last,
// where that is a period ago or longer. One more heartbeat alone waits for the next: what
// is recorded then is new and will not be old sooner, and takes fewer writes. Who asks, as
// often as it sweeps, is to record them: a slow disk does not have all of them listed again.
func (t *Table) Unrecorded(period time.Duration) []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	if now < t.nextRecord {
		return nil
	}
	t.nextRecord = never
	var names []string
	for name, v := range t.vms {
		if v.session == nil {
			continue
		}
		if v.unrecorded(now, period) {
			v.recorded = now
			names = append(names, name)
		}
		t.nextRecord = min(t.nextRecord, v.recorded+int64(period))
	}
	return names
}

// unrecorded tells whether v is to be recorded now. Call with the lock held.
func (v *VM) unrecorded(now int64, period time.Duration) bool {
	frame, age := v.frame.Load(), time.Duration(now-v.recorded)
	switch {
	case age < period || frame <= v.recorded:
		return false
	case v.publish.Load() > v.recorded, !v.beatRecorded && v.heartbeat.Load() != 0:
		return true
	}
	return time.Duration(now-frame) < period/10 || age >= 2*period
}

// wall converts the table's clock.
func (t *Table) wall(at int64) time.Time {
	if at == 0 {
		return time.Time{}
	}
	return t.began.Add(time.Duration(at))
}

// maxRefused and refusedFor bound the list of names turned away (contract 7).
const (
	maxRefused = 64
	refusedFor = time.Hour
)

type refusal struct {
	vm, reason string
	hasKey     bool // it would have proven one
	at         time.Time
	known      bool // a registered VM's
	times      int  // up to manyTimes
}

// manyTimes is from when on a name counts as one that comes again and again.
const manyTimes = 4

// outlasts tells whether r is kept rather than o where there is room for one: a
// flood of made-up names must not push out a VM that somebody runs. Those are
// registered, or try again.
func (r *refusal) outlasts(o *refusal) bool {
	if r.known != o.known {
		return r.known
	}
	if r.times != o.times {
		return r.times > o.times
	}
	return r.at.After(o.at)
}

// refusals are kept oldest first, one a name.
type refusals []refusal

// Refuse notes that a name was turned away; hasKey tells that it has a key to prove.
func (t *Table) Refuse(name, reason string, hasKey bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	v := t.vms[name]
	fresh := refusal{vm: name, reason: reason, hasKey: hasKey, at: time.Now(), known: v != nil && v.known, times: 1}
	if i := slices.IndexFunc(t.refused, func(r refusal) bool { return r.vm == name }); i >= 0 {
		if time.Since(t.refused[i].at) <= refusedFor {
			fresh.times = min(manyTimes, t.refused[i].times+1)
		}
		t.refused = slices.Delete(t.refused, i, i+1)
	}
	if len(t.refused) >= maxRefused {
		least := 0
		for i := range t.refused {
			old := time.Since(t.refused[i].at) > refusedFor
			if old || t.refused[least].outlasts(&t.refused[i]) {
				least = i
			}
			if old {
				break
			}
		}
		t.refused = slices.Delete(t.refused, least, least+1)
	}
	t.refused = append(t.refused, fresh)
}

// Admitted drops name from the list of those turned away.
func (t *Table) Admitted(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.admitted(name)
}

// admitted is Admitted. Call with the lock held.
func (t *Table) admitted(name string) {
	t.refused = slices.DeleteFunc(t.refused, func(r refusal) bool { return r.vm == name })
}

// Refused lists the names turned away in the last hour, the newest first.
func (t *Table) Refused() []bus.Refused {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := []bus.Refused{}
	for _, r := range slices.Backward(t.refused) {
		if age := time.Since(r.at); age <= refusedFor {
			out = append(out, bus.Refused{VM: r.vm, Reason: r.reason, HasKey: r.hasKey, AgeMS: age.Milliseconds()})
		}
	}
	return out
}
