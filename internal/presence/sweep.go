package presence

import (
	"math"
	"time"
)

// never is the next deadline where nobody has one.
const never = math.MaxInt64

// lookAgain is called where a deadline may have come nearer. Call with the lock held.
func (t *Table) lookAgain() { t.nextDeadline, t.nextRecord = 0, 0 }

// Sweep finds those not heard of for too long: VMs become unreachable, and
// sessions that are over are told so. Call it every [Table.Interval].
func (t *Table) Sweep() {
	var over []Session
	t.mu.Lock()
	now, wall := t.now(), time.Now()
	if now < t.nextDeadline {
		t.mu.Unlock()
		return
	}
	t.nextDeadline = never
	for _, v := range t.vms {
		if v.rivals.calm(wall) {
			t.touched[v.name] = struct{}{}
		}
		if v.rivals.fights > 0 {
			t.nextDeadline = min(t.nextDeadline, now+int64(calmAfter-wall.Sub(v.rivals.last)))
		}
		switch {
		case v.session != nil:
			if t.silence(v, now) > t.opts.SessionTimeout {
				over = append(over, v.session)
			}
			t.nextDeadline = min(t.nextDeadline, v.frame.Load()+int64(t.patience(v.reachable)))
		case v.reachable && v.handshakeOK:
			if !t.lapse(v) {
				t.nextDeadline = min(t.nextDeadline, now+int64(t.opts.ReachableWithin-time.Since(v.handshake)))
			}
		}
	}
	changed := len(t.changes) > 0 || len(t.touched) > 0
	t.mu.Unlock()
	if changed {
		t.wake()
	}
	for _, s := range over {
		s.Expire()
	}
}

// lapse makes v, which is reachable by the word of a handshake-only guest, unreachable if
// that is too old, and tells whether it is. Call with the lock held.
func (t *Table) lapse(v *VM) bool {
	over := time.Since(v.handshake) > t.opts.ReachableWithin
	if over {
		v.handshakeOK = false
		t.set(v, false, ReasonExpired)
	}
	return over
}

// silence gives for how long the session of v has been silent; it is not reachable any
// more where that is too long. Call with the lock held.
func (t *Table) silence(v *VM, now int64) time.Duration {
	quiet := time.Duration(now - v.frame.Load())
	if !v.reachable || quiet <= t.opts.ReachableWithin {
		return quiet
	}
	v.silent.Store(true)
	if time.Duration(t.now()-v.frame.Load()) <= t.opts.ReachableWithin {
		v.silent.Store(false) // it spoke just now, and did not see the word
		return 0
	}
	t.set(v, false, ReasonSilent)
	return quiet
}

// patience is how long a session may be silent until that has consequences. Call with
// the lock held.
func (t *Table) patience(reachable bool) time.Duration {
	if reachable {
		return min(t.opts.SessionTimeout, t.opts.ReachableWithin)
	}
	return t.opts.SessionTimeout
}

// Interval is when to sweep next so that a deadline is met within a tenth of
// itself, and at most a second late. Where there are none it is longer; whoever comes
// in that time has his ahead of him still.
func (t *Table) Interval() time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.nextDeadline == never {
		return max(t.interval(), min(idleInterval, t.opts.ReachableWithin/2, t.opts.SessionTimeout/2))
	}
	return t.interval()
}

// idleInterval bounds how long what goes with a sweep may wait where nobody is there.
const idleInterval = 5 * time.Second

func (t *Table) interval() time.Duration {
	return max(20*time.Millisecond, min(time.Second, t.opts.ReachableWithin/10, t.opts.SessionTimeout/10))
}
