package e2e

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// memoryBound is what castrad never takes more of, whatever is done to it here: the
// limits of attackLimits bound what guests can make it keep.
const memoryBound = 256 << 20

// attackLimits are small, so that each is reached.
const attackLimits = `max_handshakes = 256
max_sessions = 400
publish_rate = 500
publish_burst = 500
`

// TestAttacks attacks a running castrad in every way that it is meant to withstand,
// and looks from outside at what the attacker gets, what is recorded of it, and that
// an honest guest beside him notices nothing.
func TestAttacks(t *testing.T) {
	s := besiege(t, attackLimits)
	t.Run("quick", func(t *testing.T) {
		for _, a := range handshakeAttacks() {
			t.Run(a.name, func(t *testing.T) { t.Parallel(); s.attackHandshake(t, a) })
		}
		for _, a := range frameAttacks() {
			t.Run(a.name, func(t *testing.T) { t.Parallel(); s.attackFrames(t, a) })
		}
		for name, attack := range proofAttacks {
			t.Run(name, func(t *testing.T) { t.Parallel(); attack(t, s) })
		}
		for name, attack := range slowAttacks {
			t.Run(name, func(t *testing.T) { t.Parallel(); attack(t, s) })
		}
	})
	s.honest.goesOn(t)
	for _, f := range floodAttacks {
		t.Run(f.name, func(t *testing.T) {
			f.run(t, s)
			s.honest.goesOn(t)
		})
	}
	s.honest.intact()
	s.nothingForged(t)
	if m := s.memory(s.castrad); m > memoryBound {
		t.Errorf("castrad has taken %d MiB, more than %d", m>>20, memoryBound>>20)
	}
}

// TestDescriptorExhaustion takes more connections than castrad may have descriptors.
// Sessions, the log and newcomers go on.
func TestDescriptorExhaustion(t *testing.T) {
	s := besiege(t, "", "prlimit", "--nofile=128:128")
	var held []*guestConn
	for range 400 {
		g, err := s.dial()
		if err != nil {
			continue // closed to make room, before it was greeted
		}
		defer g.Close()
		held = append(held, g)
	}
	if len(held) < 200 {
		t.Errorf("only %d connections were greeted", len(held))
	}
	s.honest.goesOn(t)
	for range 5 {
		g, _, err := s.join("victim", s.keys["victim"])
		if err != nil {
			t.Errorf("a newcomer: %v", err)
			continue
		}
		_ = g.frame(`{"type":"subscribe","topic":"honest.work","from":"start"}`) // takes files to read
		if f, err := g.receive(); !strings.Contains(f, `"status":"ok"`) {
			t.Errorf("its subscription: %s, %v", f, err)
		}
		_ = g.Close()
	}
	s.limited(t, "max_handshakes", 1)
	s.honest.intact()
	log, err := os.ReadFile(s.path("castrad.log"))
	if err != nil || strings.Count(string(log), "\n") > 100 || !strings.Contains(string(log), "LimitNOFILE") {
		t.Errorf("castrad's log has %d lines (%v)", strings.Count(string(log), "\n"), err)
	}
}

// nothingForged looks for what no attack may leave behind: files outside the
// directories, or in them by another's name, lines of the log that a guest wrote.
func (s *siege) nothingForged(t *testing.T) {
	known := map[string]bool{"honest": true, "victim": true, "mallory": true, "open": true}
	for _, dir := range []string{"state/handshakes", "state/cursors", "log/bus/vm"} {
		entries, err := os.ReadDir(s.path(dir))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			name := strings.TrimSuffix(e.Name(), ".json")
			if strings.Contains(e.Name(), ".jsonl") || strings.HasSuffix(e.Name(), ".tmp") {
				continue
			}
			if !known[name] && !strings.HasPrefix(name, "guest-") {
				t.Errorf("%s/%s is there", dir, e.Name())
			}
		}
	}
	if found, _ := filepath.Glob(s.path("*passwd*")); len(found) > 0 {
		t.Errorf("%v is there", found)
	}
	log, err := os.ReadFile(s.path("castrad.log"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(log)) {
		if _, err := time.Parse(time.RFC3339Nano, strings.SplitN(line, " ", 2)[0]); err != nil || strings.ContainsAny(line, "\x1b\x00\r\u202e") {
			t.Errorf("castrad's log has the line %q", line)
		}
	}
}

// A handshakeAttack is bytes after the greeting, what comes back, and what is
// recorded of them.
type handshakeAttack struct {
	name, send, want string
	vm               string // as recorded; "": an address
}

func handshakeAttacks() []handshakeAttack {
	const caps = " capabilities=bus-v1\n"
	var all []handshakeAttack
	add := func(name, send, want, vm string) {
		all = append(all, handshakeAttack{name, send, "error: " + want, vm})
	}
	add("another's name before its session", "hello vm:victim"+caps, "auth-required", "victim")
	add("another's name without a session", "hello vm:victim\n", "auth-required", "victim")
	add("another's name during its session", "hello vm:honest"+caps, "auth-required", "honest")
	add("another's name with a nonce and no proof", "hello vm:victim capabilities=bus-v1 nonce="+someNonce+"\n", "auth-required", "victim")
	for _, host := range []string{"host", "HOST", "Host", "hOsT"} {
		add("the name "+host, "hello vm:"+host+caps, "reserved-identity", host)
	}
	add("the name host without vm:", "hello host"+caps, "reserved-identity", "host")
	add("the name host for a handshake alone", "HELLO VM:host\n", "reserved-identity", "host")
	for _, c := range []string{"host-bus", "HOST-BUS", "Host-Bus", "x,hOST-bUS,y"} {
		add("the capability "+c, "hello vm:open capabilities=bus-v1,"+c+"\n", "forbidden", "open")
	}
	add("host-bus under another's name", "hello vm:victim capabilities=host-bus,bus-v1\n", "forbidden", "victim")
	for _, name := range []string{
		"../victim", "..", ".victim", "-victim", "/etc/passwd", "victim/../../passwd", "victim/x", "victim%2f", `victim\x`, "vm:victim",
		"vict\u0456m", "victim\u200b", "victim\x00", "ho\u017ft", "\uff48ost", "\x1b[31mred", "a\u202eb", "victim\xff", "",
	} {
		add(fmt.Sprintf("the name %+q", name), "hello vm:"+name+caps, "invalid-name", strings.ToValidUTF8(name, "\ufffd"))
	}
	add("a name of 129 bytes", "hello vm:"+strings.Repeat("a", 129)+caps, "invalid-name", strings.Repeat("a", 129))
	for _, name := range []string{"Victim", "victim.", "victim-", "nobody"} {
		add("the look-alike "+name, "hello vm:"+name+caps, "unknown-vm", name)
	}
	add("two names", "hello vm:open vm:victim"+caps, "protocol-error", "")
	add("capabilities twice", "hello vm:open capabilities=bus-v1 capabilities=host-bus\n", "protocol-error", "")
	add("a forged log line", "hello vm:open\rcapabilities=x\n", "invalid-name", "open\rcapabilities=x")
	add("an escape sequence in a word", "hello vm:open capabilities=\x1b[2J\n", "protocol-error", "")
	add("a line of 513 bytes", "hello vm:open x="+strings.Repeat("x", 496)+"\n", "protocol-error", "")
	add("a line without an end", strings.Repeat("x", 4096), "protocol-error", "")
	add("an empty line", "\n", "protocol-error", "")
	add("NUL bytes", strings.Repeat("\x00", 100)+"\n", "protocol-error", "")
	add("another protocol", "GET / HTTP/1.1\r\nHost: x\r\n\r\n", "protocol-error", "")
	add("a short nonce", "hello vm:victim capabilities=bus-v1,auth-hmac-v1 nonce=00\n", "protocol-error", "")
	add("an answer before the challenge", "auth mac="+strings.Repeat("0", 64)+"\n", "protocol-error", "")
	return all
}

// attackHandshake sends the bytes; the connection is closed behind the answer.
func (s *siege) attackHandshake(t *testing.T, a handshakeAttack) {
	g, err := s.dial()
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	if _, err := io.WriteString(g, a.send); err != nil {
		t.Fatal(err)
	}
	if got, err := g.line(); got != a.want {
		t.Errorf("answered %q (%v), want %q", got, err, a.want)
	}
	if rest, err := io.ReadAll(g.r); len(rest) > 0 || err != nil {
		t.Errorf("and then %q, %v", rest, err)
	}
	vm, me := a.vm, g.LocalAddr().String()
	if !strings.HasPrefix(a.send, "hello vm: ") && vm == "" {
		vm = me
	}
	reason := strings.TrimPrefix(a.want, "error: ")
	s.recorded(t, handshakeEvents, reason+" of "+me, func(e event) bool {
		return e.Remote == me && (e.VM == vm || e.VM == me) && e.Outcome == "denied" && e.Reason == reason
	})
}

// A frameAttack is bytes in a session of the VM "open-N", and what comes back.
type frameAttack struct {
	name string
	send string // in place of frames: raw bytes
	// frames are sent one by one, each answered by what want has at its place.
	frames []string
	want   []string // parts of the answers; one that is fatal comes last
	fatal  bool
	check  func(t *testing.T, s *siege, vm string) // may be nil
}

func frameAttacks() []frameAttack {
	frame := func(name, f string, want ...string) frameAttack {
		return frameAttack{name: name, frames: []string{f}, want: want}
	}
	fatal := func(name, raw string) frameAttack {
		return frameAttack{name: name, send: raw, want: []string{`{"type":"error","code":"protocol-error"`}, fatal: true}
	}
	framed := func(f string) string {
		n := len(f)
		return string([]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}) + f
	}
	nested := func(n int) string { return strings.Repeat("[", n) + strings.Repeat("]", n) }
	digits := strings.Repeat("7", 400)
	all := []frameAttack{
		fatal("a length of 0", "\x00\x00\x00\x00"),
		fatal("a length of 65,537", "\x00\x01\x00\x01"+strings.Repeat(" ", 65537)),
		fatal("a length of 2^32-1", "\xff\xff\xff\xff{"),
		fatal("a length of 2^31", "\x80\x00\x00\x00{"),
		fatal("no object", framed(`["publish"]`)),
		fatal("two objects", framed(`{"type":"heartbeat"}{"type":"publish"}`)),
		fatal("half an object", framed(`{"type":"publish","payload":`)),
		fatal("nesting of 33", framed(`{"type":"publish","payload":`+nested(32)+`}`)),
		fatal("nesting of 30,000", framed(`{"type":"publish","payload":`+nested(30000)+`}`)),
		fatal("duplicate keys", framed(`{"type":"heartbeat","type":"publish"}`)),
		fatal("duplicate keys behind escapes", framed(`{"topic":"a","t\u006fpic":"vm:victim","type":"publish"}`)),
		fatal("bad UTF-8", framed("{\"type\":\"publish\",\"payload\":\"\xc3\x28\"}")),
		fatal("an overlong encoding", framed("{\"type\":\"publish\",\"payload\":\"\xc0\xae\"}")),
		fatal("a lone high surrogate", framed(`{"type":"publish","payload":"\ud800"}`)),
		fatal("a lone low surrogate", framed(`{"type":"publish","payload":["\udc00\ud800"]}`)),
		fatal("a NUL byte", framed("{\"type\":\"heartbeat\x00\"}")),
		frame("another's topic", `{"type":"publish","topic":"vm:victim","payload":1}`, `"status":"error","code":"forbidden"`),
		frame("below another's topic", `{"type":"publish","topic":"vm:victim/x","payload":1}`, `"status":"error","code":"forbidden"`),
		frame("the broker's topic", `{"type":"publish","topic":"castra.presence","payload":{"vm":"honest","state":"unreachable"}}`, `"code":"forbidden"`),
		frame("a topic with a path", `{"type":"publish","topic":"vm:../../etc/passwd"}`, `"code":"bad-topic"`),
		frame("a topic with an escape sequence", `{"type":"publish","topic":"\u001b[31m"}`, `"code":"bad-topic"`),
		frame("a topic of 256 bytes", `{"type":"publish","topic":"`+strings.Repeat("t", 256)+`"}`, `"code":"bad-topic"`),
		frame("an id of 129 bytes", `{"type":"publish","id":"`+strings.Repeat("i", 129)+`"}`, `"code":"bad-frame"`),
		frame("an id that is a number", `{"type":"publish","id":7}`, `"code":"bad-frame"`),
		frame("a reply to another's topic that is none", `{"type":"publish","reply":"vm:"}`, `"code":"bad-topic"`),
		frame("a subscription to another's topic", `{"type":"subscribe","topic":"vm:victim"}`, `"code":"forbidden"`),
		frame("a subscription below another's topic", `{"type":"subscribe","topic":"vm:victim/>"}`, `"code":"forbidden"`),
		frame("a subscription to everybody's topics", `{"type":"subscribe","topic":"vm:*"}`, `"code":"forbidden"`),
		frame("a subscription to the broker's topics", `{"type":"subscribe","topic":"castra.>"}`, `"code":"forbidden"`),
		frame("a cursor with a path", `{"type":"subscribe","topic":"t","cursor":"../../victim"}`, `"code":"bad-frame"`),
		frame("a position of 400 digits", `{"type":"subscribe","topic":"t","from":`+digits+`}`, `"code":"bad-frame"`),
		frame("an unknown type", `{"type":"shutdown"}`, `"code":"unsupported-type"`),
		frame("a delivery", `{"type":"gap","subscription":"t","from":1,"to":9}`, `"code":"unsupported-type"`),
		frame("a payload of 61,441 bytes", `{"type":"publish","payload":"`+strings.Repeat("x", 61439)+`"}`, `"code":"too-large"`),
		{
			name: "a length of 65,536", send: framed(`{"type":"heartbeat"` + strings.Repeat(" ", 65536-20) + `}`),
			want: []string{`{"type":"ack","ack":"heartbeat","status":"ok"`},
		},
		{
			name:   "a number of 400 digits",
			frames: []string{`{"type":"publish","topic":"a.digits","payload":` + digits + `}`},
			want:   []string{`"status":"ok"`},
			check: func(t *testing.T, s *siege, vm string) {
				if out, err := s.tryCastractl("bus", "tail", "--topic", "a.digits", "-n", "all", "--no-follow", "-o", "cat"); strings.TrimSpace(out) != digits || err != nil {
					t.Errorf("it came out as %s, %v", out, err)
				}
			},
		},
		{
			name:   "forged members",
			frames: []string{`{"type":"publish","topic":"a.forged","vm":"victim","seq":1,"time":"1999-01-01T00:00:00Z","crc":"00000000","payload":1}`},
			want:   []string{`"status":"ok"`},
			check: func(t *testing.T, s *siege, vm string) {
				out, err := s.tryCastractl("bus", "tail", "--topic", "a.forged", "-n", "all", "--no-follow", "-o", "json")
				if err != nil || !strings.Contains(out, `"vm":"`+vm+`"`) || strings.Contains(out, "1999") || strings.Contains(out, `"seq":1,`) || strings.Contains(out, "victim") {
					t.Errorf("the record is %s, %v", out, err)
				}
			},
		},
		{
			name:   "an escape sequence in a payload",
			frames: []string{`{"type":"publish","topic":"a.colour","payload":"\u001b[31m \u009b2J \u202e \u2028 ` + "\u009b\u202e\u2028\x7f" + `"}`},
			want:   []string{`"status":"ok"`},
			check: func(t *testing.T, s *siege, vm string) {
				for _, format := range []string{"short", "cat"} {
					out, err := s.tryCastractl("bus", "tail", "--topic", "a.colour", "-n", "all", "--no-follow", "-o", format)
					if err != nil || strings.Count(out, "\n") != 1 || strings.ContainsAny(out, "\x1b\u009b\u202e\u2028\x7f") {
						t.Errorf("-o %s shows %q, %v", format, out, err)
					}
				}
			},
		},
		{
			name: "acks of the future",
			frames: []string{
				`{"type":"subscribe","topic":"a.future","cursor":"c","from":"now"}`, `{"type":"ack","ack":"publish","subscription":"a.future","seq":18446744073709551615}`,
				`{"type":"ack","ack":"publish","subscription":"nothing","seq":1}`, `{"type":"ack","ack":"publish","subscription":"a.future","seq":-1}`,
				`{"type":"heartbeat"}`, `{"type":"unsubscribe","topic":"a.future"}`,
			},
			want: []string{`"ack":"subscribe","status":"ok"`, "", "", `"code":"bad-frame"`, `"ack":"heartbeat"`, `"ack":"unsubscribe"`},
			check: func(t *testing.T, s *siege, vm string) {
				g, _, err := s.join(vm, nil)
				if err != nil {
					t.Fatal(err)
				}
				defer g.Close()
				if _, err := s.tryCastractl("bus", "publish", "--topic", "a.future", "1"); err != nil {
					t.Error(err)
				}
				_ = g.frame(`{"type":"subscribe","topic":"a.future","cursor":"c"}`)
				if f, err := g.receive(); !strings.Contains(f, `"status":"ok"`) {
					t.Errorf("subscribing again: %s, %v", f, err)
				}
				if f, err := g.receive(); !strings.Contains(f, `"payload":1`) {
					t.Errorf("the record behind the cursor: %s, %v", f, err)
				}
			},
		},
	}
	var subs, wants, cursors, cwants []string
	for i := range 17 {
		subs = append(subs, fmt.Sprintf(`{"type":"subscribe","topic":"many.%d"}`, i))
		wants = append(wants, `"status":"ok"`)
	}
	wants[16] = `"code":"too-many-subscriptions"`
	for i := range 65 {
		cursors = append(cursors, fmt.Sprintf(`{"type":"subscribe","topic":"many","cursor":"c%d"}`, i))
		cwants = append(cwants, `"status":"ok"`)
	}
	cwants[64] = `"code":"too-many-subscriptions"`
	return append(all,
		frameAttack{name: "17 subscriptions", frames: subs, want: wants, check: func(t *testing.T, s *siege, vm string) {
			s.recorded(t, busEvents, "of it", func(e event) bool {
				return e.VM == vm && e.Reason == "queue_full" && e.Action == "reject" && strings.Contains(e.Detail, "max_subscriptions")
			})
			s.limited(t, "max_subscriptions", 1)
		}},
		frameAttack{name: "65 cursors", frames: cursors, want: cwants},
	)
}

// attackFrames says the frames in a session of a VM that has none else.
func (s *siege) attackFrames(t *testing.T, a frameAttack) {
	vm := "guest-" + strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, a.name)
	if out, err := s.tryCastractl("vm", "add", vm, "--no-key"); err != nil {
		t.Fatal(out, err)
	}
	g, _, err := s.join(vm, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	frames := a.frames
	if a.send != "" {
		frames = []string{a.send}
	}
	for i, f := range frames {
		if a.send != "" {
			_, err = io.WriteString(g, f)
		} else {
			err = g.frame(f)
		}
		if err != nil && !a.fatal {
			t.Fatal(err)
		}
		if a.want[i] == "" {
			continue
		}
		if got, err := g.receive(); !strings.Contains(got, a.want[i]) {
			t.Fatalf("frame %d is answered %.300q (%v), want %s", i, got, err, a.want[i])
		}
	}
	if a.fatal {
		if rest, err := io.ReadAll(g.r); len(rest) > 0 || err != nil {
			t.Errorf("and then %q, %v", rest, err)
		}
		s.recorded(t, busEvents, "of it", func(e event) bool {
			return e.VM == vm && e.Reason == "protocol_error" && e.Action == "disconnect"
		})
	} else {
		if err := g.frame(`{"type":"heartbeat"}`); err != nil {
			t.Fatal(err)
		}
		if got, err := g.receive(); !strings.Contains(got, `"ack":"heartbeat","status":"ok"`) {
			t.Errorf("the session does not live on: %s, %v", got, err)
		}
	}
	if a.check != nil {
		a.check(t, s, vm)
	}
}
