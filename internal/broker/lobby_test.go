package broker

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bubble"
	"github.com/castrabus/castra/internal/session"
)

// crowd is a listener at which a number of connections wait, the first of which keeps
// who greets it until it is let go.
type crowd struct {
	waiting  chan session.Conn
	accepted atomic.Int32
	greeted  atomic.Int32
	gone     atomic.Int32
	resumed  atomic.Int32
	letGo    func()
	held     chan struct{} // closed by letGo

	mu     sync.Mutex
	wake   chan struct{} // closed when Accept is to fail
	struck bool          // it is
	closed bool
}

func newCrowd(t *testing.T, n int) *crowd {
	c := &crowd{waiting: make(chan session.Conn, n), held: make(chan struct{}), wake: make(chan struct{})}
	c.letGo = sync.OnceFunc(func() { close(c.held) })
	t.Cleanup(c.letGo) // a broker that is closed waits for who greets
	for range n {
		c.waiting <- &visitor{of: c}
	}
	return c
}

func (c *crowd) Accept() (net.Conn, error) {
	c.mu.Lock()
	wake, closed := c.wake, c.closed
	c.mu.Unlock()
	if closed {
		return nil, net.ErrClosed
	}
	select {
	case <-wake:
		return nil, os.ErrDeadlineExceeded
	default:
	}
	select {
	case v := <-c.waiting:
		c.accepted.Add(1)
		return v, nil
	case <-wake:
		return nil, os.ErrDeadlineExceeded
	}
}

func (c *crowd) SetDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case t.IsZero():
		c.wake, c.struck = make(chan struct{}), false
		c.resumed.Add(1)
	case !c.struck:
		close(c.wake)
		c.struck = true
	}
	return nil
}

func (c *crowd) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.closed = true
	if !c.struck {
		close(c.wake)
	}
	return nil
}

func (c *crowd) Addr() net.Addr { return &net.UnixAddr{Name: "crowd", Net: "unix"} }

// visitor is a connection that breaks when it is greeted.
type visitor struct {
	session.Conn
	of *crowd
}

func (v *visitor) RemoteAddr() net.Addr { return v.of.Addr() }

func (v *visitor) SyscallConn() (syscall.RawConn, error) {
	v.of.greeted.Add(1)
	<-v.of.held
	return nil, errors.New("broken")
}

func (v *visitor) Close() error {
	v.of.gone.Add(1)
	return nil
}

// Who waits to be greeted does not wait in the kernel's queue, which would be full.
func TestAcceptIsAheadOfGreetings(t *testing.T) {
	b := start(t, testOptions(t, t.TempDir()))
	n := int32(cap(b.room))
	c := newCrowd(t, int(n))
	b.Serve(c)
	eventually(t, "all are accepted", func() bool { return c.accepted.Load() == n })
	if got := c.greeted.Load(); got != 1 {
		t.Errorf("%d were greeted and not 1", got)
	}
	c.letGo()
	eventually(t, "all have been greeted", func() bool { return c.greeted.Load() == n && c.gone.Load() == n })
}

// Who keeps coming without getting anywhere waits in the kernel's queue, and not in two: the
// lobby is empty in a flood that lasts, at the rate that strangers have. The watchdog's
// question waits for one greeting, also behind a full lobby.
func TestLobbyInAFlood(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		b := &Broker{ctx: t.Context(), room: make(chan struct{}, lobbySeats)}
		b.sessions.Store(&session.Options{HandshakeTimeout: time.Hour})
		const n = 40_000
		c := newCrowd(t, n)
		c.letGo()
		l := newListener(c)
		b.guests.Go(func() { b.accept(l) })
		for range 10 { // seconds, in which those that may come early have
			time.Sleep(time.Second)
			asked := time.Now()
			if err := l.ping(t.Context()); err != nil || time.Since(asked) > time.Millisecond {
				t.Errorf("with %d in the lobby a ping took %v: %v", len(b.room), time.Since(asked), err)
			}
		}
		began := c.greeted.Load()
		for range 1000 {
			time.Sleep(time.Millisecond)
			if most := int32(2); c.accepted.Load()-c.greeted.Load() > most {
				t.Fatalf("%d wait to be greeted", c.accepted.Load()-c.greeted.Load())
			}
		}
		if got := float64(c.greeted.Load() - began); got < strangers.Records*0.9 || got > strangers.Records*1.1 {
			t.Errorf("%v were greeted in a second", got)
		}
		_ = l.Close()
		b.guests.Wait()
		if c.gone.Load() != c.accepted.Load() {
			t.Errorf("%d of %d are closed", c.gone.Load(), c.accepted.Load())
		}
	})
}

// A connection that led to a session gives its seat to another.
func TestSessionsGiveTheirSeats(t *testing.T) {
	b := start(t, testOptions(t, t.TempDir()))
	b.early.Spend(early, int(early.Burst), time.Now())
	b.acceptable()
	if b.early.Take(early, 0, time.Now()) > 0 {
		t.Error("there is no seat")
	}
}

// Whoever has not been greeted when the broker ends is not greeted any more, and nobody
// is left behind.
func TestCloseEmptiesTheLobby(t *testing.T) {
	b := start(t, testOptions(t, t.TempDir()))
	const n = 100
	c := newCrowd(t, n)
	b.Serve(c)
	eventually(t, "all are accepted", func() bool { return c.accepted.Load() == n })
	done := make(chan error, 1) // one result
	go func() { done <- b.Close() }()
	<-b.ctx.Done()
	c.letGo()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if c.greeted.Load() != 1 || c.gone.Load() != n {
		t.Errorf("%d greeted and %d closed, not 1 and %d", c.greeted.Load(), c.gone.Load(), n)
	}
}

// The watchdog sees when greetings stand still.
func TestPingGoesThroughTheLobby(t *testing.T) {
	b := start(t, testOptions(t, t.TempDir()))
	c := newCrowd(t, 1)
	b.Serve(c)
	eventually(t, "the first is being greeted", func() bool { return c.greeted.Load() == 1 })
	ctx, cancel := context.WithCancel(t.Context())
	pinged := make(chan error, 1) // one result
	go func() { pinged <- b.Ping(ctx) }()
	eventually(t, "who accepts has heard the question", func() bool { return c.resumed.Load() == 1 })
	cancel()
	if err := <-pinged; !errors.Is(err, context.Canceled) {
		t.Errorf("while nobody is greeted: %v", err)
	}
	c.letGo()
	if err := b.Ping(t.Context()); err != nil {
		t.Error(err)
	}
}

// A shorter time for handshakes holds for those that begin with it, also behind one that
// has more, or had.
func TestShorterHandshakeTimeout(t *testing.T) {
	o := testOptions(t, t.TempDir())
	o.HandshakeTimeout = time.Hour
	b := start(t, o)
	for _, stays := range []bool{false, true} {
		o.HandshakeTimeout = time.Hour
		b.configure(o.Settings)
		g := dial(t, b.addr) // and so greeted
		if !stays {
			_ = g.conn.Close()
			eventually(t, "it has left", func() bool {
				b.handshakes.mu.Lock()
				defer b.handshakes.mu.Unlock()
				return b.handshakes.all.Len() == 0
			})
		}
		o.HandshakeTimeout = time.Second
		b.configure(o.Settings)
		if got := dial(t, b.addr).line(); got != "error: read-timeout" {
			t.Errorf("where one stays is %v: %s", stays, got)
		}
	}
}
