package presence

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// Carried is what the table knows of one VM, for the table of the castrad that
// comes next. Ages are at the time of [Table.Carry]; nil: never.
type Carried struct {
	VM           string         `json:"vm"`
	Reachable    bool           `json:"reachable,omitempty"`
	Reason       string         `json:"reason"`
	Remote       string         `json:"remote,omitempty"`
	Capabilities []string       `json:"capabilities,omitempty"`
	Topics       []string       `json:"topics,omitempty"`
	HandshakeOK  bool           `json:"handshake_ok,omitempty"` // reachable by a handshake-only guest's word
	Handshake    *time.Duration `json:"handshake_age_ns,omitempty"`
	Subscribed   *time.Duration `json:"subscribed_age_ns,omitempty"`
	Frame        *time.Duration `json:"frame_age_ns,omitempty"`
	Publish      *time.Duration `json:"publish_age_ns,omitempty"`
	Heartbeat    *time.Duration `json:"heartbeat_age_ns,omitempty"`
	Published    uint64         `json:"published,omitempty"`
	Limited      uint64         `json:"limited,omitempty"`
	LimitedLast  *time.Duration `json:"limited_age_ns,omitempty"`
	// What is left of its shares: a restart gives nobody a new one.
	Share      *Level `json:"share,omitempty"`
	Handshakes *Level `json:"handshakes,omitempty"`
}

// CarriedRefusal is a name that was turned away, for the table that comes next.
type CarriedRefusal struct {
	VM     string        `json:"vm"`
	Reason string        `json:"reason"`
	HasKey bool          `json:"has_key,omitempty"`
	Age    time.Duration `json:"age_ns"`
	Known  bool          `json:"known,omitempty"`
	Times  int           `json:"times"`
}

// CarryRefused describes the names turned away, the oldest first.
func (t *Table) CarryRefused() []CarriedRefusal {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []CarriedRefusal
	for _, r := range t.refused {
		all = append(all, CarriedRefusal{r.vm, r.reason, r.hasKey, time.Since(r.at), r.known, r.times})
	}
	return all
}

// ResumeRefused takes in, elapsed after it was made, what CarryRefused gave. Nobody was
// turned away here yet.
func (t *Table) ResumeRefused(all []CarriedRefusal, elapsed time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, r := range all[:min(len(all), maxRefused)] {
		t.refused = append(t.refused, refusal{vm: r.VM, reason: r.Reason, hasKey: r.HasKey, at: time.Now().Add(-r.Age - elapsed), known: r.Known, times: r.Times})
	}
}

// Sessions lists the live sessions.
func (t *Table) Sessions() []Session {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []Session
	for _, v := range t.vms {
		if v.session != nil {
			all = append(all, v.session)
		}
	}
	return all
}

// Carry describes every VM that was ever heard of, each with its live session or nil.
func (t *Table) Carry() ([]Carried, []Session) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now, wall := t.now(), time.Now()
	age := func(at int64) *time.Duration {
		if at == 0 {
			return nil
		}
		d := time.Duration(now - at)
		return &d
	}
	since := func(at time.Time) *time.Duration {
		if at.IsZero() {
			return nil
		}
		d := time.Since(at)
		return &d
	}
	var all []Carried
	var sessions []Session
	for _, v := range t.vms {
		if v.handshake.IsZero() {
			continue
		}
		all = append(all, Carried{
			VM: v.name, Reachable: v.reachable, Reason: v.reason, Remote: v.remote,
			Capabilities: slices.Clone(v.caps), Topics: slices.Clone(v.topics), HandshakeOK: v.handshakeOK,
			Handshake: since(v.handshake), Subscribed: since(v.subscribed),
			Frame: age(v.frame.Load()), Publish: age(v.publish.Load()), Heartbeat: age(v.heartbeat.Load()),
			Published: v.published.Load(), Limited: v.limited.Load(), LimitedLast: age(v.limitedAt.Load()),
			Share: v.Limit.level(wall), Handshakes: v.pace.level(wall),
		})
		sessions = append(sessions, v.session)
	}
	return all, sessions
}

// Resume takes in what another table knew of a VM, elapsed after it did; s is the
// VM's session, nil if it has none, or none any more. It is no change that anybody
// is told of, unless the VM was reachable and is no longer. Where the VM has been
// heard of here already it does nothing and gives nil.
func (t *Table) Resume(c *Carried, s Session, elapsed time.Duration) *VM {
	defer t.wake()
	t.mu.Lock()
	defer t.mu.Unlock()
	if old := t.vms[c.VM]; old != nil && !old.handshake.IsZero() {
		return nil
	}
	v := t.vm(c.VM)
	if v == nil {
		return nil
	}
	at := func(age *time.Duration) int64 {
		if age == nil {
			return 0
		}
		if at := t.now() - int64(*age+elapsed); at != 0 {
			return at
		}
		return -1 // 0 says never
	}
	when := func(age *time.Duration) time.Time {
		if age == nil {
			return time.Time{}
		}
		return time.Now().Add(-*age - elapsed)
	}
	v.session, v.remote, v.caps, v.topics, v.handshakeOK = s, c.Remote, c.Capabilities, c.Topics, c.HandshakeOK
	v.handshake, v.subscribed = when(c.Handshake), when(c.Subscribed)
	v.publish.Store(at(c.Publish))
	v.heartbeat.Store(at(c.Heartbeat))
	v.published.Store(c.Published)
	v.limited.Store(c.Limited)
	v.limitedAt.Store(at(c.LimitedLast))
	v.Limit.setLevel(c.Share, time.Now(), elapsed)
	v.pace.setLevel(c.Handshakes, time.Now(), elapsed)
	v.frame.Store(at(c.Frame))
	v.reachable, v.reason = c.Reachable, c.Reason
	t.lookAgain()
	switch {
	case s != nil:
		t.live++
		v.silent.Store(!c.Reachable)
		// What its guest said while nobody listened is about to be read, and must be before
		// a sweep finds it silent: two are left.
		v.frame.Store(max(v.frame.Load(), t.now()-int64(t.patience(c.Reachable)-2*t.interval())))
	case !c.HandshakeOK:
		v.remote, v.topics = "", nil
		if c.Reachable {
			t.set(v, false, ReasonRestarted)
		}
	case c.Reachable:
		t.lapse(v)
	}
	t.touched[v.name] = struct{}{}
	return v
}

// CatchUp gives what is to be said to those who were told last that the VMs in said are
// reachable, and no others, sorted by name. [Table.Changes] has nothing of it any more.
func (t *Table) CatchUp(said map[string]struct{}) []Change {
	t.mu.Lock()
	defer t.mu.Unlock()
	reasons := make(map[string]string) // of those that have been dropped
	for _, c := range t.changes {
		reasons[c.VM] = c.Reason
	}
	t.changes = nil
	told := maps.Clone(said)
	var changes []Change
	for name, v := range t.vms {
		_, was := told[name]
		if was && v.handshake.IsZero() {
			continue // it is known, and was not heard of yet
		}
		if was != v.reachable {
			changes = append(changes, Change{VM: name, Reachable: v.reachable, Reason: v.reason})
		}
		delete(told, name)
	}
	for name := range told {
		changes = append(changes, Change{VM: name, Reason: cmp.Or(reasons[name], ReasonRestarted)})
	}
	slices.SortFunc(changes, func(a, b Change) int { return strings.Compare(a.VM, b.VM) })
	return changes
}

// Remember takes in what was written down of a VM before the broker began, read from
// [Last] as it was recorded. What was heard since stays. A name that is not in the table
// is one that nobody registered, and comes in while there is room.
func (t *Table) Remember(name string, last *Last) {
	defer t.wake()
	t.mu.Lock()
	defer t.mu.Unlock()
	v := t.vms[name]
	if v == nil {
		if t.opts.MaxVMs > 0 && t.strange >= t.opts.MaxVMs {
			return
		}
		v = &VM{name: name, table: t}
		t.vms[name] = v
		t.strange++
	}
	// By the wall clock, which may have been set back since: nothing is yet to come.
	ago := func(at time.Time) int64 { return min(int64(at.Sub(t.began)), t.now()) }
	unlessHeard := func(at *atomic.Int64, was time.Time) {
		if !was.IsZero() {
			at.CompareAndSwap(0, ago(was))
		}
	}
	unlessHeard(&v.publish, last.Publish)
	unlessHeard(&v.heartbeat, last.Heartbeat)
	if v.subscribed.IsZero() {
		v.subscribed = last.Subscribe
	}
	if v.handshake.IsZero() {
		v.handshake, v.caps, v.reason = t.wall(ago(last.Handshake)), last.Capabilities, ReasonRestarted
	}
	t.touched[name] = struct{}{}
}
