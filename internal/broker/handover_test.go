package broker

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/session"
	"github.com/castrabus/castra/internal/wire"
)

// keep is a service manager: it holds on to what it is given.
func keep(t testing.TB, kept **os.File) func(*os.File) error {
	return func(f *os.File) error {
		fd, err := syscall.Dup(int(f.Fd()))
		if err == nil {
			*kept = os.NewFile(uintptr(fd), "kept")
			t.Cleanup(func() { _ = (*kept).Close() })
		}
		return err
	}
}

// leave ends a broker that must hand over so many sessions, and gives the options
// of one that takes them over.
func leave(t testing.TB, b *running, sessions int) Options {
	t.Helper()
	var kept *os.File
	n, err := b.HandOver(keep(t, &kept))
	if err != nil || n != sessions {
		t.Fatalf("%d sessions were handed over and not %d, %v", n, sessions, err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	return successor(t, b, kept)
}

// successor gives the options of a broker that takes over what b has left.
func successor(t testing.TB, b *running, kept *os.File) Options {
	t.Helper()
	o := b.opts
	o.Registry, o.Inherit = testOptions(t, filepath.Dir(o.StateDir)).Registry, kept
	return o
}

// restart has another broker go on where b is.
func restart(t testing.TB, b *running, sessions int) *running {
	t.Helper()
	b = start(t, leave(t, b, sessions))
	if got, _ := b.Counts(); got != sessions {
		t.Fatalf("%d sessions were taken over of %d", got, sessions)
	}
	return b
}

// Frames of which a part was read, answers and deliveries of which a part was
// written, and everything about subscriptions go on where they were.
func TestHandOver(t *testing.T) {
	b := start(t, testOptions(t, t.TempDir()))
	host := func(topic string, payload any) uint64 {
		t.Helper()
		seq, err := b.Publish(t.Context(), bus.PublishRequest{Topic: topic, Payload: fmt.Append(nil, payload)})
		if err != nil {
			t.Fatal(err)
		}
		return seq
	}
	halved, reader, slow := connect(t, b.addr, "halved"), connect(t, b.addr, "reader"), connect(t, b.addr, "slow")
	reader.send(`{"type":"subscribe","topic":"jobs.>","sub":"jobs","cursor":"c"}`, `{"type":"subscribe","topic":"quiet"}`)
	reader.expect(`{"ack":"subscribe","subscription":"jobs"}`, `{"ack":"subscribe"}`)
	first := host("jobs.a", 1)
	reader.expect(fmt.Sprintf(`{"subscription":"jobs","seq":%d}`, first))

	// A guest that reads nothing, until a delivery is stuck halfway and answers wait
	// behind it.
	slow.send(`{"type":"subscribe","topic":"much"}`)
	slow.expect(`{"ack":"subscribe"}`)
	big := `"` + strings.Repeat("x", 60000) + `"`
	if err := slow.conn.(*net.TCPConn).SetReadBuffer(64 << 10); err != nil {
		t.Fatal(err)
	}
	const many = 150 // twice what the kernel takes in
	for range many {
		host("much", big)
	}
	slow.send(`{"type":"publish","topic":"t","id":"behind"}`, `{"type":"heartbeat"}`)
	eventually(t, "what the slow guest sent is stored", func() bool {
		return b.Status([]string{"slow"}).VMs[0].Published == 1
	})

	frame := wire.AppendFrame(nil, []byte(`{"type":"publish","topic":"t","id":"in-halves","payload":[1,2,3]}`))
	for _, cut := range []int{1, 3, 4, 5, 30} { // in the length, behind it, in the JSON
		halved.send(`{"type":"heartbeat"}`)
		halved.expect(`{"ack":"heartbeat"}`)
		halved.say("%s", frame[:cut])
		eventually(t, "it is read", func() bool { return unread(t, halved) == 0 })
		b = restart(t, b, 3)
		halved.say("%s", frame[cut:])
		halved.expect(`{"ack":"publish","status":"ok","id":"in-halves"}`)
		second := host("jobs.b", cut)
		reader.expect(fmt.Sprintf(`{"subscription":"jobs","seq":%d,"payload":%d}`, second, cut))
		reader.send(fmt.Sprintf(`{"type":"ack","ack":"publish","subscription":"jobs","seq":%d}`, second))
		if vm, err := b.WaitAck(t.Context(), second); err != nil || vm != "reader" {
			t.Fatalf("record %d was acknowledged by %q, %v", second, vm, err)
		}
	}
	reader.send(`{"type":"heartbeat"}`)
	reader.expect(`{"ack":"heartbeat"}`)
	host("quiet", 7)
	reader.expect(`{"subscription":"quiet","payload":7}`)

	acked := b.events.Committed() - 1
	b.table.Refuse("stranger", wire.ReasonUnknownVM, true)
	b = restart(t, b, 3)
	if refused := b.Status(nil).Refused; len(refused) != 1 || refused[0].VM != "stranger" || !refused[0].HasKey {
		t.Errorf("turned away were %+v", refused)
	}
	if vm, err := b.WaitAck(t.Context(), acked); err != nil || vm != "reader" {
		t.Errorf("record %d was acknowledged by %q before the restart, %v", acked, vm, err)
	}
	answered := 0
	for got := 0; got < many; {
		switch f := slow.next(); {
		case has(f, `{"subscription":"much"}`):
			got++
		case has(f, `{"ack":"publish","id":"behind","status":"ok"}`) && answered == 0, has(f, `{"ack":"heartbeat","status":"ok"}`) && answered == 1:
			answered++
		default:
			t.Fatalf("%d answers and %d deliveries are followed by %.200s", answered, got, f)
		}
	}
	if answered != 2 {
		t.Errorf("%d of two answers came", answered)
	}

	// The durable cursor is where the guest said, not where it began.
	_ = reader.conn.Close()
	last := host("jobs.c", 9)
	reader = connect(t, b.addr, "reader")
	reader.send(`{"type":"subscribe","topic":"jobs.>","from":"start","cursor":"c"}`)
	reader.expect(`{"ack":"subscribe"}`, fmt.Sprintf(`{"seq":%d}`, last))
}

// unread tells how many bytes of the guest's the broker has not read yet
// (proc(5), /proc/net/tcp).
func unread(t *testing.T, g *guest) (n int) {
	t.Helper()
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	hex := func(a net.Addr) string { return fmt.Sprintf("0100007F:%04X", a.(*net.TCPAddr).Port) }
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); f[1] == hex(g.conn.RemoteAddr()) && f[2] == hex(g.conn.LocalAddr()) {
			if _, err := fmt.Sscanf(f[4], "%8x:%8x", new(int), &n); err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatal("the connection is not there")
	return 0
}

// connectKeyed is connect for a VM that has a key.
func connectKeyed(t *testing.T, addr, vm string, key []byte) *guest {
	t.Helper()
	g := dial(t, addr)
	caps, nonce := "bus-v1,auth-hmac-v1", strings.Repeat("ab", 16)
	g.say("hello vm:%s capabilities=%s nonce=%s\n", vm, caps, nonce)
	theirs, err := wire.ParseChallenge([]byte(g.line()))
	if err != nil {
		t.Fatal(err)
	}
	g.say("auth mac=%x\n", wire.ClientMAC(key, vm, caps, nonce, theirs))
	if got := g.line(); !strings.HasPrefix(got, "ok session=sess-") {
		t.Fatalf("%s was answered %q", vm, got)
	}
	return g
}

// A guest is not announced as gone, nor as come, for a restart's sake; its ages go
// on; and one that leaves in between is announced then.
func TestHandOverPresence(t *testing.T) {
	b := start(t, testOptions(t, t.TempDir()))
	stays, leaves := connect(t, b.addr, "stays"), connect(t, b.addr, "leaves")
	stays.send(`{"type":"heartbeat"}`, `{"type":"publish","topic":"t"}`, `{"type":"subscribe","topic":"t"}`)
	stays.expect(`{"ack":"heartbeat"}`, `{"ack":"publish"}`, `{"ack":"subscribe"}`)
	old := dial(t, b.addr)
	old.say("hello vm:old capabilities=exec\n")
	old.line()
	time.Sleep(20 * time.Millisecond) // an age that can be told from none
	before := b.Status([]string{"stays"}).VMs[0]
	o := leave(t, b, 2)
	_ = leaves.conn.Close()
	b = start(t, o)
	after := b.Status([]string{"stays"}).VMs[0]
	if after.Session != before.Session || after.RemoteAddr != before.RemoteAddr || !after.Reachable || after.Published != 1 ||
		fmt.Sprint(after.Subscriptions, after.Capabilities) != fmt.Sprint(before.Subscriptions, before.Capabilities) {
		t.Errorf("before: %+v\nafter: %+v", before, after)
	}
	for _, age := range [][2]*int64{{before.LastHandshakeAgeMS, after.LastHandshakeAgeMS}, {before.LastHeartbeatAgeMS, after.LastHeartbeatAgeMS}, {before.LastPublishAgeMS, after.LastPublishAgeMS}} {
		if age[1] == nil || *age[1] < *age[0] {
			t.Errorf("an age of %d ms is %v then", *age[0], age[1])
		}
	}
	if !b.Status([]string{"old"}).VMs[0].Reachable {
		t.Error("a handshake-only guest is not reachable any more")
	}
	want := []string{"stays reachable", "leaves reachable", "old reachable", "leaves unreachable"}
	var got []string
	eventually(t, "the guest that left is announced", func() bool {
		var out bytes.Buffer
		if err := b.Tail(t.Context(), bus.TailRequest{All: true, Topics: []string{"castra.>"}}, &out); err != nil {
			t.Fatal(err)
		}
		got = got[:0]
		for line := range strings.Lines(out.String()) {
			var r struct {
				Payload struct{ VM, State string }
			}
			if err := json.Unmarshal([]byte(line), &r); err != nil {
				t.Fatal(err)
			}
			got = append(got, r.Payload.VM+" "+r.Payload.State)
		}
		return len(got) >= len(want)
	})
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("announced %v, want %v", got, want)
	}
}

// A name removed or a key replaced while nobody was there to see it ends the session.
func TestHandOverAndRegistry(t *testing.T) {
	o := testOptions(t, t.TempDir())
	o.AcceptUnknown = false
	b := start(t, o)
	guests := make(map[string]*guest)
	for _, vm := range []string{"kept", "rekeyed", "removed"} {
		_, key, err := b.AddVM(t.Context(), bus.AddVMRequest{Name: vm})
		if err != nil {
			t.Fatal(err)
		}
		guests[vm] = connectKeyed(t, b.addr, vm, key)
	}
	o = leave(t, b, 3)
	if _, err := o.Registry.Rekey("rekeyed"); err != nil {
		t.Fatal(err)
	}
	if err := o.Registry.Remove("removed"); err != nil {
		t.Fatal(err)
	}
	b = start(t, o)
	guests["kept"].send(`{"type":"heartbeat"}`)
	guests["kept"].expect(`{"ack":"heartbeat"}`)
	for _, vm := range []string{"rekeyed", "removed"} {
		guests[vm].expect(`{"type":"error","code":"forbidden"}`)
	}
	eventually(t, "the removed one is forgotten", func() bool { return len(b.Status([]string{"removed"}).VMs) == 0 })
}

// Where nothing is kept, guests are told that castrad ends, behind all that they
// had still to get.
func TestHandOverRefused(t *testing.T) {
	for name, store := range map[string]func(*os.File) error{
		"no service manager": func(*os.File) error { return errors.New("nobody is there") },
		"nothing kept":       func(*os.File) error { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			b := start(t, testOptions(t, t.TempDir()))
			g := connect(t, b.addr, "g")
			g.send(`{"type":"subscribe","topic":"t"}`)
			g.expect(`{"ack":"subscribe"}`)
			const many = 200
			for range many {
				if _, err := b.Publish(t.Context(), bus.PublishRequest{Topic: "t", Payload: []byte(`"` + strings.Repeat("x", 60000) + `"`)}); err != nil {
					t.Fatal(err)
				}
			}
			g.say("\x00\x00") // half of a length
			done := make(chan error, 1)
			go func() {
				n, err := b.HandOver(store)
				if err == nil || n != 0 {
					err = fmt.Errorf("%d sessions are said to be handed over", n)
				} else {
					err = b.Close()
				}
				done <- err
			}()
			last := uint64(0)
			for {
				f := g.next()
				var d struct {
					Type string
					Seq  uint64
				}
				// Without looking at all of it: castrad waits a second for a guest that reads.
				head, _, long := strings.Cut(f, `,"payload":`)
				if long {
					head += "}"
				}
				if err := json.Unmarshal([]byte(head), &d); err != nil {
					t.Fatalf("%.100s, %v", f, err)
				}
				if d.Type == "error" {
					if !has(f, `{"code":"shutting-down"}`) {
						t.Error(f)
					}
					break
				}
				if d.Seq <= last {
					t.Fatalf("%d behind %d", d.Seq, last)
				}
				last = d.Seq
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
}

// A session that has ended, and is in the table for a moment still, is not waited for.
func TestHandOverOfTheDead(t *testing.T) {
	b := start(t, testOptions(t, t.TempDir()))
	connect(t, b.addr, "living")
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Close(fds[1]) })
	conn := session.NewConn(fds[0], &net.UnixAddr{})
	t.Cleanup(func() { _ = conn.Close() })
	s, err := session.Thaw("dead", conn, b, b.sessionOptions(), &session.Frozen{Token: "sess-" + strings.Repeat("0", 32)})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.table.Connect("dead", s, "", nil); err != nil {
		t.Fatal(err)
	}
	s.End(session.TroubleIOError, "") // and Release is about to take it out of the table
	leave(t, b, 1)
	if n := b.parking.running(); n != 0 {
		t.Errorf("%d were waited for until the time was over", n)
	}
}
