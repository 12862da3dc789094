package presence

import "time"

// Two guests with one identity, a VM and its clone, replace each other's sessions
// for as long as both run. Each time one is entitled to do so, so it is not
// refused; but a session that has just begun is replaced more and more slowly, and
// the name is told of.
const (
	// youngFor is how old a session must be for its replacement to be nothing
	// unusual: a VM that is reset or restored connects anew while its old session
	// still seems to live.
	youngFor = time.Minute
	// freeReplacements of young sessions in a row are taken for restarts.
	freeReplacements = 4
	// firstGap is how long the next newcomer waits; each one waits twice as long.
	firstGap = 250 * time.Millisecond
	// calmAfter is how long after the last one all is forgotten.
	calmAfter = 5 * time.Minute
)

// rivalry is what is known of those who replace each other under one name. It
// belongs to the table.
type rivalry struct {
	fights uint64    // young sessions replaced in a row
	total  uint64    // all that were, since the table began
	last   time.Time // when the last newcomer came
	next   time.Time // when the next one may have the name
}

// contended tells whether the name is fought over.
func (r *rivalry) contended() bool { return r.fights > freeReplacements }

// calm forgets a fight that is over, and tells whether that is news.
func (r *rivalry) calm(now time.Time) bool {
	if r.fights == 0 || now.Sub(r.last) < calmAfter {
		return false
	}
	news := r.contended()
	r.fights = 0
	return news
}

// Contend notes that somebody who is entitled to the name is about to replace a
// session of it that lives, and gives how long he has to wait first: at most most,
// else ok is false and he may not. begun tells that from now on the name counts as
// contended.
func (t *Table) Contend(name string, most time.Duration) (wait time.Duration, ok, begun bool) {
	defer t.wake()
	t.mu.Lock()
	defer t.mu.Unlock()
	v := t.vms[name]
	if v == nil || v.session == nil {
		return 0, true, false
	}
	now := time.Now()
	r := &v.rivals
	r.calm(now)
	r.total++
	r.last = now
	if now.Sub(v.handshake) >= youngFor {
		r.fights = 0
		return 0, true, false
	}
	before := r.contended()
	r.fights++
	t.lookAgain()
	if !r.contended() {
		return 0, true, false
	}
	if begun = !before; begun {
		t.touched[name] = struct{}{}
	}
	at := now
	if r.next.After(now) {
		at = r.next // others wait already
	}
	at = at.Add(min(most, firstGap<<min(r.fights-freeReplacements-1, 16)))
	if wait = at.Sub(now); wait > most {
		return 0, false, begun
	}
	r.next = at
	return wait, true, begun
}

// MakeWay takes the session of a VM that nobody registered away, of the one heard
// of longest ago, if there is no room left for that of the registered VM called
// name; nil if there is room, or no such session. It is the caller's to end.
func (t *Table) MakeWay(name string) Session {
	defer t.wake()
	t.mu.Lock()
	defer t.mu.Unlock()
	if v := t.vms[name]; v == nil || !v.known || v.session != nil || t.opts.MaxSessions <= 0 || t.live < t.opts.MaxSessions {
		return nil
	}
	var oldest *VM
	for _, v := range t.vms {
		if !v.known && v.session != nil && (oldest == nil || v.frame.Load() < oldest.frame.Load()) {
			oldest = v
		}
	}
	if oldest == nil {
		return nil
	}
	s := oldest.session
	oldest.session, oldest.topics, oldest.remote = nil, nil, ""
	t.live--
	t.set(oldest, false, ReasonDisconnected)
	return s
}
