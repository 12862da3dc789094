package session

import (
	"sync/atomic"
	"syscall"
	"testing"
	"time"
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
func (f *fake) goOn()                       { f.run() }

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
