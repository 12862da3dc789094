// Package reserve keeps a TCP port for a test's daemons, which come and go.
package reserve

import (
	"syscall"
	"testing"
)

// Port gives a port of 127.0.0.1 at which nobody listens. Until the test ends only who
// asks for it by number gets it: one that was merely free a moment ago is now and then
// given to somebody else before its daemon starts, or starts again.
func Port(t testing.TB) int {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Close(fd) })
	// Who listens may share the address with who does not, if both say so (socket(7)), as
	// package net does.
	if err := syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return name.(*syscall.SockaddrInet4).Port
}
