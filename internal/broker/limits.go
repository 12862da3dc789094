package broker

import (
	"maps"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/logging"
	"github.com/castrabus/castra/internal/presence"
	"github.com/castrabus/castra/internal/session"
)

// The limits that are counted, as [limits] and, of bytes on disk, [store] in the
// configuration spell them. limitOpenFiles is the process's own (RLIMIT_NOFILE).
const (
	limitSessions      = "max_sessions"
	limitHandshakes    = "max_handshakes"
	limitVMs           = "max_vms"
	limitSubscriptions = "max_subscriptions"
	limitPublish       = "publish_rate"
	limitHandshakeRate = "handshake_rate"
	limitUnsent        = "unsent_bytes"
	limitVMBytes       = "vm_retention_size"
	limitOpenFiles     = "open_files"
)

// limitLogInterval is how often at most the journal is told that one limit is
// reached: whoever runs into it a thousand times a second must not fill it.
const limitLogInterval = time.Minute

// limitCounts counts how often each limit was reached.
type limitCounts struct {
	mu     sync.Mutex
	counts map[string]uint64
	logged map[string]time.Time
}

// hit counts one.
func (l *limitCounts) hit(limit string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.counts == nil {
		l.counts = make(map[string]uint64)
	}
	l.counts[limit]++
}

// due tells whether to log that the limit is reached, and how often it was so far.
func (l *limitCounts) due(limit string) (times uint64, due bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if last, ok := l.logged[limit]; ok && now.Sub(last) < limitLogInterval {
		return 0, false
	}
	if l.logged == nil {
		l.logged = make(map[string]time.Time)
	}
	l.logged[limit] = now
	return l.counts[limit], true
}

func (l *limitCounts) snapshot() map[string]uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make(map[string]uint64, len(l.counts))
	maps.Copy(out, l.counts)
	return out
}

// bite makes a limit that was reached visible: it is counted for status, told in
// the journal at times, and recorded as the trouble of vm, or of the address of
// who has no name yet.
func (b *Broker) bite(limit, vm, token, reason, action, detail string) {
	b.limited.hit(limit)
	b.tellLimit(limit, vm, detail)
	b.trouble(vm, token, reason, action, limit+": "+detail)
}

func (b *Broker) tellLimit(limit, vm, detail string) {
	if times, due := b.limited.due(limit); due {
		logging.LimitReached.On(b.log).WithFields(logrus.Fields{"vm": vm, "limit": limit, "count": times}).Warnf("a limit is reached: %s", detail)
	}
}

// What is written down of guests is shared out, or one of them could push all that
// is known of the others out of files that are kept by size. A registered name has
// shares of its own. All the others have one together: they cost nothing to make up.
var (
	ownShare     = presence.Rate{Records: 1, Burst: 200, Bytes: 1}
	commonShare  = presence.Rate{Records: 20, Burst: 4096, Bytes: 1}
	grantedShare = presence.Rate{Records: 50, Burst: 1 << 16, Bytes: 1} // of strangers let in
	ownLog       = presence.Rate{Records: 0.1, Burst: 20, Bytes: 1}
	commonLog    = presence.Rate{Records: 1, Burst: 100, Bytes: 1}
)

// The kinds of notes that have shares.
type noteKind uint8

const (
	noteGranted noteKind = iota
	noteRefused
	noteTrouble
	noteLog // of refusals, in the journal
)

type shareKey struct {
	kind noteKind
	vm   string // registered; "": everybody else
}

type share struct {
	bucket   presence.Bucket
	withheld int
	remote   string // of whom the last of them was
	reason   string
}

// shares are the shares of what is written down. Their number is bounded by that of
// registered VMs.
type shares struct {
	mu  sync.Mutex
	all map[shareKey]*share
}

// take tells whether a note of vm may be written, and else counts it.
func (s *shares) take(kind noteKind, vm string, known bool, remote, reason string) bool {
	key := shareKey{kind: kind}
	rate := commonShare
	switch {
	case known && kind == noteGranted:
		return true // each proves itself, or is as good as that; its pace is limited
	case known:
		key.vm, rate = vm, ownShare
		if kind == noteLog {
			rate = ownLog
		}
	case kind == noteGranted:
		rate = grantedShare
	case kind == noteLog:
		rate = commonLog
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all == nil {
		s.all = make(map[shareKey]*share)
	}
	sh := s.all[key]
	if sh == nil {
		sh = &share{}
		s.all[key] = sh
	}
	if sh.bucket.Take(rate, 0, time.Now()) == 0 {
		return true
	}
	sh.withheld++
	sh.remote, sh.reason = remote, reason
	return false
}

// withheldNotes is how many notes of one kind and name were not written.
type withheldNotes struct {
	shareKey
	count          int
	remote, reason string
}

// collect takes the counts of what was not written. Shares that have been full for
// long enough to be as new go.
func (s *shares) collect() []withheldNotes {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []withheldNotes
	for key, sh := range s.all {
		if sh.withheld > 0 {
			out = append(out, withheldNotes{key, sh.withheld, sh.remote, sh.reason})
			sh.withheld = 0
		} else if sh.bucket.Idle(time.Now()) > time.Hour {
			delete(s.all, key)
		}
	}
	return out
}

// tellWithheld writes down how much was not.
func (b *Broker) tellWithheld() {
	for _, w := range b.shares.collect() {
		vm := w.vm
		if vm == "" {
			vm = w.remote
		}
		switch w.kind {
		case noteLog:
			logging.RefusalsWithheld.On(b.log).WithFields(logrus.Fields{"vm": vm, "reason": w.reason, "count": w.count}).
				Warn("guests were refused more often than is logged one by one; castractl status shows who")
		case noteTrouble:
			b.records.event(busEvent(vm, "", w.reason, session.ActionThrottle, "not recorded one by one", w.count))
		default:
			outcome := "denied"
			if w.kind == noteGranted {
				outcome = "granted"
			}
			b.records.event(handshakeEvent(vm, nil, outcome, w.reason, w.remote, w.count))
		}
	}
}
