package broker

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/handover"
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

// Nine brokers after one another, under load: no connection is lost, no record, no
// answer and no delivery, none comes twice, and all of it is in order.
func TestHandOverUnderLoad(t *testing.T) {
	o := testOptions(t, t.TempDir())
	o.GuestTopics = guestTopics(t, "load")
	b := start(t, o)
	const guests, restarts = 3, 8
	var work sync.WaitGroup
	var enough atomic.Bool
	flows := make([]*flow, guests)
	for i := range flows {
		g := connect(t, b.addr, fmt.Sprintf("g%d", i))
		if err := g.conn.SetDeadline(time.Now().Add(4 * hang)); err != nil {
			t.Fatal(err)
		}
		g.send(`{"type":"subscribe","topic":"load","cursor":"c"}`, `{"type":"subscribe","topic":"*","sub":"all"}`)
		g.expect(`{"ack":"subscribe"}`, `{"ack":"subscribe"}`)
		f := &flow{guest: g, vm: fmt.Sprintf("g%d", i), window: make(chan struct{}, 100)}
		flows[i] = f
	}
	for _, f := range flows {
		work.Go(func() { f.publish(&enough) })
		work.Go(f.follow)
	}
	for range restarts {
		goal := flows[0].acked.Load() + 50
		eventually(t, "the guests go on", func() bool { return flows[0].acked.Load() > goal || t.Failed() })
		if t.Failed() {
			break
		}
		b = restart(t, b, guests)
	}
	enough.Store(true)
	work.Wait()
	total := int64(0)
	for _, f := range flows {
		total += f.acked.Load()
	}
	t.Logf("%d restarts, %d records", restarts, total)
}

// flow is a guest that publishes the numbers from 1 and hears them again.
type flow struct {
	*guest
	vm     string
	window chan struct{} // a token for each publish that is not acknowledged
	sent   atomic.Int64  // how many it were; 0: it goes on
	acked  atomic.Int64
}

// publish cuts the stream of bytes anywhere.
func (f *flow) publish(enough *atomic.Bool) {
	n := 0
	for end := false; !end; {
		var b []byte
		if end = enough.Load() && n > 0; end {
			f.sent.Store(int64(n))
			b = wire.AppendFrame(b, []byte(`{"type":"heartbeat"}`)) // whose answer says that there is an end
		} else {
			for range 1 + rand.IntN(20) {
				n++
				b = wire.AppendFrame(b, fmt.Appendf(nil, `{"type":"publish","topic":"load","id":"%d","payload":%d}`, n, n))
				f.window <- struct{}{}
			}
		}
		for len(b) > 0 {
			cut := min(len(b), 1+rand.IntN(200))
			if _, err := f.conn.Write(b[:cut]); err != nil {
				f.t.Errorf("%s: %v", f.vm, err)
				return
			}
			b = b[cut:]
		}
	}
}

// follow reads until everything sent is acknowledged and heard on both
// subscriptions, in order and once.
func (f *flow) follow() {
	defer func() { // whatever failed, publish must not wait for it
		for f.sent.Load() == 0 {
			select {
			case <-f.window:
			case <-time.After(time.Millisecond):
			}
		}
	}()
	type from struct{ sub, vm string }
	heard := make(map[from]int64)
	newest := make(map[string]uint64)
	for sent := int64(0); sent == 0 || f.acked.Load() < sent || heard[from{"load", f.vm}] < sent || heard[from{"all", f.vm}] < sent; sent = f.sent.Load() {
		b := f.next()
		var m struct {
			Type, Ack, Status, ID, Subscription, VM string
			Seq                                     uint64
			Payload                                 int64
		}
		if err := json.Unmarshal([]byte(b), &m); err != nil {
			f.t.Errorf("%s: %s behind %d acks, %v", f.vm, b, f.acked.Load(), err)
			return
		}
		switch {
		case m.Type == "ack" && m.Ack == "heartbeat":
		case m.Type == "ack":
			if m.Status != "ok" || m.ID != fmt.Sprint(f.acked.Load()+1) {
				f.t.Errorf("%s: %s behind the ack of %d", f.vm, b, f.acked.Load())
				return
			}
			f.acked.Add(1)
			<-f.window
		case m.Type == "publish":
			if m.Seq <= newest[m.Subscription] {
				f.t.Errorf("%s: %s behind %d", f.vm, b, newest[m.Subscription])
				return
			}
			newest[m.Subscription] = m.Seq
			k := from{m.Subscription, m.VM}
			if last, ok := heard[k]; ok && m.Payload != last+1 {
				f.t.Errorf("%s: %s behind %d", f.vm, b, last)
				return
			}
			heard[k] = m.Payload
		default:
			f.t.Errorf("%s: %s", f.vm, b)
			return
		}
	}
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
