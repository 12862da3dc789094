package broker

import (
	"sync"

	"github.com/castrabus/castra/internal/presence"
	"github.com/castrabus/castra/internal/session"
)

// Park takes in a session that has stopped, see [session.Broker].
func (b *Broker) Park(s *session.Session) (handedOver bool) { return b.parking.stopped(s, true) }

// parking is where sessions wait until it is known what becomes of them.
type parking struct {
	mu      sync.Mutex
	moving  map[*session.Session]struct{} // those that have not stopped yet
	parked  map[*session.Session]bool     // those that have; true: to be handed over
	done    chan struct{}                 // closed when none is moving
	settled chan struct{}                 // closed when it is known
	kept    bool                          // those to be handed over are
}

// begin waits for all the sessions to stop; done is closed when they have.
func (p *parking) begin(all []presence.Session) (done <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.moving = make(map[*session.Session]struct{}, len(all))
	p.parked = make(map[*session.Session]bool, len(all))
	p.done, p.settled = make(chan struct{}), make(chan struct{})
	for _, s := range all {
		if s, ok := s.(*session.Session); ok {
			p.moving[s] = struct{}{}
		}
	}
	if len(p.moving) == 0 {
		close(p.done)
	}
	return p.done
}

// stopped notes that s has ended, or parks and then waits for what becomes of it.
func (p *parking) stopped(s *session.Session, parks bool) (handedOver bool) {
	p.mu.Lock()
	if _, ok := p.moving[s]; ok {
		if delete(p.moving, s); len(p.moving) == 0 {
			close(p.done)
		}
	}
	if parks {
		p.parked[s] = false
	}
	settled := p.settled
	p.mu.Unlock()
	if !parks {
		return false
	}
	<-settled
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.kept && p.parked[s]
}

// running counts those that have not stopped.
func (p *parking) running() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.moving)
}

// holds tells whether s has stopped and waits.
func (p *parking) holds(s *session.Session) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ok := p.parked[s]
	return ok
}

// take makes s, which waits, one of those to be handed over.
func (p *parking) take(s *session.Session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.parked[s] = true
}

// settle lets those that wait go; kept tells whether what was to be handed over is.
func (p *parking) settle(kept bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.kept = kept
	close(p.settled)
}
