package broker

import (
	"context"
	"time"

	"github.com/castrabus/castra/internal/backoff"
	"github.com/castrabus/castra/internal/presence"
)

// Connections cost the broker work before anybody has proved anything, and all come
// from one address. Those that end in a session are as many as VMs may make them;
// the others have a share together, and beyond it wait.
var (
	// strangers are connections that got no session so far: how many a second are
	// accepted, and how many at once. What waits does so in the kernel's queue, of
	// which castrad.socket has 4096: an honest guest's turn comes well within the
	// time that a handshake may take, also where that queue was full at first and its
	// kernel had to ask again a second later.
	strangers = presence.Rate{Records: 2000, Burst: 2000, Bytes: 1}

	// refusals are answered at once as long as there are no more than these; then
	// each answer waits for tarpitDelay. It costs nothing to wait.
	refusals = presence.Rate{Records: 20, Burst: 300, Bytes: 1}
)

const tarpitDelay = 250 * time.Millisecond

// acceptTurn is how long to wait before the next connection is greeted.
func (b *Broker) acceptTurn() time.Duration {
	return b.strangers.Spend(strangers, 1, time.Now())
}

// acceptable gives back what a connection took that got a session.
func (b *Broker) acceptable() {
	b.strangers.Spend(strangers, -1, time.Now())
	b.early.Spend(early, -1, time.Now())
}

// tarpit holds the answer to a refused handshake back where there are many.
func (b *Broker) tarpit(ctx context.Context) {
	if b.refusals.Take(refusals, 0, time.Now()) > 0 {
		backoff.Sleep(ctx, tarpitDelay)
	}
}
