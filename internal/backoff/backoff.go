// Package backoff spaces out attempts at something that keeps failing.
package backoff

import (
	"math/rand/v2"
	"time"
)

// Backoff gives the pauses between attempts: each drawn evenly from zero to a
// ceiling that doubles from attempt to attempt ("full jitter"), so that ten
// thousand guests whose host restarted do not come back in step. It belongs to
// one goroutine.
type Backoff struct {
	min, max time.Duration
	ceiling  time.Duration
	draw     func(n int64) int64 // a number from [0, n)
}

// New makes a Backoff whose pauses are at least lowest and at most highest.
func New(lowest, highest time.Duration) *Backoff { return NewWith(lowest, highest, rand.Int64N) }

// NewWith is New with a random source of the caller's, for tests.
func NewWith(lowest, highest time.Duration, draw func(n int64) int64) *Backoff {
	return &Backoff{min: lowest, max: max(lowest, highest), draw: draw}
}

// Next gives the next pause.
func (b *Backoff) Next() time.Duration {
	if b.ceiling == 0 {
		b.ceiling = b.min
	}
	pause := max(b.min, time.Duration(b.draw(int64(b.ceiling)+1)))
	b.ceiling = min(b.max, 2*b.ceiling)
	return pause
}

// Reset begins anew, after a success that lasted.
func (b *Backoff) Reset() { b.ceiling = 0 }
