package session

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"time"
)

// Couriers deliver to sessions: half as many goroutines as there are processors, which
// take the sessions that have something to hear in turn. A goroutine for each session and
// record costs as much as the delivery itself, where a thousand hear the same; and those
// who hear it run on the same host, so that couriers on all processors stand in the way
// of whom they deliver to.
//
// A courier never waits for one session while others have something to hear: before
// it waits, for a disk or for a guest, another takes its place among the Couriers, and
// it ends when it has done with that session.
type Couriers struct {
	mu     sync.Mutex
	wanted sync.Cond  // with mu: there is a session in queue, or closed
	queue  []*Session // each at most once, see delivering
	taken  int        // how many of queue have been attended to
	idle   int        // how many wait for wanted, less those signalled
	helped bool       // there is one in queue that Help has been promised for
	closed bool
	all    sync.WaitGroup
}

// NewCouriers makes them. Run serves.
func NewCouriers() *Couriers {
	c := &Couriers{}
	c.wanted.L = &c.mu
	return c
}

// Run delivers until ctx is done, which must not be before all sessions have ended. One
// goroutine calls it, once.
func (c *Couriers) Run(ctx context.Context) {
	for range max(1, runtime.GOMAXPROCS(0)/2) {
		c.all.Go(c.work)
	}
	<-ctx.Done()
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.wanted.Broadcast()
	c.all.Wait()
}

// Wake makes sessions look for something to deliver. It waits for none of them, and
// keeps nothing of the slice.
func (c *Couriers) Wake(sessions ...*Session) {
	c.mu.Lock()
	n := 0
	for _, s := range sessions {
		if s.deliveries.start() {
			c.put(s)
			n++
		}
	}
	c.call(n)
}

// Leave makes a session look for something to deliver as soon as somebody calls Help,
// which the caller sees to.
func (c *Couriers) Leave(s *Session) {
	c.mu.Lock()
	if s.deliveries.start() {
		c.put(s)
		c.helped = true
	}
	c.mu.Unlock()
}

// Help does a courier's work for one session. Who has committed a record is running
// already, and a courier would have to be woken. away is called, once, before the
// caller is kept waiting.
func (c *Couriers) Help(away func()) {
	var s *Session
	c.mu.Lock()
	if c.helped {
		c.helped = false
		s = c.first()
	}
	c.call(len(c.queue) - c.taken)
	if s != nil {
		w := &courier{of: c, away: away, helps: true}
		w.attend(s)
	}
}

// put adds s to the queue. Call with mu.
func (c *Couriers) put(s *Session) {
	if len(c.queue) == cap(c.queue) && c.taken > len(c.queue)/2 {
		n := copy(c.queue, c.queue[c.taken:])
		clear(c.queue[n:])
		c.queue, c.taken = c.queue[:n], 0
	}
	c.queue = append(c.queue, s)
}

// call unlocks, and has n sessions of the queue attended to.
func (c *Couriers) call(n int) {
	n = min(n, c.idle)
	c.idle -= n
	c.mu.Unlock()
	for range n {
		c.wanted.Signal()
	}
}

// again puts a session at the end of the queue that has more to hear.
func (c *Couriers) again(s *Session) {
	c.mu.Lock()
	c.put(s)
	c.call(1)
}

// next gives the session whose turn it is, nil when there will be no more.
func (c *Couriers) next() *Session {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		if s := c.first(); s != nil {
			return s
		}
		if c.closed {
			return nil
		}
		c.idle++
		c.wanted.Wait()
	}
}

// first takes the oldest of the queue, nil if there is none. Call with mu.
func (c *Couriers) first() *Session {
	if c.taken == len(c.queue) {
		c.queue, c.taken = c.queue[:0], 0
		return nil
	}
	s := c.queue[c.taken]
	c.queue[c.taken] = nil
	c.taken++
	return s
}

func (c *Couriers) work() {
	w := &courier{of: c, away: func() { c.all.Go(c.work) }}
	for !w.left {
		s := c.next()
		if s == nil {
			return
		}
		w.attend(s)
	}
}

// courier is one goroutine of Couriers, one that helps them, or one of [Idle].
type courier struct {
	of    *Couriers
	away  func() // has another take its place
	left  bool   // that was called
	helps bool
}

// leave is called before waiting, of nil by those who are no couriers.
func (w *courier) leave() {
	if w != nil && !w.left {
		w.left = true
		w.away()
	}
}

// take puts a token into ch.
func (w *courier) take(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
		w.leave()
		ch <- struct{}{}
	}
}

// attend writes what s's subscriptions have still to hear.
func (w *courier) attend(s *Session) {
	for {
		more, err := s.deliverSome(w)
		if err != nil && !errors.Is(err, errEnded) {
			s.End(TroubleIOError, err.Error())
		}
		if err != nil || !more {
			if !s.deliveries.next() {
				return
			}
			// Others may publish for s without a pause, and who helps has an ack to give.
			if w.helps && !w.left {
				w.of.again(s)
				return
			}
			continue
		}
		if rest := s.rests(); rest > 0 {
			w.leave()
			time.Sleep(rest)
		}
		if !w.left {
			w.of.again(s)
			return
		}
	}
}
