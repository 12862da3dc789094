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

// delivering says whether the goroutine that delivers runs. It is started when
// there is something to deliver and ends when there is not, so that an idle
// session costs one goroutine only.
type delivering struct {
	mu      sync.Mutex
	running bool
	again   bool          // something came up while it ran
	closed  bool          // no more
	done    chan struct{} // closed by the last one; made by wait
}

// start tells whether the caller has to start the goroutine.
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

// next tells the goroutine whether to go round once more.
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

// wait returns when the goroutine has ended; it is not started again.
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

// Wake makes the session look for something to deliver. It does not wait.
func (s *Session) Wake() {
	if s.deliveries.start() {
		go s.deliver()
	}
}

// deliver writes what the subscriptions have still to hear.
func (s *Session) deliver() {
	for {
		if err := s.deliverAll(); err != nil && !errors.Is(err, errEnded) {
			s.End(TroubleIOError, err.Error())
		}
		if !s.deliveries.next() {
			return
		}
	}
}

func (s *Session) deliverAll() error {
	for {
		more, err := s.deliverSome()
		if err != nil || !more {
			return err
		}
		if rest := s.rests(); rest > 0 {
			time.Sleep(rest)
		}
	}
}

// deliverSome delivers one write's worth. The right to write is taken only once
// there is something to write: a disk that is slow to read from holds no ack up.
func (s *Session) deliverSome() (more bool, err error) {
	s.reading <- struct{}{}
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
		if out, again, err = subs[(s.turn+i)%len(subs)].fill(out); err != nil {
			return false, err
		}
		more = more || again
	}
	if len(out) == 0 {
		return more, nil
	}
	s.writer <- struct{}{}
	if err = s.send(out); err != nil {
		<-s.writer
		return false, err
	}
	return more, s.release()
}

// write sends answers, or leaves them to whoever is writing.
func (s *Session) write(b []byte) error {
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
		s.writer <- struct{}{}
	}
	if err := s.send(b); err != nil {
		<-s.writer
		return err
	}
	return s.release()
}

// release gives the right to write back, once the answers that waited for it
// are written. It is given back under the lock under which write looks for it,
// so that no answer is left behind.
func (s *Session) release() error {
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
		if err := s.send(b); err != nil {
			<-s.writer
			return err
		}
	}
}

// send writes b, whole frames. Call with the right to write. A guest that takes
// nothing for WriteTimeout loses its session.
func (s *Session) send(b []byte) error {
	if s.ended.Load() != nil {
		return s.keep(b)
	}
	var n int
	var err error
	waitErr := s.raw.Write(func(fd uintptr) bool {
		for {
			if n, err = syscall.Write(int(fd), b); !errors.Is(err, syscall.EINTR) {
				return true
			}
		}
	})
	n = max(0, n)
	switch {
	case n == len(b):
		s.torn = false
		return nil
	case waitErr != nil:
		err = waitErr
	case err == nil || errors.Is(err, syscall.EAGAIN):
		var m int
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
