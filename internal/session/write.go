package session

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"
)

// deliverySize is about how many bytes of deliveries go out in one write. Acks
// wait for one such write at most.
const deliverySize = 64 << 10

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
	}
}

// deliverSome delivers one write's worth. The token is held only for that long,
// so that acks get their turn.
func (s *Session) deliverSome() (more bool, err error) {
	s.writer <- struct{}{}
	defer func() { <-s.writer }()
	if s.ended.Load() != nil {
		return false, errEnded
	}
	bufp := outputs.Get().(*[]byte)
	defer outputs.Put(bufp)
	out := (*bufp)[:0]
	for _, sub := range s.subscriptions() {
		var again bool
		if out, again, err = sub.fill(out); err != nil {
			return false, err
		}
		more = more || again
	}
	if len(out) > 0 {
		err = s.send(out)
	}
	return more, err
}

// write sends answers.
func (s *Session) write(b []byte) error {
	s.writer <- struct{}{}
	defer func() { <-s.writer }()
	return s.send(b)
}

// send writes b. Call with the token. A guest that leaves it unread for
// WriteTimeout loses its session.
func (s *Session) send(b []byte) error {
	var n int
	var err error
	waitErr := s.raw.Write(func(fd uintptr) bool {
		for {
			if n, err = syscall.Write(int(fd), b); !errors.Is(err, syscall.EINTR) {
				return true
			}
		}
	})
	if n == len(b) {
		return nil
	}
	if err != nil && !errors.Is(err, syscall.EAGAIN) {
		return fmt.Errorf("writing to the guest: %w", err)
	}
	if waitErr == nil {
		waitErr = s.sendSlowly(b[max(0, n):])
	}
	if errors.Is(waitErr, os.ErrDeadlineExceeded) {
		s.End(TroubleSlowConsumer, s.slowness(len(b)-max(0, n)))
		return errEnded
	}
	return waitErr
}

// sendSlowly writes to a connection whose buffer is full.
func (s *Session) sendSlowly(b []byte) error {
	if err := s.conn.SetWriteDeadline(time.Now().Add(s.opts.WriteTimeout)); err != nil {
		return err
	}
	if s.ended.Load() != nil { // End came first, and its deadline was just replaced
		return errEnded
	}
	if _, err := s.conn.Write(b); err != nil {
		return err
	}
	return s.conn.SetWriteDeadline(time.Time{})
}

func (s *Session) slowness(unsent int) string {
	topic := ""
	var most uint64
	committed := s.opts.Log.Committed()
	for _, sub := range s.subscriptions() {
		if lag := sub.lag(committed); lag >= most {
			most, topic = lag, sub.topic
		}
	}
	return fmt.Sprintf("topic %q lags by %d records, %d bytes unread for %v", topic, most, unsent, s.opts.WriteTimeout)
}
