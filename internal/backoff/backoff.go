// Package backoff spaces out attempts at something that keeps failing, and waits.
package backoff

import (
	"context"
	"math/rand/v2"
	"time"
)

// Backoff gives the pauses between attempts: each is drawn evenly from between
// the lowest and a ceiling that doubles from attempt to attempt, up to the
// highest. The first is drawn already, so that ten thousand guests whose host
// restarted do not come back in step. A Backoff belongs to one goroutine.
type Backoff struct {
	min, max time.Duration
	ceiling  time.Duration       // of the pause before; 0: there was none
	draw     func(n int64) int64 // a number from [0, n)
}

// New makes a Backoff whose pauses are at least lowest, which is above 0, and at
// most highest.
func New(lowest, highest time.Duration) *Backoff { return newWith(lowest, highest, rand.Int64N) }

// newWith is New with a random source of the caller's, which gives a number from
// [0, n).
func newWith(lowest, highest time.Duration, draw func(n int64) int64) *Backoff {
	return &Backoff{min: lowest, max: max(lowest, highest), draw: draw}
}

// Next gives the next pause.
func (b *Backoff) Next() time.Duration {
	b.ceiling = min(b.max, 2*max(b.min, b.ceiling))
	return b.min + time.Duration(b.draw(int64(b.ceiling-b.min)+1))
}

// Sleep waits for d, and not beyond ctx.
func Sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// Reset begins anew, after a success that lasted.
func (b *Backoff) Reset() { b.ceiling = 0 }
