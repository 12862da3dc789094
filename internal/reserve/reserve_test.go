package reserve

import (
	"fmt"
	"net"
	"testing"
)

// However many ports are given out, a reserved one is not, and whoever names it has it,
// again and again.
func TestPort(t *testing.T) {
	port := Port(t)
	for range 40_000 { // more than there are
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		got := ln.Addr().(*net.TCPAddr).Port
		_ = ln.Close()
		if got == port {
			t.Fatalf("port %d is given to somebody else", port)
		}
	}
	for range 3 {
		ln, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port))
		if err != nil {
			t.Fatal(err)
		}
		conn, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.Close()
		_ = ln.Close()
	}
}
