package broker

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

// A name removed, or a key replaced, while its handshake is under way lets
// nobody in.
func TestRevokedDuringTheHandshake(t *testing.T) {
	o := testOptions(t, t.TempDir())
	o.AcceptUnknown = false
	b := start(t, o)
	for _, c := range []struct {
		vm, want string
		revoke   func(name string) error
	}{
		{"rekeyed", wire.ReasonAuthFailed, func(name string) error { _, err := b.RekeyVM(t.Context(), name); return err }},
		{"removed", wire.ReasonUnknownVM, func(name string) error { return b.RemoveVM(t.Context(), name) }},
	} {
		_, key, err := b.AddVM(t.Context(), bus.AddVMRequest{Name: c.vm})
		if err != nil {
			t.Fatal(err)
		}
		r, _, _, _ := prove(t, b.addr, c.vm, key, func(mac []byte, _ string) string {
			if err := c.revoke(c.vm); err != nil {
				t.Error(err)
			}
			return hex.EncodeToString(mac)
		})
		if r.Refusal != c.want {
			t.Errorf("%s: answered %+v", c.vm, r)
		}
	}
	if vms := b.Status(nil).VMs; len(vms) != 1 || vms[0].Reachable {
		t.Errorf("%+v", vms)
	}
}

// A guest that was let in as a stranger goes when its name gets a key, which it has not
// proved: it would go on hearing what is for the VM.
func TestStrangerUnderANameThatGetsAKey(t *testing.T) {
	dir := t.TempDir()
	b := start(t, testOptions(t, dir))
	for name, register := range map[string]func(name string) error{
		"added": func(name string) error {
			_, _, err := b.AddVM(t.Context(), bus.AddVMRequest{Name: name})
			return err
		},
		"defined": func(name string) error {
			key := base64.StdEncoding.EncodeToString(make([]byte, 32))
			if err := errors.Join(os.MkdirAll(dir+"/vms.d", 0o700), os.WriteFile(dir+"/vms.d/"+name+".toml", []byte(`key = "`+key+`"`), 0o600)); err != nil {
				return err
			}
			problems, err := b.Configure(testOptions(t, t.TempDir()).Settings)
			if len(problems) > 0 {
				t.Error(problems)
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			stranger, other := connect(t, b.addr, name), connect(t, b.addr, "other")
			if err := register(name); err != nil {
				t.Fatal(err)
			}
			stranger.expect(`{"type":"error","code":"forbidden"}`)
			other.send(`{"type":"heartbeat"}`)
			other.expect(`{"ack":"heartbeat","status":"ok"}`)
			g := connect(t, b.addr, "keyless-"+name)
			if _, _, err := b.AddVM(t.Context(), bus.AddVMRequest{Name: "keyless-" + name, NoKey: true}); err != nil {
				t.Fatal(err)
			}
			g.send(`{"type":"heartbeat"}`)
			g.expect(`{"ack":"heartbeat","status":"ok"}`)
		})
	}
}

// A byte now and then is no frame, and keeps no session alive.
func TestTrickleIsSilence(t *testing.T) {
	o := testOptions(t, t.TempDir())
	o.ReachableWithin, o.SessionTimeout = 300*time.Millisecond, 600*time.Millisecond
	b := start(t, o)
	g := connect(t, b.addr, "g")
	g.say("\x00\x00\xff\x00{")
	eventually(t, "the session ends", func() bool {
		_, err := g.conn.Write([]byte(" "))
		return err != nil || b.Status([]string{"g"}).VMs[0].Session == ""
	})
}

// A frame that comes byte by byte is taken all the same.
func TestFrameByteByByte(t *testing.T) {
	b := start(t, testOptions(t, t.TempDir()))
	g := connect(t, b.addr, "g")
	var frames []byte
	frames = wire.AppendFrame(frames, []byte(`{"type":"heartbeat"}`))
	frames = wire.AppendFrame(frames, []byte(`{"type":"publish","payload":"`+strings.Repeat("x", 3000)+`"}`))
	for i := range frames {
		if _, err := g.conn.Write(frames[i : i+1]); err != nil {
			t.Fatal(err)
		}
	}
	g.expect(`{"ack":"heartbeat","status":"ok"}`, `{"ack":"publish","status":"ok"}`)
}

// bulk publishes n large records on topic.
func bulk(t *testing.T, b *running, topic string, n int) {
	t.Helper()
	payload := []byte(`"` + strings.Repeat("x", 50000) + `"`)
	for range n {
		if _, err := b.Publish(t.Context(), bus.PublishRequest{Topic: topic, Payload: payload}); err != nil {
			t.Fatal(err)
		}
	}
}

// A session ended in the middle of a delivery ends there: last words inside a
// frame would be read as a part of it.
func TestLastWordsNeverInsideAFrame(t *testing.T) {
	b := start(t, testOptions(t, t.TempDir()))
	bulk(t, b, "t", 400)
	slow := connect(t, b.addr, "g")
	slow.send(`{"type":"subscribe","topic":"t","from":1}`)
	eventually(t, "the delivery is stuck", func() bool {
		lag := b.Status([]string{"g"}).VMs[0].Lag
		time.Sleep(50 * time.Millisecond)
		return lag > 0 && lag < 401 && lag == b.Status([]string{"g"}).VMs[0].Lag
	})
	connect(t, b.addr, "g")
	for {
		f := slow.next()
		if strings.HasPrefix(f, "(") {
			return
		}
		if !json.Valid([]byte(f)) {
			t.Fatalf("a frame of %d bytes is no JSON: %.60q…%.80q", len(f), f, f[max(0, len(f)-80):])
		}
	}
}

// One subscription's backlog does not hold up another.
func TestSubscriptionsTakeTurns(t *testing.T) {
	b := start(t, testOptions(t, t.TempDir()))
	const n = 1000
	bulk(t, b, "bulk", n)
	g := connect(t, b.addr, "g")
	g.send(`{"type":"subscribe","topic":"bulk","from":1}`, `{"type":"subscribe","topic":"vm:g"}`)
	before := 0
	for !has(g.next(), `{"ack":"subscribe","topic":"vm:g"}`) {
		before++
	}
	if _, err := b.Publish(t.Context(), bus.PublishRequest{Topic: "vm:g", Payload: []byte(`"urgent"`)}); err != nil {
		t.Fatal(err)
	}
	for !strings.Contains(g.next(), `"urgent"`) {
		if before++; before > n {
			t.Fatal("the urgent one came last")
		}
	}
	if before > n*9/10 {
		t.Errorf("%d of %d came before the urgent one", before, n)
	}
}

// A guest that reads slowly, and beats, is alive.
func TestSlowReaderIsAlive(t *testing.T) {
	o := testOptions(t, t.TempDir())
	o.ReachableWithin, o.SessionTimeout = 4*time.Second, 5*time.Second // a busy machine stops this test for less
	b := start(t, o)
	bulk(t, b, "t", 200)
	g := connect(t, b.addr, "g")
	g.send(`{"type":"subscribe","topic":"t","from":1}`)
	buf := make([]byte, 100<<10)
	for range 60 { // six seconds: longer than any deadline
		g.send(`{"type":"heartbeat"}`)
		if _, err := g.conn.Read(buf); err != nil {
			t.Fatal(err)
		}
		if vm := b.Status([]string{"g"}).VMs[0]; !vm.Reachable || vm.Session == "" {
			t.Fatalf("%+v", vm)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// A cursor beyond the end of a log that was restored is set to the end, and
// moves on from there.
func TestCursorBeyondTheEnd(t *testing.T) {
	o := testOptions(t, t.TempDir())
	dir := filepath.Join(o.StateDir, "cursors")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "g.json"), []byte(`{"c":{"topic":"t","next":1000},"broken":null}`), 0o600); err != nil {
		t.Fatal(err)
	}
	b := start(t, o)
	publish := func(i int) {
		if _, err := b.Publish(t.Context(), bus.PublishRequest{Topic: "t", Payload: fmt.Append(nil, i)}); err != nil {
			t.Fatal(err)
		}
	}
	g := connect(t, b.addr, "g")
	g.send(`{"type":"subscribe","topic":"t","cursor":"c"}`)
	g.expect(`{"ack":"subscribe","status":"ok"}`)
	publish(1)
	var d struct{ Seq uint64 }
	if err := json.Unmarshal([]byte(g.next()), &d); err != nil {
		t.Fatal(err)
	}
	g.send(fmt.Sprintf(`{"type":"ack","ack":"publish","subscription":"t","seq":%d}`, d.Seq), `{"type":"heartbeat"}`)
	g.expect(`{"ack":"heartbeat"}`)
	_ = g.conn.Close()
	eventually(t, "gone", func() bool { return !b.Status([]string{"g"}).VMs[0].Reachable })
	publish(2)
	g = connect(t, b.addr, "g")
	g.send(`{"type":"subscribe","topic":"t","cursor":"c"}`)
	g.expect(`{"ack":"subscribe","status":"ok"}`, `{"type":"publish","payload":2}`)
}

// At the limit of sessions a VM may still connect anew.
func TestSupersedeAtTheLimit(t *testing.T) {
	o := testOptions(t, t.TempDir())
	o.MaxSessions = 1
	b := start(t, o)
	connect(t, b.addr, "g")
	connect(t, b.addr, "g")
	other := dial(t, b.addr)
	other.say("hello vm:other capabilities=bus-v1\n")
	if got := other.line(); got != "error: too-many-sessions" {
		t.Errorf("another VM was answered %q", got)
	}
}

// A session that made way has ended for those who read its VM's file, too.
func TestMadeWay(t *testing.T) {
	o := testOptions(t, t.TempDir())
	o.MaxSessions = 1
	b := start(t, o)
	g := connect(t, b.addr, "stranger")
	g.send(`{"type":"subscribe","topic":"t"}`)
	g.expect(`{"ack":"subscribe","status":"ok"}`)
	says := func(topics string) func() bool {
		return func() bool {
			file, _ := os.ReadFile(filepath.Join(o.StateDir, "handshakes", "stranger.json"))
			return strings.Contains(string(file), `"subscribed_topics":`+topics)
		}
	}
	eventually(t, "the file says what it hears", says(`["t"]`))
	if _, _, err := b.AddVM(t.Context(), bus.AddVMRequest{Name: "known", NoKey: true}); err != nil {
		t.Fatal(err)
	}
	connect(t, b.addr, "known")
	eventually(t, "the file says that it hears nothing", says(`[]`))
}

// An end is announced, and waits for nobody who has not said hello.
func TestShutdown(t *testing.T) {
	o := testOptions(t, t.TempDir())
	o.HandshakeTimeout = time.Hour
	b := start(t, o)
	g := connect(t, b.addr, "g")
	dial(t, b.addr)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	g.expect(`{"type":"error","code":"shutting-down"}`)
	b = start(t, testOptions(t, filepath.Dir(o.StateDir)))
	var out strings.Builder
	if err := b.Tail(t.Context(), bus.TailRequest{Lines: 1, Topics: []string{"castra.presence"}}, &out); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), `"payload":{"vm":"g","state":"unreachable"`) {
		t.Errorf("the last word on presence is %s", out.String())
	}
}

// A castrad that was killed had no time to announce an end; the next one does.
func TestKilledWithoutAWord(t *testing.T) {
	o := testOptions(t, t.TempDir())
	if err := os.MkdirAll(o.StateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	b := start(t, o)
	g := connect(t, b.addr, "g")
	file := filepath.Join(o.StateDir, "reachable.json")
	eventually(t, "it is written down", func() bool {
		list, _ := os.ReadFile(file)
		return strings.HasSuffix(string(list), `"reachable":["g"]}`+"\n")
	})
	_ = g.conn.Close()
	eventually(t, "so is that it has gone", func() bool {
		now, _ := os.ReadFile(file)
		return strings.HasSuffix(string(now), `"reachable":[]}`+"\n")
	})
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	now, err := os.ReadFile(file)
	if err != nil || !strings.HasSuffix(string(now), `"reachable":[]}`+"\n") {
		t.Errorf("after a clean end the list is %s, %v", now, err)
	}
	// As a kill leaves it that comes before a word; it has the number of all there are, or
	// that one would be heard.
	head, _, _ := strings.Cut(string(now), ",")
	if err := os.WriteFile(file, []byte(head+`,"reachable":["g"]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	b = start(t, testOptions(t, filepath.Dir(o.StateDir)))
	eventually(t, "it is announced", func() bool {
		return count(t, b, `"payload":{"vm":"g","state":"unreachable","reason":"restarted"}`) == 1
	})
}

// A retry of the host's own is known after a restart, and an ack after its
// subscriber has left.
func TestWhatIsRemembered(t *testing.T) {
	o := testOptions(t, t.TempDir())
	b := start(t, o)
	g := connect(t, b.addr, "g")
	g.send(`{"type":"subscribe","topic":"vm:g"}`)
	g.expect(`{"ack":"subscribe"}`)
	req := bus.PublishRequest{Topic: "vm:g", Payload: []byte("1"), ID: "x"}
	seq, err := b.Publish(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	g.expect(`{"payload":1}`)
	g.send(fmt.Sprintf(`{"type":"ack","ack":"publish","subscription":"vm:g","seq":%d}`, seq), `{"type":"unsubscribe","topic":"vm:g"}`)
	g.expect(`{"ack":"unsubscribe"}`)
	if vm, err := b.WaitAck(t.Context(), seq); err != nil || vm != "g" {
		t.Errorf("%q, %v", vm, err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	b = start(t, testOptions(t, filepath.Dir(o.StateDir)))
	if again, err := b.Publish(t.Context(), req); err != nil || again != seq {
		t.Errorf("a retry after a restart is %d, %v; want %d", again, err, seq)
	}
}

// For the race detector: status and acks while sessions and listeners come.
func TestLooksWhileThingsChange(t *testing.T) {
	b := start(t, testOptions(t, t.TempDir()))
	seq, err := b.Publish(t.Context(), bus.PublishRequest{Topic: "t", Payload: []byte("1")})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			b.Status(nil)
		}
	})
	wg.Go(func() { _, _ = b.WaitAck(ctx, seq) })
	g := connect(t, b.addr, "g")
	for i := range 50 {
		g.send(fmt.Sprintf(`{"type":"subscribe","topic":"t","sub":"s%d","from":"start"}`, i%16))
		for !has(g.next(), `{"ack":"subscribe"}`) {
		}
	}
	cancel()
	wg.Wait()
}
