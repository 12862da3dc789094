package presence

import (
	"math"
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
	if missing > 0 { // by less than a nanosecond, too: nothing was taken
		return max(1, time.Duration(min(missing, maxSeconds)*float64(time.Second)))
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
	d := now.Sub(b.at).Seconds()
	switch {
	case b.at.IsZero():
		b.records, b.bytes = r.Burst, r.Bytes
	case d <= 0: // who looked at the clock earlier may come later; what filled since is not to fill twice
		return
	default:
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

// Level is what is left in a bucket, for one of the castrad that comes next. Age is
// since when.
type Level struct {
	Records float64       `json:"records"`
	Bytes   float64       `json:"bytes"`
	Age     time.Duration `json:"age_ns"`
}

// worthCarrying is for how long something may not have been taken out of a bucket that
// is carried on; all but the slowest are full by then.
const worthCarrying = time.Hour

// level gives what is left, nil where that is as good as a new bucket.
func (b *Bucket) level(now time.Time) *Level {
	b.mu.Lock()
	defer b.mu.Unlock()
	l := Level{b.records, b.bytes, now.Sub(b.at)}
	if b.at.IsZero() || l.Age > worthCarrying || math.IsInf(l.Records+l.Bytes, 0) || math.IsNaN(l.Records+l.Bytes) {
		return nil
	}
	return &l
}

// setLevel makes what is left in a new bucket that of another one, elapsed ago.
func (b *Bucket) setLevel(l *Level, now time.Time, elapsed time.Duration) {
	if l == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	// Nothing fills before at, which is not to be ahead because of what a file says.
	b.records, b.bytes, b.at = l.Records, l.Bytes, now.Add(-max(0, l.Age)-elapsed)
}
