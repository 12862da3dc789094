// Package presence knows, at any moment, which VM is alive. It is one guarded
// table with one deadline sweep; sessions report what they hear through a few
// atomic words a VM, so that a frame costs no lock.
package presence

import (
	"errors"
	"sync"
	"time"

	"github.com/castrabus/castra/internal/token"
)

// Why a VM is in the state it is in.
const (
	ReasonNeverSeen    = "never-seen"
	ReasonHandshake    = "handshake"    // reachable: it has just connected
	ReasonFrame        = "frame"        // reachable again: a silent session spoke
	ReasonDisconnected = "disconnected" // its connection closed
	ReasonSilent       = "silent"       // connected, or was until then, yet nothing heard for too long
	ReasonExpired      = "expired"      // a handshake-only guest was not heard of again
	ReasonRestarted    = "restarted"    // the broker has begun anew, and not heard of it yet
)

// Change is a VM's transition from one state to the other.
type Change struct {
	VM        string
	Reachable bool
	Reason    string
}

// Session is a live session, as far as the table needs to know it.
type Session interface {
	Token() string
	// Lag gives how many committed records its slowest subscription has still
	// to pass.
	Lag() uint64
	// Expire ends the session because nothing was heard of it for too long. It
	// must not wait.
	Expire()
}

// Options of a Table.
type Options struct {
	ReachableWithin time.Duration // a session is reachable for so long after a frame
	SessionTimeout  time.Duration // a session that says nothing for so long ends
	MaxVMs          int           // names kept that nobody registered; 0: any number
	NewVMs          Rate          // how fast such names may appear; zero: at any rate
	MaxSessions     int           // at once; 0: any number
}

// Table is the presence table.
type Table struct {
	began time.Time
	// Wake has a token when Changes or Dirty may have something new. One token
	// says all that more could.
	Wake chan struct{}
	// Configured has one when Interval may have become less.
	Configured chan struct{}

	mu      sync.Mutex
	opts    Options
	vms     map[string]*VM
	live    int    // sessions
	strange int    // VMs that nobody registered
	arrival Bucket // of names that nobody registered
	changes []Change
	touched map[string]struct{} // VMs whose record a person would watch has changed
	refused refusals
	// forgotten are the names that had to make room; see TakeForgotten.
	forgotten []string

	// Before when no deadline passes, and no VM has to be recorded, on the table's clock.
	// What is heard only puts it off, so that ten thousand VMs need not be looked at each
	// second.
	nextDeadline, nextRecord int64
}

// New makes an empty table.
func New(opts Options) *Table {
	return &Table{
		began: time.Now(), Wake: make(chan struct{}, 1), Configured: make(chan struct{}, 1), opts: opts,
		vms: make(map[string]*VM), touched: make(map[string]struct{}),
	}
}

// Configure changes the options of a running table.
func (t *Table) Configure(opts Options) {
	t.mu.Lock()
	t.opts = opts
	t.lookAgain()
	t.mu.Unlock()
	token.Leave(t.Configured)
}

// now is the table's clock: monotonic, and never 0.
func (t *Table) now() int64 { return max(1, int64(time.Since(t.began))) }

func (t *Table) wake() { token.Leave(t.Wake) }

// vm gives the entry for name, making one if need be, nil if there are too
// many. Call with the lock held.
func (t *Table) vm(name string) *VM {
	v := t.vms[name]
	if v == nil {
		if t.opts.MaxVMs > 0 && t.strange >= t.opts.MaxVMs && !t.makeRoom() {
			return nil
		}
		// Each new name leaves records and files behind.
		if t.opts.NewVMs.Records > 0 && t.arrival.Take(t.opts.NewVMs, 0, time.Now()) > 0 {
			return nil
		}
		v = &VM{name: name, table: t, reason: ReasonNeverSeen}
		t.vms[name] = v
		t.strange++
	}
	return v
}

// makeRoom drops the stranger without a session that was heard of longest ago, if
// there is one: names that come once must not keep new ones out for ever, be they
// reachable by a handshake-only guest's word. Call with the lock held.
func (t *Table) makeRoom() bool {
	var oldest *VM
	for _, v := range t.vms {
		if !v.known && v.session == nil && (oldest == nil || v.handshake.Before(oldest.handshake)) {
			oldest = v
		}
	}
	if oldest == nil {
		return false
	}
	t.set(oldest, false, ReasonExpired)
	t.drop(oldest)
	t.forgotten = append(t.forgotten, oldest.name)
	return true
}

// TakeForgotten gives the names that were forgotten since the last call because there
// were too many that nobody registered. Whoever adds a name calls it, so there are few.
func (t *Table) TakeForgotten() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	names := t.forgotten
	t.forgotten = nil
	return names
}

// drop removes an entry. Call with the lock held.
func (t *Table) drop(v *VM) {
	delete(t.vms, v.name)
	t.touched[v.name] = struct{}{}
	if !v.known {
		t.strange--
	}
}

// set moves v to a state. Call with the lock held.
func (t *Table) set(v *VM, reachable bool, reason string) {
	t.touched[v.name] = struct{}{}
	v.reason = reason
	if v.reachable == reachable {
		return
	}
	v.reachable = reachable
	if len(t.changes) >= maxChanges {
		t.changes = MergeChanges(t.changes)
	}
	t.changes = append(t.changes, Change{VM: v.name, Reachable: reachable, Reason: reason})
}

// maxChanges bounds the changes that wait to be published. Beyond it only the
// newest of each VM is kept.
const maxChanges = 1 << 16

// MergeChanges keeps the newest change of each VM, in order. It uses the slice's room.
func MergeChanges(changes []Change) []Change {
	newest := make(map[string]int)
	for i, c := range changes {
		newest[c.VM] = i
	}
	kept := changes[:0]
	for i, c := range changes {
		if newest[c.VM] == i {
			kept = append(kept, c)
		}
	}
	return kept
}

// Know makes an entry for a registered VM, so that it shows before it was ever
// seen.
func (t *Table) Know(name string) {
	t.mu.Lock()
	v := t.vms[name]
	switch {
	case v == nil:
		v = &VM{name: name, table: t, reason: ReasonNeverSeen}
		t.vms[name] = v
	case !v.known:
		t.strange--
	}
	v.known, v.forgotten = true, false
	t.touched[name] = struct{}{}
	t.mu.Unlock()
	t.wake()
}

// Forget drops the entry of a VM, as soon as it has no session.
func (t *Table) Forget(name string) {
	t.mu.Lock()
	if v := t.vms[name]; v != nil {
		v.forgotten = true
		if v.session == nil {
			if v.reachable {
				t.set(v, false, ReasonDisconnected)
			}
			t.drop(v)
		}
	}
	t.mu.Unlock()
	t.wake()
}

// ErrTooManyVMs and ErrTooManySessions say that a limit is reached.
var (
	ErrTooManyVMs      = errors.New("too many VMs")
	ErrTooManySessions = errors.New("too many sessions")
)

// Connect makes s the session of the VM called name and gives the one that it
// replaces, nil if there was none. The error is one of the two above; a VM that
// replaces its own session needs no further one.
func (t *Table) Connect(name string, s Session, remote string, caps []string) (v *VM, old Session, err error) {
	defer t.wake()
	t.mu.Lock()
	defer t.mu.Unlock()
	if v = t.vms[name]; (v == nil || v.session == nil) && t.opts.MaxSessions > 0 && t.live >= t.opts.MaxSessions {
		return nil, nil, ErrTooManySessions
	}
	if v = t.vm(name); v == nil {
		return nil, nil, ErrTooManyVMs
	}
	if v.session == nil {
		t.live++
		v.rivals.calm(time.Now())
	}
	t.lookAgain()
	old, v.session = v.session, s
	v.remote, v.caps, v.topics = remote, caps, nil
	v.handshake, v.handshakeOK = time.Now(), false
	v.frame.Store(t.now())
	v.silent.Store(false)
	t.set(v, true, ReasonHandshake)
	t.admitted(name)
	return v, old, nil
}

// Pace takes a handshake off what a VM may do and gives how long it is to wait
// first. ok is false where that is longer than most; nothing is taken then. A name
// that is not in the table yet has all of its share.
func (t *Table) Pace(name string, r Rate, most time.Duration) (wait time.Duration, ok bool) {
	t.mu.Lock()
	v := t.vms[name]
	t.mu.Unlock()
	if v == nil {
		return 0, true
	}
	return v.pace.Reserve(r, most, time.Now())
}

// Disconnect ends s, unless a newer session has replaced it: the close of an
// old one never touches the newer one's state. It tells whether it did.
func (t *Table) Disconnect(v *VM, s Session) bool {
	defer t.wake()
	t.mu.Lock()
	defer t.mu.Unlock()
	if v.session != s {
		return false
	}
	v.session, v.topics, v.remote = nil, nil, ""
	t.live--
	reason := ReasonDisconnected
	if v.silent.Load() {
		reason = ReasonSilent // that the connection went too is what came of it
	}
	t.set(v, false, reason)
	if v.forgotten {
		t.drop(v)
	}
	return true
}

// Attend notes an ok given to a handshake-only guest.
func (t *Table) Attend(name, remote string, caps []string) bool {
	defer t.wake()
	t.mu.Lock()
	defer t.mu.Unlock()
	v := t.vm(name)
	if v == nil {
		return false
	}
	t.lookAgain()
	v.handshake = time.Now()
	t.admitted(name)
	if v.session == nil { // a live session says more than a handshake
		v.remote, v.caps, v.handshakeOK = remote, caps, true
		t.set(v, true, ReasonHandshake)
	}
	return true
}

// Subscribed notes the topics that s is subscribed to now.
func (t *Table) Subscribed(v *VM, s Session, topics []string) {
	t.mu.Lock()
	if v.session == s {
		v.topics, v.subscribed = topics, time.Now()
		t.touched[v.name] = struct{}{}
	}
	t.mu.Unlock()
	t.wake()
}

// awake makes a silent VM with a session reachable again.
func (t *Table) awake(v *VM) {
	t.mu.Lock()
	if v.session != nil && v.silent.Swap(false) {
		t.set(v, true, ReasonFrame)
		t.lookAgain()
	}
	t.mu.Unlock()
	t.wake()
}

// Changes takes the changes that have happened since the last call, in order,
// and the names of the VMs of which anything has changed.
func (t *Table) Changes() (changes []Change, touched []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	changes, t.changes = t.changes, nil
	if len(t.touched) > 0 {
		touched = make([]string, 0, len(t.touched))
		for name := range t.touched {
			touched = append(touched, name)
		}
		t.touched = make(map[string]struct{})
	}
	return changes, touched
}

// Has tells whether the VM called name is known.
func (t *Table) Has(name string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.vms[name] != nil
}

// Heard tells whether anything was heard of the VM called name since the broker began.
func (t *Table) Heard(name string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	v := t.vms[name]
	return v != nil && (v.reachable || v.reason != ReasonRestarted)
}

// SessionOf gives the live session of a VM, nil if there is none.
func (t *Table) SessionOf(name string) Session {
	t.mu.Lock()
	defer t.mu.Unlock()
	if v := t.vms[name]; v != nil {
		return v.session
	}
	return nil
}
