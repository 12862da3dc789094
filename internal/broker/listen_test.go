package broker

import (
	"errors"
	"net"
	"strings"
	"syscall"
	"testing"
)

func listenTCP(t *testing.T, address string) *tcpListener {
	t.Helper()
	ln, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	tcp := ln.(*net.TCPListener)
	prepare(tcp, 64<<10)
	l, err := newTCPListener(tcp)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// A connection has its options from the socket that it was accepted on, and knows its
// guest by the address that package net would give it.
func TestListenerConnections(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0", "[::]:0"} {
		l := listenTCP(t, address)
		to := strings.Replace(l.Addr().String(), "[::]", "127.0.0.1", 1)
		guest, err := net.Dial("tcp", to)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = guest.Close() })
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		if got, want := c.RemoteAddr().String(), guest.LocalAddr().String(); got != want {
			t.Errorf("%s: the guest is %s, and not %s", address, got, want)
		}
		raw, err := c.(syscall.Conn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		cerr := raw.Control(func(fd uintptr) {
			for _, o := range []struct{ level, name, want int }{
				{syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1},
				{syscall.SOL_SOCKET, syscall.SO_KEEPALIVE, 0},
				{syscall.SOL_SOCKET, syscall.SO_SNDBUF, 64 << 10},
			} {
				if got, err := syscall.GetsockoptInt(int(fd), o.level, o.name); got != o.want || err != nil {
					t.Errorf("%s: option %d of %d is %d, %v, and not %d", address, o.name, o.level, got, err, o.want)
				}
			}
		})
		if cerr != nil {
			t.Error(cerr)
		}
	}
}

// Closing ends Accept in the word that the accept loop knows.
func TestListenerClose(t *testing.T) {
	l := listenTCP(t, "127.0.0.1:0")
	done := make(chan error, 1)
	go func() { _, err := l.Accept(); done <- err }()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept ends with %v", err)
	}
	if err := l.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closing again gives %v", err)
	}
}
