package broker

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/identity"
	"github.com/castrabus/castra/internal/presence"
	"github.com/castrabus/castra/internal/wire"
)

// hang bounds every wait of these tests; none is expected to come near it.
const hang = 30 * time.Second

func testOptions(t testing.TB, dir string) Options {
	t.Helper()
	reg, problems, err := identity.Open(dir+"/state/vms", dir+"/vms.d")
	if err != nil || len(problems) > 0 {
		t.Fatal(err, problems)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	return Options{
		Version: "test", StateDir: dir + "/state", LogDir: dir + "/log", Registry: reg, Log: log,
		StallAfter: hang, // a disk that is busy with others' files is no fault here
		SyncName:   "always", SegmentSize: 1 << 20, HostRetention: 1 << 30, VMRetention: 8 << 20, MaxHandshakes: 100,
		Settings: Settings{
			AcceptUnknown: true, HandshakeTimeout: 5 * time.Second, SessionTimeout: time.Minute, ReachableWithin: 45 * time.Second,
			MaxSessions: 1000, MaxVMs: 1000, MaxSubscriptions: 16,
			Rate:          presence.Rate{Records: 1e6, Burst: 1e6, Bytes: 1e9},
			HandshakeRate: presence.Rate{Records: 10, Burst: 100, Bytes: 1},
		},
	}
}

// guestTopics are those on which guests hear guests.
func guestTopics(t testing.TB, pattern string) []wire.Pattern {
	t.Helper()
	p, err := wire.ParsePattern(pattern)
	if err != nil {
		t.Fatal(err)
	}
	return []wire.Pattern{p}
}

// running is a broker that listens on loopback.
type running struct {
	*Broker
	t    testing.TB
	addr string
}

func start(t testing.TB, o Options) *running {
	t.Helper()
	b, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.Serve(ln)
	r := &running{b, t, ln.Addr().String()}
	t.Cleanup(func() { _ = b.Close() }) // a test that closes it itself checks the error
	return r
}

// configure changes the settings.
func (r *running) configure(s Settings) {
	r.t.Helper()
	if _, err := r.Configure(s); err != nil {
		r.t.Fatal(err)
	}
}

// guest is a client that speaks the wire and nothing else.
type guest struct {
	t    testing.TB
	conn net.Conn
	r    *bufio.Reader
}

func dial(t testing.TB, addr string) *guest {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	g := &guest{t, conn, bufio.NewReader(conn)}
	g.wait()
	if got := g.line(); got != wire.Greeting {
		t.Fatalf("greeted with %q", got)
	}
	return g
}

// connect is dial with a granted session.
func connect(t testing.TB, addr, vm string) *guest {
	t.Helper()
	g := dial(t, addr)
	g.say("hello vm:%s capabilities=bus-v1\n", vm)
	if got := g.line(); !strings.HasPrefix(got, "ok session=sess-") {
		t.Fatalf("%s was answered %q", vm, got)
	}
	return g
}

func (g *guest) say(format string, args ...any) {
	g.t.Helper()
	g.wait()
	if _, err := fmt.Fprintf(g.conn, format, args...); err != nil {
		g.t.Fatal(err)
	}
}

// wait bounds the next wait, and not all of them: a long test may take longer.
func (g *guest) wait() {
	g.t.Helper()
	if err := g.conn.SetDeadline(time.Now().Add(hang)); err != nil {
		g.t.Fatal(err)
	}
}

func (g *guest) line() string {
	g.t.Helper()
	s, err := g.r.ReadString('\n')
	if err != nil {
		return fmt.Sprintf("%s(%v)", s, err)
	}
	return strings.TrimSuffix(s, "\n")
}

// send sends frames in one write.
func (g *guest) send(frames ...string) {
	g.t.Helper()
	var b []byte
	for _, f := range frames {
		b = wire.AppendFrame(b, []byte(f))
	}
	g.wait()
	if _, err := g.conn.Write(b); err != nil {
		g.t.Fatal(err)
	}
}

// next gives the next frame, or the error in parentheses.
func (g *guest) next() string {
	g.t.Helper()
	err := g.conn.SetDeadline(time.Now().Add(hang)) // of each wait: a long test may take longer
	var f []byte
	if err == nil {
		f, err = wire.ReadFrame(g.r, nil)
	}
	if err != nil {
		return fmt.Sprintf("(%v)", err)
	}
	return string(f)
}

// expect fails unless the next frames have these members.
func (g *guest) expect(want ...string) {
	g.t.Helper()
	for _, w := range want {
		got := g.next()
		if !has(got, w) {
			g.t.Fatalf("got %s\nwant %s", got, w)
		}
	}
}

// has tells whether the object got has every member of the object want.
func has(got, want string) bool {
	var g, w map[string]json.RawMessage
	if json.Unmarshal([]byte(got), &g) != nil || json.Unmarshal([]byte(want), &w) != nil {
		return false
	}
	for k, v := range w {
		if string(g[k]) != string(v) {
			return false
		}
	}
	return true
}

// eventually waits until ok gives true.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(hang); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}
