package session

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"
)

// pair gives a connection of ours, and the other end as package net has it.
func pair(t *testing.T) (ours *conn, peer *net.UnixConn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.SetNonblock(fds[0], true); err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fds[1]), "peer")
	c, err := net.FileConn(f)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	ours, peer = NewConn(fds[0], &net.UnixAddr{Name: "guest"}).(*conn), c.(*net.UnixConn)
	t.Cleanup(func() { _ = ours.Close(); _ = peer.Close() })
	return ours, peer
}

// Each way to use a connection, before there was something to be waited for and after.
var uses = map[string]struct {
	read bool
	call func(c *conn) error
}{
	"Read":      {true, func(c *conn) error { _, err := c.Read(make([]byte, 8)); return err }},
	"raw.Read":  {true, func(c *conn) error { return rawConn{c}.Read(func(uintptr) bool { return false }) }},
	"Write":     {false, func(c *conn) error { _, err := c.Write(make([]byte, 16<<20)); return err }},
	"raw.Write": {false, func(c *conn) error { return rawConn{c}.Write(func(uintptr) bool { return false }) }},
}

func each(t *testing.T, test func(t *testing.T, c *conn, peer *net.UnixConn, read bool, call func() error)) {
	t.Helper()
	for name, use := range uses {
		for _, waited := range []bool{false, true} {
			if waited {
				name += " of one that was waited for"
			}
			t.Run(name, func(t *testing.T) {
				c, peer := pair(t)
				if waited {
					if err := c.waiting(); err != nil {
						t.Fatal(err)
					}
				}
				test(t, c, peer, use.read, func() error { return use.call(c) })
			})
		}
	}
}

// A deadline in the past keeps even what could be done at once from being done: that is
// how a session is ended whose guest never stops to send.
func TestConnDeadlinePassed(t *testing.T) {
	each(t, func(t *testing.T, c *conn, peer *net.UnixConn, read bool, call func() error) {
		if _, err := peer.Write([]byte("there is something")); err != nil {
			t.Fatal(err)
		}
		set := c.SetWriteDeadline
		if read {
			set = c.SetReadDeadline
		}
		for _, d := range []func(time.Time) error{set, c.SetDeadline} {
			if err := d(time.Unix(1, 0)); err != nil {
				t.Fatal(err)
			}
			if err := call(); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%v, and not that the deadline has passed", err)
			}
			if err := c.SetDeadline(time.Time{}); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// A deadline that was set before there was anything to wait for counts then.
func TestConnDeadlineComes(t *testing.T) {
	each(t, func(t *testing.T, c *conn, _ *net.UnixConn, _ bool, call func() error) {
		if err := c.SetDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if err := call(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%v, and not that the deadline has passed", err)
		}
	})
}

// Who waits is woken by a deadline that is set then, and by the end.
func TestConnWakes(t *testing.T) {
	for _, end := range []string{"deadline", "close"} {
		each(t, func(t *testing.T, c *conn, _ *net.UnixConn, _ bool, call func() error) {
			done := make(chan error, 1)
			go func() { done <- call() }()
			for { // until it waits, or is about to
				c.mu.RLock()
				waits := c.file != nil
				c.mu.RUnlock()
				if waits {
					break
				}
				time.Sleep(time.Millisecond)
			}
			if end == "close" {
				if err := c.Close(); err != nil {
					t.Fatal(err)
				}
				if err := <-done; err == nil {
					t.Error("it goes on, though the connection is closed")
				}
				return
			}
			if err := c.SetDeadline(time.Unix(1, 0)); err != nil {
				t.Fatal(err)
			}
			if err := <-done; !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%v, and not that the deadline has passed", err)
			}
		})
	}
}

// A closed connection is never used again: its number may be another file's.
func TestConnClosed(t *testing.T) {
	each(t, func(t *testing.T, c *conn, peer *net.UnixConn, _ bool, call func() error) {
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		var again [4]int // the number is given out again
		for i := range again {
			fd, err := syscall.Dup(0)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = syscall.Close(fd) }()
			again[i] = fd
		}
		for what, err := range map[string]error{
			"use": call(), "control": rawConn{c}.Control(func(fd uintptr) { t.Errorf("%d is used", fd) }),
			"shutdown": c.CloseWrite(), "deadline": c.SetDeadline(time.Now()), "close": c.Close(),
		} {
			if !errors.Is(err, net.ErrClosed) {
				t.Errorf("%s: %v", what, err)
			}
		}
		if n, err := peer.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("the other end reads %d, %v", n, err)
		}
	})
}

// All of a write arrives, however large it is.
func TestConnWritesAll(t *testing.T) {
	c, peer := pair(t)
	const size = 4 << 20
	done := make(chan error, 1)
	go func() {
		n, err := c.Write(make([]byte, size))
		if err == nil && n != size {
			err = io.ErrShortWrite
		}
		done <- errors.Join(err, c.CloseWrite())
	}()
	n, err := io.Copy(io.Discard, peer)
	if err := errors.Join(err, <-done); err != nil || n != size {
		t.Errorf("%d bytes arrive, %v", n, err)
	}
}
