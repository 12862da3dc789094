package session

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// NewConn makes a connection of fd, a stream socket that does not block, and takes it
// over.
//
// A connection of package net is made known to the runtime's poller when it is accepted,
// and asked for both its addresses, and takes part in each deadline there is: of all that
// a guest that shakes hands, subscribes and beats needs nothing, since [Idle] waits for
// it. This one does so once something has to be waited for by a goroutine.
func NewConn(fd int, remote net.Addr) Conn { return &conn{fd: fd, remote: remote} }

type conn struct {
	remote net.Addr

	// mu is held for reading while fd is used, which never waits, so that nobody uses
	// the number when it is another file's.
	mu          sync.RWMutex
	fd          int             // -1: closed
	read, write time.Time       // the deadlines, as long as file is nil
	file        *os.File        // fd, once something was waited for; nil: nothing was
	raw         syscall.RawConn // file's
}

// rawConn is a conn's other face: both have Read and Write.
type rawConn struct{ *conn }

// RemoteAddr gives the guest's address.
func (c *conn) RemoteAddr() net.Addr { return c.remote }

// LocalAddr makes it a net.Conn. Nobody asks.
func (c *conn) LocalAddr() net.Addr { return c.remote }

// SyscallConn gives access to the descriptor.
func (c *conn) SyscallConn() (syscall.RawConn, error) { return rawConn{c}, nil }

// begin is called before fd is used, with the deadline for that. Where it gives true
// the caller has mu for reading, else there was something to be waited for before, and
// it is up to file.
func (c *conn) begin(deadline *time.Time) (direct bool, err error) {
	c.mu.RLock()
	switch {
	case c.fd < 0:
		err = net.ErrClosed
	case c.file != nil:
	case !deadline.IsZero() && !time.Now().Before(*deadline):
		err = os.ErrDeadlineExceeded
	default:
		return true, nil
	}
	c.mu.RUnlock()
	return false, err
}

// waiting sees to it that the connection can be waited for.
func (c *conn) waiting() (err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.fd < 0:
		return net.ErrClosed
	case c.file != nil:
		return nil
	}
	f := os.NewFile(uintptr(c.fd), "guest") // which sees that it does not block
	if c.raw, err = f.SyscallConn(); err == nil {
		err = errors.Join(f.SetReadDeadline(c.read), f.SetWriteDeadline(c.write))
	}
	c.file = f
	return err
}

// Control is of syscall.RawConn, as are Read and Write.
func (c rawConn) Control(f func(fd uintptr)) error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.fd < 0 {
		return net.ErrClosed
	}
	f(uintptr(c.fd))
	return nil
}

// Read calls f until it gives true, first at once and then when there is something to
// read.
func (c rawConn) Read(f func(fd uintptr) bool) error {
	return c.until(&c.read, f, syscall.RawConn.Read)
}

// Write is like Read.
func (c rawConn) Write(f func(fd uintptr) bool) error {
	return c.until(&c.write, f, syscall.RawConn.Write)
}

// until calls f at once, and has wait call it where that is not enough.
func (c rawConn) until(deadline *time.Time, f func(fd uintptr) bool, wait func(syscall.RawConn, func(fd uintptr) bool) error) error {
	direct, err := c.begin(deadline)
	if direct {
		done := f(uintptr(c.fd))
		if c.mu.RUnlock(); done {
			return nil
		}
		err = c.waiting()
	}
	if err != nil {
		return err
	}
	return wait(c.raw, f)
}

// Read reads what there is, and waits where there is nothing.
func (c *conn) Read(b []byte) (n int, err error) {
	direct, err := c.begin(&c.read)
	if direct {
		n, err = readOnce(uintptr(c.fd), b)
		if c.mu.RUnlock(); !errors.Is(err, syscall.EAGAIN) {
			return n, err
		}
		err = c.waiting()
	}
	if err != nil {
		return 0, err
	}
	return c.file.Read(b)
}

// Write writes all of b, and waits where there is no room.
func (c *conn) Write(b []byte) (n int, err error) {
	direct, err := c.begin(&c.write)
	if direct {
		n, err = writeOnce(uintptr(c.fd), b)
		if c.mu.RUnlock(); n == len(b) || err != nil && !errors.Is(err, syscall.EAGAIN) {
			return n, err
		}
		err = c.waiting()
	}
	if err != nil {
		return n, err
	}
	m, err := c.file.Write(b[n:])
	return n + m, err
}

// SetDeadline sets when reading and writing stop to wait.
func (c *conn) SetDeadline(t time.Time) error {
	return c.setDeadline(t, []*time.Time{&c.read, &c.write}, (*os.File).SetDeadline)
}

// SetReadDeadline is like SetDeadline.
func (c *conn) SetReadDeadline(t time.Time) error {
	return c.setDeadline(t, []*time.Time{&c.read}, (*os.File).SetReadDeadline)
}

// SetWriteDeadline is like SetDeadline.
func (c *conn) SetWriteDeadline(t time.Time) error {
	return c.setDeadline(t, []*time.Time{&c.write}, (*os.File).SetWriteDeadline)
}

func (c *conn) setDeadline(t time.Time, of []*time.Time, set func(*os.File, time.Time) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		return net.ErrClosed
	}
	if c.file != nil {
		return set(c.file, t)
	}
	for _, d := range of {
		*d = t
	}
	return nil
}

// CloseWrite shuts down the writing side.
func (c *conn) CloseWrite() (err error) {
	rawErr := rawConn{c}.Control(func(fd uintptr) { err = syscall.Shutdown(int(fd), syscall.SHUT_WR) })
	return errors.Join(rawErr, err)
}

// Close closes the connection. Whoever waits for it then waits no more.
func (c *conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		return net.ErrClosed
	}
	fd := c.fd
	c.fd = -1
	if c.file != nil {
		return c.file.Close()
	}
	return syscall.Close(fd)
}

// readOnce reads from a descriptor that does not block.
func readOnce(fd uintptr, b []byte) (n int, err error) {
	for {
		if n, err = syscall.Read(int(fd), b); !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if n == 0 && err == nil {
		err = io.EOF
	}
	return max(0, n), err
}

// writeOnce is like readOnce.
func writeOnce(fd uintptr, b []byte) (n int, err error) {
	for {
		if n, err = syscall.Write(int(fd), b); !errors.Is(err, syscall.EINTR) {
			return max(0, n), err
		}
	}
}
