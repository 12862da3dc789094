package broker

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/handover"
	"github.com/castrabus/castra/internal/session"
)

// A broker that is left something useless serves without it, and closes the
// connections, whose guests come back by themselves.
func TestInheritRubbish(t *testing.T) {
	good := func(t *testing.T) (string, Options, *guest) {
		b := start(t, testOptions(t, t.TempDir()))
		g := connect(t, b.addr, "g")
		o := leave(t, b, 1)
		state, conns, err := handover.Unpack(o.Inherit)
		if err != nil || len(conns) != 1 {
			t.Fatal(conns, err)
		}
		var text bytes.Buffer
		_, _ = text.ReadFrom(state)
		_ = conns[0].Close()
		return text.String(), o, g
	}
	for name, change := range map[string]func(string) string{
		"nothing":            func(string) string { return "" },
		"no JSON":            func(string) string { return "\x00\x01\n" },
		"of another version": func(s string) string { return strings.Replace(s, `"version":`, `"version":9`, 1) },
		"unknown member":     func(s string) string { return strings.Replace(s, `"vm":"g"`, `"vm":"g","mood":1`, 1) },
		"no VM":              func(s string) string { return s[:strings.IndexByte(s, '\n')+1] },
		"a VM twice":         func(s string) string { return s + s[strings.IndexByte(s, '\n')+1:] },
		"cut":                func(s string) string { return s[:len(s)-20] },
		"of a longer log":    func(s string) string { return strings.Replace(s, `"head":`, `"head":9`, 1) },
		"a session too many": func(s string) string { return strings.Replace(s, `"sessions":1`, `"sessions":2`, 1) },
		"a path for a name":  func(s string) string { return strings.Replace(s, `"vm":"g"`, `"vm":"../g"`, 1) },
		"a hold on nothing": func(s string) string {
			return strings.Replace(s, `"token":`, `"ordered":true,"held":{"id":"","code":"rate-limited","retry_after_ms":1},"token":`, 1)
		},
		"a token that is not": func(s string) string { return strings.Replace(s, `"token":"sess-`, `"token":"`, 1) },
	} {
		t.Run(name, func(t *testing.T) {
			text, o, _ := good(t)
			a, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			theirs, err := net.Dial("tcp", a.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer theirs.Close()
			ours, err := a.Accept()
			if err != nil {
				t.Fatal(err)
			}
			changed := change(text)
			if changed == text {
				t.Fatal("nothing was changed in " + text)
			}
			o.Inherit = pack(t, changed, ours)
			b := start(t, o)
			if n, _ := b.Counts(); n != 0 {
				t.Errorf("%d sessions", n)
			}
			_ = theirs.SetDeadline(time.Now().Add(hang))
			if n, err := theirs.Read(make([]byte, 1)); n > 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the connection is still open: %d, %v", n, err)
			}
			connect(t, b.addr, "g")
		})
	}
}

// pack is what a service manager would pass on.
func pack(t testing.TB, text string, conn net.Conn) *os.File {
	t.Helper()
	f, err := conn.(*net.TCPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	p, err := handover.Pack(func(w io.Writer) error { _, err := w.Write([]byte(text)); return err }, []int{int(f.Fd())})
	_ = f.Close()
	_ = conn.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	var kept *os.File
	if err := keep(t, &kept)(p.Successors()); err != nil {
		t.Fatal(err)
	}
	return kept
}

func FuzzReadHandOver(f *testing.F) {
	f.Add([]byte(`{"version":2,"castrad":"x","clock_ns":1,"head":7,"vms":1,"sessions":1}
{"vm":"g","reachable":true,"reason":"handshake","handshake_age_ns":1,"key_sha256":"00","session":{"token":"sess-0123456789abcdef0123456789abcdef","remote":"127.0.0.1:1","unread":"AAAA","unsent":"e30=","subscriptions":[{"name":"s","topic":"t.>","cursor":"c","start":1,"position":7,"next":8,"acked":3}]}}
`))
	f.Fuzz(func(t *testing.T, data []byte) {
		h, vms, err := readHandOver(bytes.NewReader(data))
		if err != nil {
			return
		}
		// What is read is written back as the same.
		var out bytes.Buffer
		if err := writeHandOver(&out, h, vms); err != nil {
			t.Fatal(err)
		}
		h2, vms2, err := readHandOver(&out)
		if err != nil || fmt.Sprintf("%+v", h2) != fmt.Sprintf("%+v", h) || len(vms2) != len(vms) {
			t.Fatalf("%+v and %d VMs became %+v and %d, %v", h, len(vms), h2, len(vms2), err)
		}
		for i := range vms {
			if vms[i].Session != nil {
				// It is judged without panic, whatever it holds.
				_, _ = session.Thaw(vms[i].VM, new(net.TCPConn), nil, &session.Options{}, vms[i].Session)
			}
		}
	})
}
