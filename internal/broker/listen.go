package broker

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/castrabus/castra/internal/session"
)

// listener is a socket with an accept loop that can be asked whether it lives.
type listener struct {
	net.Listener
	// asked has room for one question: there is one watchdog.
	asked  chan chan struct{}
	closed atomic.Bool
}

func newListener(ln net.Listener) *listener {
	return &listener{Listener: ln, asked: make(chan chan struct{}, 1)}
}

// tcpListener accepts connections of package session, where one of package net's gives
// its own, which cost twice as much.
type tcpListener struct {
	addr   net.Addr
	file   *os.File
	raw    syscall.RawConn
	accept func(fd uintptr) bool // into conn and err; one goroutine calls it
	conn   session.Conn
	err    error
	closed atomic.Bool
}

// newTCPListener takes ln over, or leaves it as it is.
func newTCPListener(ln *net.TCPListener) (*tcpListener, error) {
	file, err := ln.File()
	if err != nil {
		return nil, err
	}
	l := &tcpListener{addr: ln.Addr(), file: file}
	if l.raw, err = file.SyscallConn(); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	_ = ln.Close() // file is another descriptor of the same socket
	l.accept = func(fd uintptr) bool {
		l.conn, l.err = acceptOne(int(fd))
		return !errors.Is(l.err, syscall.EAGAIN)
	}
	return l, nil
}

// prepare sets what a connection takes from the socket that it is accepted on (tcp(7),
// socket(7)), so that none has to be told. unsent bounds what the kernel holds of what a
// guest is sent, if it is not 0: left alone it grows to megabytes, for each guest that
// does not read.
func prepare(ln *net.TCPListener, unsent int) {
	raw, err := ln.SyscallConn()
	if err != nil {
		return // it is closed
	}
	_ = raw.Control(func(fd uintptr) {
		_ = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1)
		// Guests beat more often than probes would be worth their while, and ten
		// thousand idle connections are probed 667 times a second.
		_ = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_KEEPALIVE, 0)
		if unsent > 0 {
			// The kernel doubles it for its own book-keeping.
			_ = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF, unsent/2)
		}
	})
}

func acceptOne(fd int) (session.Conn, error) {
	for {
		conn, from, err := syscall.Accept4(fd, syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC)
		switch {
		case err == nil:
			return session.NewConn(conn, guestAddr(from)), nil
		case errors.Is(err, syscall.EINTR), errors.Is(err, syscall.ECONNABORTED): // the guest has left the queue
		default:
			return nil, err
		}
	}
}

// guestAddr makes an address of a socket's, a word and no more: ten thousand are kept.
func guestAddr(from syscall.Sockaddr) net.Addr {
	switch a := from.(type) {
	case *syscall.SockaddrInet4:
		return tcpAddr(netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port)).String())
	case *syscall.SockaddrInet6:
		ip := netip.AddrFrom16(a.Addr).Unmap()
		if ip.Is6() && a.ZoneId != 0 {
			ip = ip.WithZone(strconv.FormatUint(uint64(a.ZoneId), 10))
		}
		return tcpAddr(netip.AddrPortFrom(ip, uint16(a.Port)).String())
	default:
		return tcpAddr("")
	}
}

type tcpAddr string

func (tcpAddr) Network() string  { return "tcp" }
func (a tcpAddr) String() string { return string(a) }

// Accept waits for a connection.
func (l *tcpListener) Accept() (net.Conn, error) {
	err := l.raw.Read(l.accept)
	switch {
	case err != nil && l.closed.Load():
		return nil, net.ErrClosed
	case err != nil:
		return nil, err
	case l.err != nil:
		return nil, l.err
	}
	return l.conn, nil
}

// Addr gives where it listens.
func (l *tcpListener) Addr() net.Addr { return l.addr }

// SetDeadline makes Accept give up then.
func (l *tcpListener) SetDeadline(t time.Time) error { return l.file.SetDeadline(t) }

// Close closes the socket.
func (l *tcpListener) Close() error {
	if !l.closed.CompareAndSwap(false, true) {
		return net.ErrClosed
	}
	return l.file.Close()
}

// ping returns when who accepts, and then who greets, has come to it.
func (l *listener) ping(ctx context.Context) error {
	d, ok := l.Listener.(interface{ SetDeadline(time.Time) error })
	if !ok {
		return nil
	}
	answer := make(chan struct{})
	select {
	case l.asked <- answer:
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := d.SetDeadline(time.Unix(1, 0)); err != nil { // makes Accept return
		return err
	}
	select {
	case <-answer:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// heard passes a ping on, which made Accept fail.
func (l *listener) heard(to chan<- chan struct{}) {
	if d, ok := l.Listener.(interface{ SetDeadline(time.Time) error }); ok {
		_ = d.SetDeadline(time.Time{})
	}
	select {
	case asked := <-l.asked:
		to <- asked
	default: // it was heard without
	}
}

// Close closes the socket. Who waits is not greeted any more.
func (l *listener) Close() error {
	l.closed.Store(true)
	return l.Listener.Close()
}
