package session

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"
)

const (
	// deliverySize is about how many bytes of deliveries go out in one write.
	// Acks wait for one such write at most.
	deliverySize = 64 << 10

	// slowStep is how much a guest with a full buffer must take within
	// WriteTimeout: however slow, it is alive while it reads.
	slowStep = 4 << 10

	// slowNotice is after how long without taking anything a guest is called slow.
	slowNotice = 5 * time.Second

	// maxWaiting bounds the answers that wait for the writer. Beyond it frames
	// are no longer read: the guest has to read first.
	maxWaiting = 64 << 10
)

// outputs are lent for one write: a session with nothing to deliver holds none.
var outputs = sync.Pool{New: func() any { b := make([]byte, 0, deliverySize+readSize); return &b }}

// attempt is one write(2), and what came of it. They are lent, since what is given to
// RawConn.Write would be allocated for each.
type attempt struct {
	b    []byte
	n    int
	err  error
	once func(fd uintptr) bool
}

var attempts = sync.Pool{New: func() any {
	a := &attempt{}
	a.once = func(fd uintptr) bool {
		a.n, a.err = writeOnce(fd, a.b)
		return true
	}
	return a
}}

// delivering says whether somebody delivers, or is about to: a courier, whom the
// session waits for in their queue.
type delivering struct {
	mu      sync.Mutex
	running bool
	again   bool          // something came up meanwhile
	closed  bool          // no more
	done    chan struct{} // closed by the last one; made by wait
}

// start tells whether the caller has to see to it that somebody delivers.
func (d *delivering) start() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return false
	}
	if d.running {
		d.again = true
		return false
	}
	d.running = true
	return true
}

// next tells who delivers whether to go round once more.
func (d *delivering) next() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.again && !d.closed {
		d.again = false
		return true
	}
	d.running = false
	if d.done != nil {
		close(d.done)
	}
	return false
}

// wait returns when nobody delivers; nobody begins again.
func (d *delivering) wait() {
	d.mu.Lock()
	d.closed = true
	if !d.running {
		d.mu.Unlock()
		return
	}
	d.done = make(chan struct{})
	d.mu.Unlock()
	<-d.done
}

// deliverSome delivers one write's worth. The right to write is taken only once
// there is something to write: a disk that is slow to read from holds no ack up.
func (s *Session) deliverSome(w *courier) (more bool, err error) {
	w.take(s.reading)
	defer func() { <-s.reading }()
	if s.ended.Load() != nil {
		return false, errEnded
	}
	bufp := outputs.Get().(*[]byte)
	defer outputs.Put(bufp)
	out := (*bufp)[:0]
	subs := s.subscriptions()
	s.turn++ // each gets to be the first, so that none starves behind another's backlog
	for i := range subs {
		var again bool
		if out, again, err = subs[(s.turn+i)%len(subs)].fill(w, out); err != nil {
			return false, err
		}
		more = more || again
	}
	if len(out) == 0 {
		return more, nil
	}
	w.take(s.writer)
	if err = s.send(w, out); err != nil {
		<-s.writer
		return false, err
	}
	return more, s.release(w)
}

// write sends answers, or leaves them to whoever is writing. w leaves before it waits.
func (s *Session) write(w *courier, b []byte) error {
	s.waitMu.Lock()
	select {
	case s.writer <- struct{}{}:
		s.waitMu.Unlock()
	default:
		if len(s.waiting)+len(b) <= maxWaiting {
			s.waiting = append(s.waiting, b...)
			s.waitMu.Unlock()
			return nil
		}
		s.waitMu.Unlock()
		w.take(s.writer)
	}
	if err := s.send(w, b); err != nil {
		<-s.writer
		return err
	}
	return s.release(w)
}

// release gives the right to write back, once the answers that waited for it
// are written. It is given back under the lock under which write looks for it,
// so that no answer is left behind. w is who delivers, nil for others.
func (s *Session) release(w *courier) error {
	for {
		s.waitMu.Lock()
		b := s.waiting
		s.waiting = nil
		if len(b) == 0 {
			<-s.writer
			s.waitMu.Unlock()
			return nil
		}
		s.waitMu.Unlock()
		if err := s.send(w, b); err != nil {
			<-s.writer
			return err
		}
	}
}

// send writes b, whole frames. Call with the right to write. A guest that takes
// nothing for WriteTimeout loses its session.
func (s *Session) send(w *courier, b []byte) error {
	if s.ended.Load() != nil {
		return s.keep(b)
	}
	a := attempts.Get().(*attempt)
	a.b, a.n, a.err = b, 0, nil
	waitErr := s.raw.Write(a.once)
	n, err := a.n, a.err
	a.b = nil
	attempts.Put(a)
	switch {
	case n == len(b):
		s.torn = false
		return nil
	case waitErr != nil:
		err = waitErr
	case err == nil || errors.Is(err, syscall.EAGAIN):
		var m int
		w.leave()
		m, err = s.sendSlowly(b[n:])
		n += m
	}
	if err == nil {
		s.torn = false
		return nil
	}
	s.torn = s.torn || n > 0
	if errors.Is(err, os.ErrDeadlineExceeded) {
		s.End(TroubleSlowConsumer, s.slowness(len(b)-n, s.opts.WriteTimeout)) // unless it was ended already
		err = errEnded
	}
	if errors.Is(err, errEnded) {
		return s.keep(b[n:])
	}
	return fmt.Errorf("writing to the guest: %w", err)
}

// sendSlowly writes to a connection whose buffer is full, and gives how much it
// wrote.
func (s *Session) sendSlowly(b []byte) (n int, err error) {
	defer s.stuck.Store(0)
	for n < len(b) {
		s.stuck.Store(int64(len(b) - n))
		m, err := s.sendStep(b[n:], min(len(b)-n, slowStep))
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, s.conn.SetWriteDeadline(time.Time{})
}

// sendStep writes the first size bytes of b within WriteTimeout, and tells of a
// guest that takes its time.
func (s *Session) sendStep(b []byte, size int) (n int, err error) {
	end := time.Now().Add(s.opts.WriteTimeout)
	for n < size {
		next := time.Now().Add(slowNotice)
		if next.After(end) {
			next = end
		}
		if err := s.conn.SetWriteDeadline(next); err != nil {
			return n, err
		}
		if s.ended.Load() != nil { // End came first, and its deadline was just replaced
			return n, errEnded
		}
		m, err := s.conn.Write(b[n:size])
		n += m
		if errors.Is(err, os.ErrDeadlineExceeded) && s.ended.Load() == nil && time.Now().Before(end) {
			if s.notes().slow.due() > 0 {
				s.broker.Trouble(s, TroubleSlowConsumer, ActionThrottle, s.slowness(len(b)-n, slowNotice))
			}
			continue
		}
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// slowness names what a guest does not read, and how much of it there is.
func (s *Session) slowness(unsent int, since time.Duration) string {
	topic := ""
	var most uint64
	committed := s.opts.Log.Committed()
	for _, sub := range s.subscriptions() {
		if lag := sub.lag(committed); lag >= most {
			most, topic = lag, sub.topic
		}
	}
	return fmt.Sprintf("topic %q lags by %d records, %d bytes unread for %v", topic, most, unsent, since)
}
