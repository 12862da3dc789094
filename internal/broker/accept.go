package broker

import (
	"container/list"
	"errors"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/castrabus/castra/internal/backoff"
	"github.com/castrabus/castra/internal/logging"
	"github.com/castrabus/castra/internal/session"
)

const (
	// acceptPause is how long the accept loop waits after an error that trying at
	// once would only repeat.
	acceptPause = 100 * time.Millisecond
	// acceptLog is how often at most it is told of: a lack of descriptors comes
	// and goes with every connection.
	acceptLog = time.Minute
)

// accept takes in every connection. Who greets them keeps it waiting only where there are
// too many strangers.
func (b *Broker) accept(l *listener) {
	lobby := newLobby(b.room)
	defer close(lobby.seats)
	b.guests.Go(func() { b.greet(l, lobby) })
	var told time.Time
	for {
		conn, err := l.Accept()
		switch {
		case err == nil:
			b.guests.Add(1)
			b.usher(l, lobby, conn)
		case errors.Is(err, net.ErrClosed):
			return
		case errors.Is(err, os.ErrDeadlineExceeded):
			l.heard(lobby.questions)
		default:
			if time.Since(told) >= acceptLog {
				told = time.Now()
				logging.AcceptFailed.On(b.log).WithError(err).Error("cannot accept a connection; trying again")
			}
			pause := acceptPause
			if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
				// Somebody waits to be let in: room is made as it is where there
				// are too many handshakes.
				b.limited.hit(limitOpenFiles)
				if b.handshakes.evict() != nil {
					pause = acceptPause / 20
				}
			}
			if backoff.Sleep(b.ctx, pause); b.ctx.Err() != nil {
				return
			}
		}
	}
}

// serve greets a guest. Once the connection is closed ended is called.
func (b *Broker) serve(conn net.Conn, ended func()) {
	c, ok := conn.(session.Conn)
	if !ok {
		logging.AcceptFailed.On(b.log).WithField("addr", conn.RemoteAddr()).Errorf("a %T cannot carry a session", conn)
		_ = conn.Close()
		ended()
		return
	}
	var leave func()
	h := session.NewHandshake(b.ctx, c, b, b.sessionOptions(), func(granted bool) {
		leave()
		if granted {
			b.acceptable()
		}
	}, ended)
	var evicted *session.Handshake
	if leave, evicted = b.handshakes.enter(h); evicted != nil {
		b.bite(limitHandshakes, evicted.Remote(), "", session.TroubleQueueFull, session.ActionDisconnect,
			"too many unfinished handshakes, the oldest was closed")
	}
	h.Start()
}

// handshakes are the connections without a session. Every guest comes from the
// same address, so when there are too many the oldest goes: refusing newcomers
// would let one silent guest shut all others out.
type handshakes struct {
	max int

	mu    sync.Mutex
	all   list.List   // of *session.Handshake, the first to expire first
	timer *time.Timer // for the deadline of the first, or of one that has left; nil: none runs
	over  bool        // there are to be no more
}

// end ends them all, and those that come: nothing is owed to who has no session.
func (h *handshakes) end() {
	h.mu.Lock()
	h.over = true
	var all []*session.Handshake
	for e := h.all.Front(); e != nil; e = h.all.Front() {
		all = append(all, e.Value.(*session.Handshake))
		h.all.Remove(e) // and not all at once: those that leave would be counted once more
	}
	if h.timer != nil {
		h.timer.Stop()
	}
	h.mu.Unlock()
	for _, s := range all {
		s.End()
	}
}

// enter puts s on the list and gives the one that was ended for it, nil if there was
// room.
func (h *handshakes) enter(s *session.Handshake) (leave func(), evicted *session.Handshake) {
	h.mu.Lock()
	e := h.insert(s)
	full := h.over || h.max > 0 && h.all.Len() > h.max
	switch left := time.Until(s.Deadline()); {
	case h.over:
	case h.timer == nil:
		h.timer = time.AfterFunc(left, h.expire)
	case e == h.all.Front(): // the one that the timer was set for may have had more time
		h.timer.Reset(left)
	}
	h.mu.Unlock()
	if full {
		evicted = h.evict()
	}
	return func() {
		h.mu.Lock()
		h.all.Remove(e) // nothing if it has been removed
		h.mu.Unlock()
	}, evicted
}

// insert puts s behind those that are to be expired no later than it: that is the end, unless
// a reload has made the time shorter. Call with mu.
func (h *handshakes) insert(s *session.Handshake) *list.Element {
	for e := h.all.Back(); e != nil; e = e.Prev() {
		if !e.Value.(*session.Handshake).Deadline().After(s.Deadline()) {
			return h.all.InsertAfter(s, e)
		}
	}
	return h.all.PushFront(s)
}

// expire ends those that have taken too long. The timer runs on while there are any:
// nearly all are over before it is their turn.
func (h *handshakes) expire() {
	var late []*session.Handshake
	h.mu.Lock()
	h.timer = nil
	for e := h.all.Front(); e != nil && !h.over; e = h.all.Front() {
		s := e.Value.(*session.Handshake)
		if left := time.Until(s.Deadline()); left > 0 {
			h.timer = time.AfterFunc(left, h.expire)
			break
		}
		late = append(late, s)
		h.all.Remove(e)
	}
	h.mu.Unlock()
	for _, s := range late {
		s.Expire()
	}
}

// evict ends the oldest and gives it; nil if there is none.
func (h *handshakes) evict() *session.Handshake {
	h.mu.Lock()
	e := h.all.Front()
	if e != nil {
		h.all.Remove(e)
	}
	h.mu.Unlock()
	if e == nil {
		return nil
	}
	s := e.Value.(*session.Handshake)
	s.End()
	return s
}
