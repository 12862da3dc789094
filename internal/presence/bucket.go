package presence

import (
	"sync"
	"time"
)

// Rate says how fast a bucket fills.
type Rate struct {
	Records float64 // a second
	Burst   float64 // records
	Bytes   float64 // a second; as many may come at once
}

// Bucket is a pair of token buckets, one of records and one of bytes. The zero
// value is full.
type Bucket struct {
	mu             sync.Mutex
	at             time.Time
	records, bytes float64 // tokens left
}

// Take takes a record of n bytes out of the bucket. Where there is not enough
// it takes nothing and gives how long until there is.
func (b *Bucket) Take(r Rate, n int, now time.Time) (wait time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fill(r, now)
	// A record larger than a second's share passes when the bucket is full.
	need := min(float64(n), r.Bytes)
	missing := max((1-b.records)/r.Records, (need-b.bytes)/r.Bytes)
	if missing > 0 {
		return time.Duration(min(missing, maxSeconds) * float64(time.Second))
	}
	b.records--
	b.bytes -= need
	return 0
}

// Reserve takes a record out of the bucket ahead of time and gives how long its
// owner has to wait before using it, so that any number of them that wait at once
// still come one by one. Where that is longer than most it takes nothing and ok is
// false.
func (b *Bucket) Reserve(r Rate, most time.Duration, now time.Time) (wait time.Duration, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fill(r, now)
	if missing := (1 - b.records) / r.Records; missing > 0 {
		wait = time.Duration(min(missing, maxSeconds) * float64(time.Second))
	}
	if wait > most {
		return 0, false
	}
	b.records--
	return wait, true
}

// Spend takes n records out of the bucket, whether or not it has them, and gives how
// long its owner has to rest until nothing is owed.
func (b *Bucket) Spend(r Rate, n int, now time.Time) (rest time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fill(r, now)
	if b.records -= float64(n); b.records < 0 {
		rest = time.Duration(min(-b.records/r.Records, maxSeconds) * float64(time.Second))
	}
	return rest
}

// maxSeconds keeps a wait within what a Duration can say.
const maxSeconds = 1e9

// fill adds what has trickled in since the last time. Call with the lock held.
func (b *Bucket) fill(r Rate, now time.Time) {
	if b.at.IsZero() {
		b.records, b.bytes = r.Burst, r.Bytes
	} else if d := now.Sub(b.at).Seconds(); d > 0 {
		b.records = min(r.Burst, b.records+d*r.Records)
		b.bytes = min(r.Bytes, b.bytes+d*r.Bytes)
	}
	b.at = now
}

// Idle tells for how long nothing was asked of the bucket.
func (b *Bucket) Idle(now time.Time) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	return now.Sub(b.at)
}
