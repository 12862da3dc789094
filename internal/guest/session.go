package guest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/castrabus/castra/internal/token"
	"github.com/castrabus/castra/internal/wire"
)

const (
	// heartbeatEvery and silentAfter: contract 2 and 3. The host is asked for a
	// word every 15 s; three times without one mean that it is gone, be it that its
	// machine died and no packet says so.
	heartbeatEvery = 15 * time.Second
	silentAfter    = 45 * time.Second

	// readBuffer holds a handshake line and many small frames; a larger frame is
	// read around it.
	readBuffer = 16 << 10
)

// session is one granted connection. Its reader and its writer end together.
type session struct {
	conn net.Conn
	r    *bufio.Reader

	outbox *outbox
	subs   *table
	seen   func(seq uint64) // a record's number came by
	beat   func()           // a heartbeat was answered

	// wake has room for one: it says that there may be something to write, and
	// one such word is enough for any number of things.
	wake chan struct{}

	beats beats
	heard atomic.Uint64 // bytes of deliveries and gaps that came
}

// newSession makes the session of a granted connection. From now on publishes and
// subscriptions count on it; run must follow.
func newSession(conn net.Conn, r *bufio.Reader, u *uplink) *session {
	s := &session{
		conn: conn, r: r, outbox: u.outbox, subs: u.subs, seen: u.seen, beat: u.beat,
		wake: make(chan struct{}, 1),
	}
	s.beats.wake = s.nudge
	s.outbox.begin()
	s.subs.begin()
	return s
}

// run returns why the session ended, once both its goroutines have.
func (s *session) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(ctx, func() { _ = s.conn.Close() }) // wakes both from their system calls
	var writer sync.WaitGroup
	writer.Go(func() { cancel(s.write(ctx)) })
	cancel(s.read())
	writer.Wait()
	stop()
	s.subs.end()
	s.outbox.end()
	s.beats.end()
	return context.Cause(ctx)
}

// nudge makes the writer look for something to write. It does not wait.
func (s *session) nudge() { token.Leave(s.wake) }

// write sends what is to be sent, the urgent before the bulk: heartbeats and what is
// subscribed to do not wait for publishes that were spooled before them.
func (s *session) write(ctx context.Context) error {
	beat := time.NewTicker(heartbeatEvery)
	defer beat.Stop()
	retry := time.NewTimer(0)
	defer retry.Stop()
	var buf []byte
	due := false
	for {
		var wait time.Duration
		buf = s.beats.take(buf[:0], due)
		buf = s.subs.take(buf)
		buf, wait = s.outbox.take(buf)
		due = false
		if len(buf) > 0 {
			if err := s.send(buf); err != nil {
				return err
			}
			if cap(buf) > 2*takeBytes {
				buf = nil
			}
			select {
			case <-beat.C: // before the next bulk
				due = true
			default:
			}
			if wait == 0 {
				continue
			}
		}
		if wait > 0 {
			retry.Reset(wait)
		} else {
			retry.Stop()
		}
		select {
		case <-s.wake:
		case <-retry.C:
		case <-beat.C:
			due = true
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (s *session) send(b []byte) error {
	if err := s.conn.SetWriteDeadline(time.Now().Add(silentAfter)); err != nil {
		return fmt.Errorf("writing to the host: %w", plain(err))
	}
	if _, err := s.conn.Write(b); err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("the host took nothing for %v", silentAfter)
		}
		return fmt.Errorf("writing to the host: %w", plain(err))
	}
	return nil
}

// read takes in frames until the connection fails or the host breaks the protocol.
func (s *session) read() error {
	var frame []byte
	var dec wire.Decoder
	var m wire.Message
	for {
		if s.r.Buffered() == 0 { // not for each of many small frames
			if err := s.conn.SetReadDeadline(time.Now().Add(silentAfter)); err != nil {
				return fmt.Errorf("reading from the host: %w", plain(err))
			}
		}
		var err error
		frame, err = wire.ReadFrame(s.r, frame)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return fmt.Errorf("no word from the host for %v", silentAfter)
		case errors.Is(err, io.EOF):
			return errors.New("the host closed the connection")
		case err != nil:
			return fmt.Errorf("reading from the host: %w", plain(err))
		}
		if err := dec.Decode(frame, &m); err != nil {
			return fmt.Errorf("reading from the host: %w", err)
		}
		if m.Type == wire.TypePublish || m.Type == wire.TypeGap {
			s.heard.Add(uint64(len(frame)))
		}
		if err := s.take(&m); err != nil {
			return err
		}
	}
}

// take deals with one frame.
func (s *session) take(m *wire.Message) error {
	switch m.Type {
	case wire.TypePublish:
		s.seen(m.Seq)
		s.subs.deliver(m)
	case wire.TypeGap:
		s.subs.gap(m)
	case wire.TypeAck:
		return s.ack(m)
	case wire.TypeError:
		return &ended{code: wire.Clip(m.Code), reason: string(m.Reason)}
	default: // a newer host's; nothing in bus-v1 makes it matter
	}
	return nil
}

func (s *session) ack(m *wire.Message) error {
	switch string(m.Ack) {
	case "publish":
		if m.HasSeq {
			s.seen(m.Seq)
		}
		return s.outbox.answer(m)
	case "subscribe":
		if !s.subs.answer(m) {
			return fmt.Errorf("%w: an ack for a subscribe that was not sent", wire.ErrProtocol)
		}
	case "heartbeat":
		s.beat()
		s.beats.answered()
	case "unsubscribe":
		s.subs.dropped(m)
	default: // a newer host's
	}
	return nil
}

// ended is the host's word that it ends the session.
type ended struct{ code, reason string }

func (e *ended) Error() string {
	return fmt.Sprintf("the host ended the session: %s: %q", e.code, e.reason)
}

// beats counts a session's heartbeats and their acks, so that somebody can await an
// answer to what was sent before.
type beats struct {
	mu          sync.Mutex
	over        bool
	sent, acked uint64
	fences      []fence
	wake        func() // a heartbeat is to be sent; must not block
}

type fence struct {
	beat uint64        // the heartbeat whose ack is awaited
	done chan struct{} // never sent on, closed once
}

// fence gives a channel that is closed once the host has answered a heartbeat sent
// after this call, or the session has ended.
func (b *beats) fence() <-chan struct{} {
	b.mu.Lock()
	f := fence{beat: b.sent + 1, done: make(chan struct{})}
	if b.over {
		close(f.done)
	} else {
		b.fences = append(b.fences, f)
	}
	b.mu.Unlock()
	b.wake()
	return f.done
}

// take appends a heartbeat if one is due or awaited.
func (b *beats) take(dst []byte, due bool) []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n := len(b.fences); !due && (n == 0 || b.fences[n-1].beat <= b.sent) {
		return dst
	}
	b.sent++
	return wire.AppendHeartbeatFrame(dst)
}

func (b *beats) answered() {
	b.mu.Lock()
	b.acked++
	n := 0
	for n < len(b.fences) && b.fences[n].beat <= b.acked {
		n++
	}
	passed := b.fences[:n:n]
	b.fences = b.fences[n:]
	b.mu.Unlock()
	for _, f := range passed {
		close(f.done)
	}
}

func (b *beats) end() {
	b.mu.Lock()
	b.over = true
	fences := b.fences
	b.fences = nil
	b.mu.Unlock()
	for _, f := range fences {
		close(f.done)
	}
}
