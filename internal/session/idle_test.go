package session

import (
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bubble"
)

// fake is a waiter that does what a test says.
type fake struct {
	spot  uint64
	conn  *conn
	ended atomic.Bool
	run   func()
}

func (f *fake) place() *uint64              { return &f.spot }
func (f *fake) connection() syscall.RawConn { return rawConn{f.conn} }
func (f *fake) over() bool                  { return f.ended.Load() }
func (f *fake) goOn(w *courier)             { w.leave(); f.run() }

func idle(t *testing.T) *Idle {
	t.Helper()
	l, err := NewIdle()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- l.Run(t.Context()) }()
	t.Cleanup(func() {
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return l
}

// Whoever takes long is waited for by nobody else, however many do.
func TestIdleNobodyWaitsForAnother(t *testing.T) {
	l := idle(t)
	const n = 4 * maxSpare
	var running atomic.Int32
	ended := make(chan struct{}, 3*n)
	for range 3 { // those that have ended then are more than are kept
		running.Store(0)
		all := make(chan struct{}) // closed when all run at once
		for range n {
			c, peer := pair(t)
			f := &fake{conn: c}
			f.run = func() {
				if running.Add(1) == n {
					close(all)
				}
				<-all
				ended <- struct{}{}
			}
			if !l.add(f) {
				t.Fatal("it cannot wait")
			}
			if _, err := peer.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		select {
		case <-all:
		case <-time.After(20 * time.Second):
			t.Fatalf("%d of %d are served while the others are", running.Load(), n)
		}
		for range n {
			<-ended
		}
	}
}

// What was ended before it waits is not left to wait.
func TestIdleEnded(t *testing.T) {
	l := idle(t)
	c, _ := pair(t)
	f := &fake{conn: c, run: func() { t.Error("it is served by two") }}
	f.ended.Store(true)
	if l.add(f) {
		t.Error("it waits, and nobody would wake it")
	}
	l.wake(f)
}

// However the goroutines that are spare come and go, there is always one that waits.
func TestIdleAlwaysSpare(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(16)) // more than there are: they are stopped anywhere
	l := idle(t)
	const n = 4 * maxSpare
	var running atomic.Int32
	var all chan struct{} // closed when all run at once
	var free func()       // closes it
	done := make(chan struct{}, n)
	var waiting [n]struct {
		fake
		peer net.Conn
	}
	for i := range waiting {
		w := &waiting[i]
		w.conn, w.peer = pair(t)
		w.run = func() {
			_, _ = w.conn.Read(make([]byte, 1))
			if running.Add(1) == n {
				free()
			}
			<-all
			done <- struct{}{}
		}
	}
	for round := range 3000 {
		running.Store(0)
		all = make(chan struct{})
		free = sync.OnceFunc(func() { close(all) })
		for i := range waiting {
			if !l.add(&waiting[i]) {
				t.Fatal("it cannot wait")
			}
			if _, err := waiting[i].peer.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		select {
		case <-all:
		case <-time.After(20 * time.Second):
			served := running.Load()
			free() // for the end of the test
			t.Fatalf("round %d: %d of %d are served while the others are", round, served, n)
		}
		for range n {
			<-done
		}
	}
}

// refusing is a broker for a handshake that grants nothing.
type refusing struct{ Broker }

func (refusing) Refused(Refusal) {}

// A handshake that nobody can wait for looks at times whether it goes on, and has the
// processor to itself no more than any other.
func TestHandshakeWithoutIdle(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		l, err := NewIdle()
		if err != nil {
			t.Fatal(err)
		}
		if err := l.poll.Close(); err != nil {
			t.Fatal(err)
		}
		c, _ := pair(t)
		done := make(chan struct{})
		h := NewHandshake(t.Context(), c, refusing{}, &Options{Idle: l, HandshakeTimeout: time.Hour}, func(bool) {}, func() { close(done) })
		h.Start()
		time.Sleep(time.Second) // which is never over while somebody is busy
		h.End()
		<-done
	})
}
