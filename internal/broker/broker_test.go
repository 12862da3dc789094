package broker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

func TestPublishSubscribe(t *testing.T) {
	o := testOptions(t, t.TempDir())
	o.GuestTopics = guestTopics(t, "shared.>")
	b := start(t, o)
	a, c := connect(t, b.addr, "a"), connect(t, b.addr, "c")
	c.send(`{"type":"subscribe","topic":"shared.*"}`, `{"type":"subscribe","topic":"private","sub":"p"}`, `{"type":"subscribe","topic":"vm:c","sub":"own"}`)
	c.expect(`{"type":"ack","ack":"subscribe","status":"ok","topic":"shared.*"}`, `{"ack":"subscribe","topic":"private"}`, `{"ack":"subscribe","topic":"vm:c"}`)
	a.send(`{"type":"publish","topic":"private","payload":1}`,
		`{"type":"publish","topic":"shared.x","payload": {"n" : 12345678901234567890.10 }, "id":"i1","reply":"shared.r"}`,
		`{"type":"heartbeat"}`,
		`{"type":"publish","topic":"vm:c"}`,
		`{"type":"publish","topic":"castra.presence"}`,
		`{"type":"publish","topic":"bad topic"}`,
		`{"type":"dance"}`,
		`{"type":"publish","topic":7}`,
		`{"type":"publish","topic":"shared.x","id":"i1","payload":"again"}`)
	a.expect(`{"type":"ack","ack":"publish","status":"ok","topic":"private"}`,
		`{"ack":"publish","status":"ok","topic":"shared.x","id":"i1"}`,
		`{"ack":"heartbeat","status":"ok"}`,
		`{"ack":"publish","status":"error","code":"forbidden"}`,
		`{"ack":"publish","status":"error","code":"forbidden"}`,
		`{"ack":"publish","status":"error","code":"bad-topic"}`,
		`{"status":"error","code":"unsupported-type"}`,
		`{"ack":"publish","status":"error","code":"bad-frame"}`,
		`{"ack":"publish","status":"ok","id":"i1"}`)
	if _, err := b.Publish(t.Context(), bus.PublishRequest{Topic: "vm:c", Payload: []byte(`"for c"`)}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Publish(t.Context(), bus.PublishRequest{Topic: "private", Payload: []byte(`"from the host"`)}); err != nil {
		t.Fatal(err)
	}
	var got, others string
	for range 3 { // each subscription for itself is in order
		if d := c.next(); has(d, `{"subscription":"shared.*"}`) {
			got = d
		} else {
			others += d
		}
	}
	if !has(got, `{"type":"publish","topic":"shared.x","subscription":"shared.*","vm":"a","id":"i1","reply":"shared.r"}`) ||
		!strings.HasSuffix(got, `,"payload":{"n":12345678901234567890.10}}`) || !strings.HasPrefix(got, `{"type":"publish",`) {
		t.Fatalf("delivered %s", got)
	}
	if !strings.Contains(others, `"payload":"for c"`) || !strings.Contains(others, `"payload":"from the host"`) {
		t.Fatalf("delivered besides %s", others)
	}
}

func TestReplay(t *testing.T) {
	b := start(t, testOptions(t, t.TempDir()))
	for i := range 20 {
		if _, err := b.Publish(t.Context(), bus.PublishRequest{Topic: "t", Payload: fmt.Append(nil, i)}); err != nil {
			t.Fatal(err)
		}
	}
	g := connect(t, b.addr, "g")
	eventually(t, "presence is published", func() bool { return b.events.Committed() == 21 })
	for from, first := range map[string]int{`"start"`: 0, `5`: 4, `-3`: 17} {
		g.send(`{"type":"subscribe","topic":"t","sub":"s","from":` + from + `}`)
		if seq := fmt.Sprint(first); first > 0 {
			g.expect(`{"ack":"subscribe","status":"ok","seq":` + seq + `}`)
		} else {
			g.expect(`{"ack":"subscribe","status":"ok"}`)
		}
		for i := first; i < 20; i++ {
			g.expect(fmt.Sprintf(`{"type":"publish","subscription":"s","seq":%d,"payload":%d}`, i+1, i))
		}
	}
	g.send(`{"type":"unsubscribe","subscription":"s"}`, `{"type":"heartbeat"}`)
	g.expect(`{"ack":"unsubscribe","status":"ok"}`, `{"ack":"heartbeat"}`)
}

// An ack bears the id of the frame that it answers, whatever that is.
func TestAcksBearTheID(t *testing.T) {
	b := start(t, testOptions(t, t.TempDir()))
	g := connect(t, b.addr, "g")
	long := strings.Repeat("x", wire.MaxID+1)
	g.send(
		`{"type":"publish","topic":"t","id":"1"}`, `{"type":"subscribe","topic":"t","id":"2"}`, `{"id":"3\u0022","type":"unsubscribe","topic":"t"}`,
		`{"type":"heartbeat","id":"4"}`, `{"type":"subscribe","topic":"a b","id":"5"}`, `{"type":"subscribe","topic":"t","sub":1,"id":"6"}`,
		`{"type":"unheard-of","id":"7"}`, `{"type":8,"id":"8"}`, `{"type":"gap","id":"9"}`, `{"type":"heartbeat","id":"`+long+`"}`, `{"type":"heartbeat","id":10}`,
	)
	for _, want := range []string{
		`{"ack":"publish","status":"ok","id":"1"}`, `{"ack":"subscribe","status":"ok","id":"2"}`, `{"ack":"unsubscribe","status":"ok","id":"3\""}`,
		`{"ack":"heartbeat","status":"ok","id":"4"}`, `{"ack":"subscribe","code":"bad-topic","id":"5"}`, `{"ack":"subscribe","code":"bad-frame","id":"6"}`,
		`{"code":"unsupported-type","id":"7"}`, `{"code":"bad-frame","id":"8"}`, `{"code":"unsupported-type","id":"9"}`,
	} {
		g.expect(want)
	}
	for range 2 {
		if answer := g.next(); strings.Contains(answer, `"id"`) || !strings.Contains(answer, `"status":"ok"`) {
			t.Errorf("answered with %s", answer)
		}
	}
}

func TestDurableCursor(t *testing.T) {
	o := testOptions(t, t.TempDir())
	b := start(t, o)
	for i := range 10 {
		if _, err := b.Publish(t.Context(), bus.PublishRequest{Topic: "t", Payload: fmt.Append(nil, i)}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.Publish(t.Context(), bus.PublishRequest{Topic: "another", Payload: []byte("10")}); err != nil {
		t.Fatal(err)
	}
	g := connect(t, b.addr, "g")
	g.send(`{"type":"subscribe","topic":"t","from":"start","cursor":"c"}`)
	g.expect(`{"ack":"subscribe","status":"ok"}`, `{"payload":0}`, `{"payload":1}`, `{"payload":2}`)
	g.send(`{"type":"ack","ack":"publish","subscription":"t","seq":3}`, `{"type":"ack","ack":"publish","subscription":"t","seq":2}`,
		`{"type":"ack","ack":"publish","subscription":"t","seq":999}`,
		`{"type":"ack","ack":"publish","subscription":"t","seq":11}`, // it was passed, and not sent
		`{"type":"heartbeat"}`)
	for range 8 { // seven deliveries and the answer to the heartbeat, in any order
		g.next()
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	b = start(t, testOptions(t, filepath.Dir(o.StateDir)))
	g = connect(t, b.addr, "g")
	g.send(`{"type":"subscribe","topic":"t","from":"now","cursor":"c"}`)
	g.expect(`{"ack":"subscribe","status":"ok"}`, `{"seq":4,"payload":3}`)
}

func TestSupersede(t *testing.T) {
	o := testOptions(t, t.TempDir())
	b := start(t, o)
	first := connect(t, b.addr, "g")
	second := connect(t, b.addr, "g")
	first.expect(`{"type":"error","code":"superseded"}`)
	if got := first.next(); got != "(EOF)" {
		t.Fatalf("behind the error: %s", got)
	}
	second.send(`{"type":"heartbeat"}`)
	second.expect(`{"ack":"heartbeat"}`)
	vm := b.Status([]string{"g"}).VMs[0]
	if !vm.Reachable || vm.LastHeartbeatAgeMS == nil {
		t.Fatalf("%+v", vm)
	}
	eventually(t, "bus-events.jsonl tells", func() bool {
		data, _ := os.ReadFile(filepath.Join(o.StateDir, "handshakes", "bus-events.jsonl"))
		return bytes.Contains(data, []byte(`"reason":"superseded","action":"disconnect"`))
	})
	_ = second.conn.Close()
	eventually(t, "unreachable at once", func() bool { return !b.Status([]string{"g"}).VMs[0].Reachable })
}

func TestFatalFrames(t *testing.T) {
	b := start(t, testOptions(t, t.TempDir()))
	for name, raw := range map[string]string{
		"length 0":       "\x00\x00\x00\x00",
		"length 65537":   "\x00\x01\x00\x01{}",
		"no object":      "\x00\x00\x00\x02[]",
		"bad UTF-8":      "\x00\x00\x00\x0c" + `{"type":"` + "\xff" + `"}`,
		"duplicate keys": "\x00\x00\x00\x0d" + `{"a":1,"a":2}`,
	} {
		t.Run(name, func(t *testing.T) {
			g := connect(t, b.addr, "g")
			g.send(`{"type":"publish","topic":"before"}`)
			g.say("%s", raw)
			g.expect(`{"ack":"publish","status":"ok"}`, `{"type":"error","code":"protocol-error"}`)
			if got := g.next(); got != "(EOF)" {
				t.Errorf("behind the error: %s", got)
			}
		})
	}
}

func TestHandshakeOnly(t *testing.T) {
	o := testOptions(t, t.TempDir())
	b := start(t, o)
	g := dial(t, b.addr)
	g.say("HELLO vm:old capabilities=Exec\r\n")
	if got := g.line(); got != "ok" {
		t.Fatalf("answered %q", got)
	}
	if got := g.line(); got != "(EOF)" {
		t.Fatalf("then %q", got)
	}
	eventually(t, "reachable", func() bool {
		s := b.Status([]string{"old"})
		return len(s.VMs) == 1 && s.VMs[0].Reachable
	})
	o.ReachableWithin = 300 * time.Millisecond // only now, or a busy machine looks too late
	b.configure(o.Settings)
	eventually(t, "unreachable", func() bool { return !b.Status([]string{"old"}).VMs[0].Reachable })
	var f map[string]any
	eventually(t, "the file", func() bool {
		data, err := os.ReadFile(filepath.Join(o.StateDir, "handshakes", "old.json"))
		return err == nil && json.Unmarshal(data, &f) == nil
	})
	if f["vm"] != "old" || fmt.Sprint(f["capabilities"]) != "[exec]" {
		t.Errorf("%v", f)
	}
}

func TestSilentGuest(t *testing.T) {
	o := testOptions(t, t.TempDir())
	o.ReachableWithin = 200 * time.Millisecond
	b := start(t, o)
	g := connect(t, b.addr, "g")
	// Of what is published nothing is over before a busy machine looks.
	published := func(want ...string) {
		t.Helper()
		var got []string
		eventually(t, "every change is published", func() bool {
			var out bytes.Buffer
			if err := b.Tail(t.Context(), bus.TailRequest{All: true, Topics: []string{"castra.>"}}, &out); err != nil {
				t.Fatal(err)
			}
			got = got[:0]
			for line := range strings.Lines(out.String()) {
				var r struct {
					Payload struct{ State string }
				}
				if err := json.Unmarshal([]byte(line), &r); err != nil {
					t.Fatal(err)
				}
				got = append(got, r.Payload.State)
			}
			return len(got) >= len(want)
		})
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("published %v, want %v", got, want)
		}
	}
	published("reachable", "unreachable")
	g.send(`{"type":"heartbeat"}`)
	g.expect(`{"ack":"heartbeat"}`)
	published("reachable", "unreachable", "reachable", "unreachable")
	o.SessionTimeout = 600 * time.Millisecond
	b.configure(o.Settings)
	g.expect(`{"type":"error","code":"heartbeat-timeout"}`)
}

func TestTailAndWaitAck(t *testing.T) {
	b := start(t, testOptions(t, t.TempDir()))
	g := connect(t, b.addr, "g")
	g.send(`{"type":"subscribe","topic":"vm:g"}`)
	g.expect(`{"ack":"subscribe"}`)
	ctx, cancel := context.WithCancel(t.Context())
	r, w := io.Pipe()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { _ = w.CloseWithError(b.Tail(ctx, bus.TailRequest{VM: "g", Follow: true, All: true}, w)) })
	seq, err := b.Publish(t.Context(), bus.PublishRequest{Topic: "vm:g", Payload: []byte(` { "a" : 1 } `)})
	if err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 4096)
	n, err := r.Read(line)
	if err != nil || !has(string(line[:n]), fmt.Sprintf(`{"seq":%d,"vm":"host","topic":"vm:g","payload":{"a":1}}`, seq)) {
		t.Fatalf("tail gave %s, %v", line[:n], err)
	}
	g.expect(`{"payload":{"a":1}}`)
	short, stop := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer stop()
	var refusal *bus.Error
	if _, err := b.WaitAck(short, seq); !errors.As(err, &refusal) || refusal.Code != bus.CodeNoAck {
		t.Fatalf("before the ack: %v", err)
	}
	g.send(fmt.Sprintf(`{"type":"ack","ack":"publish","subscription":"vm:g","seq":%d}`, seq))
	if vm, err := b.WaitAck(t.Context(), seq); err != nil || vm != "g" {
		t.Fatalf("after the ack: %q, %v", vm, err)
	}
	cancel()
	_ = r.Close()
}

func TestSilentConnectionsDelayNobody(t *testing.T) {
	o := testOptions(t, t.TempDir())
	o.MaxHandshakes = 1000
	b := start(t, o)
	for range 1000 {
		dial(t, b.addr)
	}
	connect(t, b.addr, "g").send(`{"type":"heartbeat"}`)
}

func TestSlowSubscriberLosesNothing(t *testing.T) {
	b := start(t, testOptions(t, t.TempDir()))
	slow, quick := connect(t, b.addr, "slow"), connect(t, b.addr, "quick")
	for _, g := range []*guest{slow, quick} {
		g.send(`{"type":"subscribe","topic":"t"}`)
		g.expect(`{"ack":"subscribe"}`)
	}
	payload := []byte(`"` + strings.Repeat("x", 50000) + `"`)
	const n = 400
	for range n {
		if _, err := b.Publish(t.Context(), bus.PublishRequest{Topic: "t", Payload: payload}); err != nil {
			t.Fatal(err)
		}
		if got := quick.next(); !strings.Contains(got, `"subscription":"t"`) {
			t.Fatalf("%.100s", got)
		}
	}
	last := 0
	for range n {
		var d struct{ Seq int }
		if err := json.Unmarshal([]byte(slow.next()), &d); err != nil || d.Seq <= last {
			t.Fatalf("seq %d behind %d, %v", d.Seq, last, err)
		}
		last = d.Seq
	}
}
