package e2e

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
)

// floodAttacks are run one after the other: each wants all that there is.
var floodAttacks = []struct {
	name string
	run  func(t *testing.T, s *siege)
}{
	{"a thousand silent connections", func(t *testing.T, s *siege) {
		var silent []*guestConn
		for range 1000 {
			g, err := s.dial()
			if err != nil {
				t.Fatal(err)
			}
			defer g.Close()
			silent = append(silent, g)
		}
		victim, _, err := s.join("victim", s.keys["victim"])
		if err != nil {
			t.Errorf("a newcomer is refused: %v", err)
		} else {
			_ = victim.Close()
		}
		if line, err := silent[0].line(); err == nil && line != "error: read-timeout" {
			t.Errorf("the oldest was told %q, %v", line, err)
		}
		s.limited(t, "max_handshakes", 1000-256)
		s.recorded(t, busEvents, "of them", func(e event) bool {
			return e.Reason == "queue_full" && e.Action == "disconnect" && strings.Contains(e.Detail, "max_handshakes")
		})
	}},
	{"a flood of publishes", func(t *testing.T, s *siege) {
		g, _, err := s.join("mallory", s.keys["mallory"])
		if err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		const n = 3000
		go func() {
			for range n {
				if g.frame(`{"type":"publish","topic":"a.flood","payload":1}`) != nil {
					return
				}
			}
		}()
		var ok, limited int
		for range n {
			f, err := g.receive()
			var a struct {
				Status, Code string
				Retry        int `json:"retry_after_ms"`
			}
			if err != nil || json.Unmarshal([]byte(f), &a) != nil {
				t.Fatalf("answered %s, %v", f, err)
			}
			switch {
			case a.Status == "ok":
				ok++
			case a.Code == "rate-limited" && a.Retry > 0:
				limited++
			default:
				t.Fatalf("answered %s", f)
			}
		}
		if ok < 500 || limited < 1 {
			t.Errorf("%d were stored and %d refused of a burst of 500", ok, limited)
		}
		s.recorded(t, busEvents, "of it", func(e event) bool { return e.VM == "mallory" && e.Reason == "rate_limited" && e.Action == "throttle" })
		st, err := s.status("mallory")
		if err != nil || st.VMs[0].RateLimited != uint64(limited) {
			t.Errorf("status shows %+v, %v", st.VMs, err)
		}
		s.limited(t, "publish_rate", uint64(limited))
	}},
	{"a flood of heartbeats that nobody reads the answers of", func(t *testing.T, s *siege) {
		g, _, err := s.join("mallory", s.keys["mallory"])
		if err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		_ = g.SetWriteDeadline(time.Now().Add(2 * time.Second))
		beats := bytes.Repeat([]byte("\x00\x00\x00\x14"+`{"type":"heartbeat"}`), 1000)
		for {
			if _, err := g.Write(beats); err != nil {
				return // back-pressure, or the session's end
			}
		}
	}},
	{"a flood of forged names against a guest that comes back", func(t *testing.T, s *siege) {
		var end atomic.Bool
		var work sync.WaitGroup
		var refused atomic.Int64
		for range 4 {
			work.Go(func() {
				for !end.Load() {
					g, err := s.dial()
					if err != nil {
						continue
					}
					fmt.Fprintf(g, "hello vm:victim capabilities=%s nonce=%s\n", proveCaps, someNonce)
					_, _ = g.line()
					fmt.Fprintf(g, "auth mac=%s\n", strings.Repeat("ff", 32))
					if line, _ := g.line(); line == "error: auth-failed" {
						refused.Add(1)
					}
					_ = g.Close()
				}
			})
		}
		wait(t, "it is under way", func() error {
			if n := refused.Load(); n < 500 {
				return fmt.Errorf("%d were refused", n)
			}
			return nil
		})
		for range 5 {
			g, token, err := s.join("victim", s.keys["victim"])
			if err != nil {
				t.Errorf("the victim comes back: %v", err)
				continue
			}
			_ = g.frame(`{"type":"heartbeat"}`)
			if f, err := g.receive(); !strings.Contains(f, `"status":"ok"`) {
				t.Errorf("its session %s: %s, %v", token, f, err)
			}
			_ = g.Close()
		}
		end.Store(true)
		work.Wait()
		// What is written of them is little, and their number is told.
		s.recorded(t, handshakeEvents, "how many more there were", func(e event) bool {
			return e.VM == "victim" && e.Reason == "auth-failed" && e.Suppressed > 0
		})
		all, err := s.events(handshakeEvents)
		n := 0
		for _, e := range all {
			if e.VM == "victim" && e.Reason == "auth-failed" && e.Suppressed == 0 {
				n++
			}
		}
		if err != nil || n > 300 {
			t.Errorf("%d lines were written of %d refusals, %v", n, refused.Load(), err)
		}
		log, _ := os.ReadFile(s.path("castrad.log"))
		if n := bytes.Count(log, []byte("guest refused")); n > 300 {
			t.Errorf("%d lines were logged", n)
		}
	}},
	{"a flood of made-up names", func(t *testing.T, s *siege) {
		s.refusesProof(t, func(_ *guestConn, _, _ string) string { return strings.Repeat("0", 64) })
		var work sync.WaitGroup
		for i := range 50 {
			work.Go(func() {
				for j := range 10 {
					g, err := s.dial()
					if err != nil {
						t.Error(err)
						return
					}
					fmt.Fprintf(g, "hello vm:guest-flood%d-%d capabilities=bus-v1\n", i, j)
					if line, err := g.line(); line != "error: unknown-vm" {
						t.Errorf("answered %q, %v", line, err)
					}
					_ = g.Close()
				}
			})
		}
		work.Wait()
		st, err := s.status()
		if err != nil || len(st.Refused) != 64 || !strings.Contains(fmt.Sprint(st.Refused), "{victim ") {
			t.Errorf("those turned away are %d, the victim among them: %+v, %v", len(st.Refused), st.Refused, err)
		}
		if len(st.VMs) > 200 {
			t.Errorf("%d VMs are known", len(st.VMs))
		}
	}},
	{"two clones", func(t *testing.T, s *siege) {
		key := s.add("guest-cloned")
		var end atomic.Bool
		var work sync.WaitGroup
		var replaced atomic.Int64
		for range 2 {
			work.Go(func() {
				for !end.Load() {
					g, _, err := s.join("guest-cloned", key)
					if err != nil {
						time.Sleep(10 * time.Millisecond)
						continue
					}
					for !end.Load() {
						_ = g.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
						f, err := g.receive()
						if strings.Contains(f, `"superseded"`) {
							replaced.Add(1)
						}
						if !errors.Is(err, os.ErrDeadlineExceeded) {
							break
						}
					}
					_ = g.Close()
				}
			})
		}
		s.recorded(t, busEvents, "of them by name", func(e event) bool {
			return e.VM == "guest-cloned" && e.Reason == "superseded" && e.Action == "throttle" && strings.Contains(e.Detail, "contended")
		})
		wait(t, "status tells of them", func() error {
			st, err := s.status("guest-cloned")
			if err == nil && (len(st.VMs) != 1 || !st.VMs[0].Contended || st.VMs[0].Superseded < 5) {
				err = fmt.Errorf("it shows %+v", st.VMs)
			}
			return err
		})
		before := replaced.Load()
		time.Sleep(3 * time.Second) // as long as the attack is looked at
		if n := replaced.Load() - before; n > 6 {
			t.Errorf("they replaced each other %d times in three seconds", n)
		}
		end.Store(true)
		work.Wait()
		log, _ := os.ReadFile(s.path("castrad.log"))
		if !bytes.Contains(log, []byte("vm=guest-cloned")) || !bytes.Contains(log, []byte("keep replacing each other")) {
			t.Error("the journal does not tell")
		}
	}},
	{"one name again and again", func(t *testing.T, s *siege) {
		var limited atomic.Int64
		var work sync.WaitGroup
		for range 64 {
			work.Go(func() {
				for range 4 {
					g, err := s.dial()
					if err != nil {
						continue
					}
					_, _ = io.WriteString(g, "hello vm:open\n")
					if line, _ := g.line(); line == "error: rate-limited" {
						limited.Add(1)
					}
					_ = g.Close()
				}
			})
		}
		work.Wait()
		if limited.Load() == 0 {
			t.Error("256 handshakes of one name at once are all granted")
		}
		s.limited(t, "handshake_rate", 1)
		s.recorded(t, busEvents, "of it", func(e event) bool { return e.VM == "open" && e.Reason == "rate_limited" && e.Action == "reject" })
	}},
	{"a D-Bus caller that floods and never reads", func(t *testing.T, s *siege) {
		conn := s.rawBus(t)
		defer conn.Close()
		var one bytes.Buffer
		_ = call("/org/castra/Bus1", "org.castra.Bus1.Manager", "Describe", []string{}).EncodeTo(&one, binary.LittleEndian)
		flood := bytes.Repeat(one.Bytes(), 200)
		for i := range 200 { // numbered, or the bus would not take them
			binary.LittleEndian.PutUint32(flood[i*one.Len()+8:], uint32(i+10))
		}
		_ = conn.SetWriteDeadline(time.Now().Add(3 * time.Second))
		for {
			if _, err := conn.Write(flood); err != nil {
				break // the bus reads no more of it, or has hung up
			}
		}
		if _, err := s.status("honest"); err != nil {
			t.Errorf("another caller: %v", err)
		}
	}},
	{"a D-Bus caller with strange arguments", func(t *testing.T, s *siege) {
		conn, err := dbus.Connect(s.hostBus)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		o := conn.Object("org.castra.Bus1", "/org/castra/Bus1")
		options := map[string]dbus.Variant{}
		for _, c := range []struct {
			method, want string
			args         []any
		}{
			{"Publish", "InvalidArgument", []any{uint32(7)}},
			{"Publish", "BadTopic", []any{"vm:../x", "1", options}},
			{"Publish", "BadTopic", []any{strings.Repeat("t", 1<<16), "1", options}},
			{"Publish", "Forbidden", []any{"castra.presence", "1", options}},
			{"Publish", "InvalidArgument", []any{"t", strings.Repeat("[", 1<<16), options}},
			{"Publish", "InvalidArgument", []any{"t", "{}{}", options}},
			{"Publish", "TooLarge", []any{"t", `"` + strings.Repeat("x", 1<<20) + `"`, options}},
			{"Publish", "InvalidArgument", []any{"t", "1", map[string]dbus.Variant{"ID": dbus.MakeVariant("x")}}},
			{"AddVM", "InvalidName", []any{"../../etc/passwd", options}},
			{"AddVM", "InvalidName", []any{"HOST", options}},
			{"AddVM", "InvalidArgument", []any{"guest-x", map[string]dbus.Variant{"forwards": dbus.MakeVariant([]string{"tcp:0:0"})}}},
			{"RemoveVM", "NoSuchVM", []any{"guest-none"}},
			{"RekeyVM", "InvalidName", []any{"."}},
			{"Tail", "InvalidName", []any{map[string]dbus.Variant{"vm": dbus.MakeVariant("../victim")}}},
			{"Tail", "BadTopic", []any{map[string]dbus.Variant{"topics": dbus.MakeVariant([]string{"a b"})}}},
		} {
			err := o.Call("org.castra.Bus1.Manager."+c.method, 0, c.args...).Err
			e, ok := errors.AsType[dbus.Error](err)
			if !ok || e.Name != "org.castra.Bus1.Error."+c.want {
				t.Errorf("%s%.80v: %v, want %s", c.method, c.args, err, c.want)
			}
		}
	}},
	{"a D-Bus caller who may not", func(t *testing.T, s *siege) {
		if os.Geteuid() != 0 {
			t.Skip("needs root, to be somebody else")
		}
		for _, args := range [][]string{
			{"bus", "publish", "1"},
			{"bus", "tail", "--no-follow"},
			{"vm", "add", "guest-nobody", "--no-key"},
			{"vm", "remove", "victim"},
			{"vm", "rekey", "victim", "--key-out", "/dev/shm/castra-nobody.key"},
		} {
			out, err := s.asNobody(t, args...)
			if err == nil || !strings.Contains(out, "group castra") {
				t.Errorf("castractl %s by nobody: %v, %s", strings.Join(args, " "), err, out)
			}
		}
		if out, err := s.asNobody(t, "status", "honest"); err != nil || !strings.Contains(out, "reachable") {
			t.Errorf("castractl status by nobody: %v, %s", err, out)
		}
	}},
}

// asNobody runs castractl as a user with no rights, from a copy that he may read.
func (s *siege) asNobody(t *testing.T, args ...string) (string, error) {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "castra-e2e.")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	program, err := os.ReadFile(bin(t, "castractl"))
	if err == nil {
		err = os.WriteFile(dir+"/castractl", program, 0o755)
	}
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(dir+"/castractl", args...)
	cmd.Dir, cmd.SysProcAttr = dir, asNobody()
	cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS="+abstract(s.hostBus))
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// rawBus is a connection to the message bus that has said hello and reads no more.
func (s *siege) rawBus(t testing.TB) net.Conn {
	t.Helper()
	_, path, _ := strings.Cut(s.hostBus, "path=")
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "\x00AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n")
	buf := make([]byte, 4096)
	for got := ""; !strings.Contains(got, "OK "); {
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		got += string(buf[:n])
	}
	hello := call("/org/freedesktop/DBus", "org.freedesktop.DBus", "Hello")
	hello.Headers[dbus.FieldDestination] = dbus.MakeVariant("org.freedesktop.DBus")
	var b bytes.Buffer
	if err := hello.EncodeTo(&b, binary.LittleEndian); err != nil {
		t.Fatal(err)
	}
	binary.LittleEndian.PutUint32(b.Bytes()[8:], 1)
	if _, err := conn.Write(b.Bytes()); err != nil {
		t.Fatal(err)
	}
	return conn
}

// call is a method call of castrad's.
func call(path dbus.ObjectPath, iface, member string, args ...any) *dbus.Message {
	m := &dbus.Message{Type: dbus.TypeMethodCall, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldDestination: dbus.MakeVariant("org.castra.Bus1"),
		dbus.FieldPath:        dbus.MakeVariant(path),
		dbus.FieldInterface:   dbus.MakeVariant(iface),
		dbus.FieldMember:      dbus.MakeVariant(member),
	}, Body: args}
	if len(args) > 0 {
		m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(args...))
	}
	return m
}
