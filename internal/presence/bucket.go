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
	if b.at.IsZero() {
		b.records, b.bytes = r.Burst, r.Bytes
	} else if d := now.Sub(b.at).Seconds(); d > 0 {
		b.records = min(r.Burst, b.records+d*r.Records)
		b.bytes = min(r.Bytes, b.bytes+d*r.Bytes)
	}
	b.at = now
	// A record larger than a second's share passes when the bucket is full.
	need := min(float64(n), r.Bytes)
	missing := max((1-b.records)/r.Records, (need-b.bytes)/r.Bytes)
	if missing > 0 {
		return time.Duration(missing * float64(time.Second))
	}
	b.records--
	b.bytes -= need
	return 0
}
