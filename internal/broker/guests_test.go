package broker

import (
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/presence"
	"github.com/castrabus/castra/internal/wire"
)

// The lines of contract 2, byte for byte, and what is recorded of each.
func TestHandshakeLines(t *testing.T) {
	o := testOptions(t, t.TempDir())
	o.AcceptUnknown = false
	b := start(t, o)
	for name, noKey := range map[string]bool{"open": true, "keyed": false} {
		if _, _, err := b.AddVM(t.Context(), bus.AddVMRequest{Name: name, NoKey: noKey}); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct{ hello, answer, recorded string }{
		{"hello vm:open capabilities=bus-v1\n", "ok session=sess-", `"vm":"open","capabilities":["bus-v1"],"session_kind":"guest","session_outcome":"granted","remote_addr"`},
		{"HELLO vm:open capabilities=BUS-V1,New x=y\r\n", "ok session=sess-", `"capabilities":["bus-v1","new"]`},
		{"hello vm:open capabilities=exec\n", "ok", `"session_outcome":"denied","reason":"missing-capability"`},
		{"hello vm:open\n", "ok", `"capabilities":[],"session_kind":"guest","session_outcome":"denied"`},
		{"hello vm:nobody capabilities=bus-v1\n", "error: unknown-vm", `"vm":"nobody","capabilities":["bus-v1"],"session_kind":"guest","session_outcome":"denied","reason":"unknown-vm"`},
		{"hello capabilities=bus-v1\n", "error: unknown-vm", `"vm":"127.0.0.1:`},
		{"hello vm:HOST capabilities=bus-v1\n", "error: reserved-identity", `"reason":"reserved-identity"`},
		{"hello vm:../etc capabilities=bus-v1\n", "error: invalid-name", `"reason":"invalid-name"`},
		{"hello w\u00e9b capabilities=bus-v1\n", "error: invalid-name", `"vm":"wéb","capabilities":["bus-v1"],`},
		{"hello vm:" + strings.Repeat("a", 129) + " capabilities=bus-v1\n", "error: invalid-name", `"reason":"invalid-name"`},
		{"hello vm:open capabilities=bus-v1,Host-Bus\n", "error: forbidden", `"reason":"forbidden"`},
		{"hello vm:keyed capabilities=bus-v1\n", "error: auth-required", `"reason":"auth-required"`},
		{"GET / HTTP/1.1\n", "error: protocol-error", `"reason":"protocol-error"`},
		{strings.Repeat("x", 600), "error: protocol-error", `"reason":"protocol-error"`},
		{"", "error: read-timeout", `"session_outcome":"timeout","reason":"read-timeout"`},
	} {
		if c.hello == "" { // the others are not to be in a hurry
			o.HandshakeTimeout = time.Second
			b.configure(o.Settings)
		}
		g := dial(t, b.addr)
		g.say("%s", c.hello)
		got := g.line()
		if session := strings.HasSuffix(c.answer, "sess-"); got != c.answer && (!session || !strings.HasPrefix(got, c.answer) || len(got) != len(c.answer)+32) {
			t.Errorf("%.60q was answered %q, want %q", c.hello, got, c.answer)
		} else if !session && g.line() != "(EOF)" {
			t.Errorf("%.60q: the connection stays open", c.hello)
		}
		_ = g.conn.Close()
		eventually(t, "recorded: "+c.recorded, func() bool {
			data, _ := os.ReadFile(filepath.Join(o.StateDir, "handshakes", "handshake-events.jsonl"))
			return strings.Contains(string(data), c.recorded)
		})
	}
	for _, r := range b.Status(nil).Refused {
		if r.VM == "open" && r.Reason != wire.ReasonForbidden { // which came last
			t.Errorf("%+v is listed, and it was let in later", r)
		}
	}
	files, err := filepath.Glob(filepath.Join(o.StateDir, "handshakes", "*.json"))
	if err != nil || len(files) != 1 {
		t.Errorf("files of VMs: %v, %v; want open's alone", files, err)
	}
}

// prove answers a challenge with key and gives the broker's answer.
func prove(t *testing.T, addr, vm string, key []byte, mac func(right []byte, nonce string) string) (reply wire.Reply, caps, cn, sn string) {
	t.Helper()
	g := dial(t, addr)
	caps, cn = "bus-v1,auth-hmac-v1", strings.Repeat("ab", 16)
	g.say("hello vm:%s capabilities=%s nonce=%s\n", vm, caps, cn)
	sn, err := wire.ParseChallenge([]byte(g.line()))
	if err != nil {
		t.Fatal(err)
	}
	g.say("auth mac=%s\n", mac(wire.ClientMAC(key, vm, caps, cn, sn), sn))
	if reply, err = wire.ParseReply([]byte(g.line())); err != nil {
		t.Fatal(err)
	}
	return reply, caps, cn, sn
}

func TestProof(t *testing.T) {
	b := start(t, testOptions(t, t.TempDir()))
	_, key, err := b.AddVM(t.Context(), bus.AddVMRequest{Name: "keyed"})
	if err != nil {
		t.Fatal(err)
	}
	right := func(mac []byte, _ string) string { return hex.EncodeToString(mac) }
	r, caps, cn, sn := prove(t, b.addr, "keyed", key, right)
	if want := hex.EncodeToString(wire.ServerProof(key, "keyed", caps, cn, sn, r.Token)); !r.OK || r.Proof != want {
		t.Fatalf("%+v, want proof %s", r, want)
	}
	if vm := b.Status([]string{"keyed"}).VMs[0]; !vm.Reachable || !vm.Keyed {
		t.Errorf("%+v", vm)
	}
	var first string
	for name, mac := range map[string]func([]byte, string) string{
		"zeros":     func([]byte, string) string { return strings.Repeat("0", 64) },
		"truncated": func(mac []byte, _ string) string { return hex.EncodeToString(mac[:16]) },
		"reflected": func(_ []byte, nonce string) string { return nonce + nonce },
		"replayed": func(mac []byte, _ string) string {
			return hex.EncodeToString(wire.ClientMAC(key, "keyed", caps, cn, sn))
		},
	} {
		if r, _, _, nonce := prove(t, b.addr, "keyed", key, mac); r.Refusal != wire.ReasonAuthFailed {
			t.Errorf("%s: %+v", name, r)
		} else if nonce == first {
			t.Error("the same nonce twice")
		} else {
			first = nonce
		}
	}
	if !b.Status([]string{"keyed"}).VMs[0].Reachable {
		t.Error("a refused handshake ended the session")
	}
	newKey, err := b.RekeyVM(t.Context(), "keyed")
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the old key's session ends", func() bool { return !b.Status([]string{"keyed"}).VMs[0].Reachable })
	if r, _, _, _ := prove(t, b.addr, "keyed", key, right); r.Refusal != wire.ReasonAuthFailed {
		t.Errorf("the old key: %+v", r)
	}
	if r, _, _, _ := prove(t, b.addr, "keyed", newKey, right); !r.OK {
		t.Errorf("the new key: %+v", r)
	}
}

func TestGuestLimits(t *testing.T) {
	o := testOptions(t, t.TempDir())
	o.Rate = presence.Rate{Records: 0.001, Burst: 3, Bytes: 1e9}
	b := start(t, o)
	g := connect(t, b.addr, "g")
	for range 3 {
		g.send(`{"type":"publish"}`)
		g.expect(`{"ack":"publish","status":"ok","topic":"broadcast"}`)
	}
	g.send(`{"type":"publish","id":"x"}`, `{"type":"publish","payload":"`+strings.Repeat("x", wire.MaxPayload-1)+`"}`)
	got := g.next()
	if !has(got, `{"ack":"publish","status":"error","code":"rate-limited","id":"x"}`) || !strings.Contains(got, `"retry_after_ms":`) {
		t.Errorf("beyond the rate: %s", got)
	}
	g.expect(`{"ack":"publish","status":"error","code":"too-large"}`)
	for i := range 16 {
		g.send(fmt.Sprintf(`{"type":"subscribe","topic":"t%d"}`, i))
		g.expect(`{"ack":"subscribe","status":"ok"}`)
	}
	g.send(`{"type":"subscribe","topic":"t16"}`, `{"type":"subscribe","topic":"t3"}`, `{"type":"unsubscribe","topic":"t3"}`, `{"type":"subscribe","topic":"t16"}`)
	g.expect(`{"status":"error","code":"too-many-subscriptions"}`, `{"status":"ok"}`, `{"ack":"unsubscribe","status":"ok"}`, `{"status":"ok"}`)
	for topic, code := range map[string]string{"vm:other": "forbidden", "vm:*": "forbidden", "castra.>": "forbidden", "a b": "bad-topic"} {
		g.send(`{"type":"subscribe","topic":"` + topic + `"}`)
		g.expect(`{"ack":"subscribe","status":"error","code":"` + code + `"}`)
	}
	vm := b.Status([]string{"g"}).VMs[0]
	if vm.RateLimited != 1 || vm.LastLimitedAgeMS == nil || vm.Published != 3 || len(vm.Subscriptions) != 16 {
		t.Errorf("%+v", vm)
	}
	eventually(t, "bus-events.jsonl tells", func() bool {
		data, _ := os.ReadFile(filepath.Join(o.StateDir, "handshakes", "bus-events.jsonl"))
		return strings.Contains(string(data), `"reason":"rate_limited","action":"throttle"`)
	})
}

// When unfinished handshakes are too many the oldest goes, never the newcomer.
func TestOldestHandshakeGoes(t *testing.T) {
	o := testOptions(t, t.TempDir())
	o.MaxHandshakes = 10
	b := start(t, o)
	live := connect(t, b.addr, "live")
	var silent []*guest
	for range 15 {
		silent = append(silent, dial(t, b.addr))
	}
	for i, g := range silent[:5] {
		if got := g.line(); !strings.HasPrefix(got, "(") {
			t.Errorf("silent connection %d was told %q, want a close", i, got)
		}
	}
	silent[14].say("hello vm:late capabilities=bus-v1\n")
	if got := silent[14].line(); !strings.HasPrefix(got, "ok session=") {
		t.Errorf("the newcomer was answered %q", got)
	}
	live.send(`{"type":"heartbeat"}`)
	live.expect(`{"ack":"heartbeat","status":"ok"}`)
}

// A guest that asked for its order to be kept: behind a publish refused for now nothing
// is stored until that one has come again, on this side of a restart or the other.
func TestOrdered(t *testing.T) {
	o := testOptions(t, t.TempDir())
	disk := &stuckFS{FS: eventlog.OS}
	o.FS = disk
	none := presence.Rate{Records: 0.001, Burst: 1, Bytes: 1e9}
	b := start(t, o)
	plenty, settings := o.Rate, o.Settings
	rate := func(r presence.Rate) {
		t.Helper()
		settings.Rate = r
		b.configure(settings)
	}
	frame := func(id string) string { return `{"type":"publish","id":"` + id + `"}` }
	ok := func(id string) string { return `{"ack":"publish","status":"ok","id":"` + id + `"}` }
	refused := func(id string) string {
		return `{"ack":"publish","status":"error","code":"rate-limited","id":"` + id + `"}`
	}

	plain, g := connect(t, b.addr, "plain"), dial(t, b.addr)
	g.say("hello vm:g capabilities=bus-v1,ORDERED-v1\n")
	if got := g.line(); !strings.HasPrefix(got, "ok session=sess-") {
		t.Fatal(got)
	}
	rate(none)
	for _, g := range []*guest{plain, g} {
		g.send(frame("a"), frame("b"), frame("c"))
		g.expect(ok("a"), refused("b"), refused("c"))
	}
	rate(plenty)
	plain.send(frame("c"))
	plain.expect(ok("c"))
	// One without an id, and one that was stored already, wait like any other.
	g.send(frame("c"), `{"type":"publish"}`, frame("a"), `{"type":"publish","topic":"vm:plain","id":"d"}`, `{"type":"heartbeat"}`)
	g.expect(refused("c"), `{"status":"error","code":"rate-limited"}`, refused("a"), `{"status":"error","code":"forbidden","id":"d"}`, `{"ack":"heartbeat"}`)
	b = restart(t, b, 2)
	rate(plenty)
	g.send(frame("c"), frame("b"), frame("c"), frame("d"))
	g.expect(refused("c"), ok("b"), ok("c"), ok("d"))
	// Without an id there is nothing to wait for.
	rate(none)
	g.send(`{"type":"publish"}`, `{"type":"publish"}`)
	g.expect(`{"status":"ok"}`, `{"status":"error","code":"rate-limited"}`)
	rate(plenty)
	g.send(frame("e"))
	g.expect(ok("e"))
	// What the disk refuses holds back what comes behind its answer, too.
	disk.fails.Store(true)
	g.send(frame("f"), frame("g"))
	full := `{"status":"error","code":"storage-full","id":"`
	g.expect(full+`f"}`, full+`g"}`)
	b.logWorks()
	g.send(frame("g"), frame("h"), frame("f"), frame("g"))
	g.expect(full+`g"}`, full+`h"}`, ok("f"), ok("g"))
}
