package guest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/wire"
)

// program is a client of the local socket.
type program struct {
	t    testing.TB
	conn *net.UnixConn
	r    *bufio.Reader
}

func connect(t testing.TB, path string) *program {
	t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return &program{t: t, conn: conn, r: bufio.NewReader(conn)}
}

func (p *program) say(lines ...string) {
	p.t.Helper()
	_ = p.conn.SetWriteDeadline(time.Now().Add(hang))
	for _, line := range lines {
		if _, err := io.WriteString(p.conn, line+"\n"); err != nil {
			p.t.Fatal(err)
		}
	}
}

func (p *program) hear() string {
	p.t.Helper()
	_ = p.conn.SetReadDeadline(time.Now().Add(hang))
	line, err := p.r.ReadString('\n')
	if err != nil {
		p.t.Fatalf("heard %q: %v", line, err)
	}
	return strings.TrimSuffix(line, "\n")
}

func (p *program) want(lines ...string) {
	p.t.Helper()
	for _, line := range lines {
		if got := p.hear(); got != line {
			p.t.Fatalf("heard %s\nwant  %s", got, line)
		}
	}
}

// wantPart reads a line and wants it to hold part.
func (p *program) wantPart(part string) string {
	p.t.Helper()
	got := p.hear()
	if !strings.Contains(got, part) {
		p.t.Fatalf("heard %s, which lacks %s", got, part)
	}
	return got
}

func (p *program) wantEnd() {
	p.t.Helper()
	if rest, err := io.ReadAll(p.r); err != nil || len(rest) > 0 {
		p.t.Fatalf("behind the end came %.200q, %v", rest, err)
	}
}

// withSocket runs an agent that serves a socket, on the real clock.
func withSocket(t testing.TB) (f *fixture, path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "run", "bus.sock")
	f = runAgent(t, func(o *Options) { o.Socket = path })
	return f, path
}

// withHost is withSocket with a session that everything counts on.
func withHost(t testing.TB) (f *fixture, path string, host *peer) {
	t.Helper()
	f, path = withSocket(t)
	host = f.net.accept(t)
	if err := host.conn.SetDeadline(time.Now().Add(hang)); err != nil {
		t.Fatal(err)
	}
	f.until(t, f.connected)
	return f, path, host
}

// until waits for something that happens by itself.
func (f *fixture) until(t testing.TB, done func() bool) {
	t.Helper()
	for end := time.Now().Add(hang); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it did not come to that; %s", f.Summary())
		}
	}
}

const okSubscribe = `{"type":"ack","ack":"subscribe","status":"ok"}`

func TestSocketAnswersInOrder(t *testing.T) {
	_, path, host := withHost(t)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != socketMode {
		t.Errorf("socket is %v, %v", info.Mode(), err)
	}
	p := connect(t, path)
	p.say(`{"type":"publish","topic":"a","id":"1","payload":{"x": 1.50}}`, `{"type":"heartbeat"}`, `{"type":"publish","topic":5}`,
		`{"type":"publish","payload":2}`, `{"type":"publish","topic":"vm:other","id":"3"}`, `{"type":"dance"}`, `{"type":"unsubscribe","topic":"x"}`,
		`{"type":"unsubscribe"}`, `{"type":"subscribe","topic":"castra.presence"}`, `{"type":"subscribe","topic":"a*","sub":"s"}`, `{"type":"publish","topic":""}`,
		`{"type":"publish","payload":"`+strings.Repeat("x", wire.MaxPayload)+`"}`)
	host.want(`{"type":"publish","topic":"a","id":"1","payload":{"x":1.50}}`)
	id := host.wantPublish("2", 0)
	host.ack("1", 5)
	host.ack(id, 6)
	p.want(
		`{"type":"ack","ack":"publish","status":"ok","topic":"a","id":"1","seq":5}`,
		`{"type":"ack","ack":"heartbeat","status":"ok"}`,
		`{"type":"ack","ack":"publish","status":"error","code":"bad-frame","reason":"topic must be a string","topic":"broadcast"}`,
		`{"type":"ack","ack":"publish","status":"ok","topic":"broadcast","seq":6}`)
	p.wantPart(`"status":"error","code":"forbidden"`)
	p.wantPart(`"ack":"dance","status":"error","code":"unsupported-type"`)
	p.want(`{"type":"ack","ack":"unsubscribe","status":"ok","topic":"x","subscription":"x"}`)
	p.wantPart(`"ack":"unsubscribe","status":"error","code":"bad-frame"`)
	p.wantPart(`"ack":"subscribe","status":"error","code":"forbidden"`)
	p.wantPart(`"ack":"subscribe","status":"error","code":"bad-topic"`)
	p.wantPart(`"ack":"publish","status":"error","code":"bad-topic"`)
	p.wantPart(`"code":"too-large"`)
}

func TestSocketWithoutAHost(t *testing.T) {
	f, path := withSocket(t)
	f.net.refuse(errRefusedConnection)
	p := connect(t, path)
	p.say(`{"type":"publish","topic":"a","id":"1"}`, `{"type":"subscribe","topic":"vm:self","sub":"mine"}`)
	p.want(
		`{"type":"ack","ack":"publish","status":"ok","topic":"a","id":"1","durable":false,"queued":true}`,
		`{"type":"ack","ack":"subscribe","status":"ok","topic":"vm:self","subscription":"mine","queued":true}`)
	f.net.refuse(nil)
	host := f.net.accept(t)
	host.want(`{"type":"subscribe","topic":"vm:web1","sub":"s1"}`)
	host.wantPublish("null", 1)
	host.send(okSubscribe, `{"type":"publish","subscription":"s1","topic":"vm:web1","vm":"host","seq":2,"time":"T","payload":1}`)
	p.want(`{"type":"publish","topic":"vm:web1","subscription":"mine","vm":"host","seq":2,"time":"T","payload":1}`)
	// What the host refuses later ends the connection: the client was told another thing.
	host.want(`{"type":"ack","ack":"publish","subscription":"s1","seq":2}`)
	p.say(`{"type":"subscribe","topic":"b","from":"start"}`)
	host.want(`{"type":"subscribe","topic":"b","sub":"s2","from":"start"}`)
	_ = host.conn.Close()
	p.want(`{"type":"ack","ack":"subscribe","status":"ok","topic":"b","subscription":"b","queued":true}`)
	host = f.net.accept(t)
	host.want(`{"type":"subscribe","topic":"vm:web1","sub":"s3","from":3}`)
	host.want(`{"type":"subscribe","topic":"b","sub":"s4","from":"start"}`)
	host.want(`{"type":"subscribe","topic":"vm:web1","sub":"s5"}`) // to see where the log ends
	host.send(okSubscribe, `{"type":"ack","ack":"subscribe","status":"error","code":"too-many-subscriptions","reason":"16"}`)
	p.wantPart(`{"type":"error","code":"too-many-subscriptions"`)
	p.wantEnd()
	host.want(`{"type":"unsubscribe","subscription":"s3"}`)
}

// Deliveries come behind the answer to the subscribe, under the client's own name,
// and the host hears that they were written.
func TestSocketDelivers(t *testing.T) {
	_, path, host := withHost(t)
	p, other := connect(t, path), connect(t, path)
	// The publish holds the answers up: the host acknowledges the subscribe first.
	p.say(`{"type":"publish","id":"p"}`)
	id := host.wantPublish("null", 0)
	p.say(`{"type":"subscribe","topic":"a.>","sub":"mine","from":-5}`)
	host.want(`{"type":"subscribe","topic":"a.>","sub":"s1","from":-5}`)
	host.send(okSubscribe, `{"type":"publish","subscription":"s1","topic":"a.b","vm":"host","seq":7,"time":"2026-01-02T03:04:05.000006Z","id":"i\"d","reply":"r","payload":{"k":[1,2]}}`,
		`{"type":"gap","subscription":"s1","from":8,"to":9}`)
	host.ack(id, 10)
	p.want(
		`{"type":"ack","ack":"publish","status":"ok","topic":"broadcast","id":"p","seq":10}`,
		`{"type":"ack","ack":"subscribe","status":"ok","topic":"a.>","subscription":"mine"}`,
		`{"type":"publish","topic":"a.b","subscription":"mine","vm":"host","seq":7,"time":"2026-01-02T03:04:05.000006Z","id":"i\"d","reply":"r","payload":{"k":[1,2]}}`,
		`{"type":"gap","subscription":"mine","from":8,"to":9}`)
	host.want(`{"type":"ack","ack":"publish","subscription":"s1","seq":9}`)

	// The same name of another client is another subscription.
	other.say(`{"type":"subscribe","topic":"a.>","sub":"mine"}`)
	host.want(`{"type":"subscribe","topic":"a.>","sub":"s2"}`)
	host.send(okSubscribe, `{"type":"publish","subscription":"s2","topic":"a.c","vm":"web1","seq":11,"time":"T","payload":0}`)
	other.wantPart(`"subscription":"mine"`)
	other.wantPart(`"seq":11`)
	host.want(`{"type":"ack","ack":"publish","subscription":"s2","seq":11}`)

	// Subscribing again replaces; leaving unsubscribes.
	other.say(`{"type":"subscribe","topic":"b","sub":"mine"}`)
	host.want(`{"type":"unsubscribe","subscription":"s2"}`)
	host.want(`{"type":"subscribe","topic":"b","sub":"s3"}`)
	host.send(okSubscribe)
	other.wantPart(`"topic":"b"`)
	_ = other.conn.Close()
	host.want(`{"type":"unsubscribe","subscription":"s3"}`)
	p.say(`{"type":"unsubscribe","subscription":"mine"}`)
	host.want(`{"type":"unsubscribe","subscription":"s1"}`)
	host.send(`{"type":"publish","subscription":"s1","topic":"a.c","vm":"web1","seq":12,"payload":0}`)
	p.want(`{"type":"ack","ack":"unsubscribe","status":"ok","subscription":"mine"}`)
	p.say(`{"type":"heartbeat"}`)
	p.want(`{"type":"ack","ack":"heartbeat","status":"ok"}`)
}

// With a cursor it is the client's own ack that counts: what it was only given may be
// lost with it.
func TestSocketCursor(t *testing.T) {
	f, path, host := withHost(t)
	p := connect(t, path)
	p.say(`{"type":"subscribe","topic":"a","cursor":"c"}`)
	host.want(`{"type":"subscribe","topic":"a","sub":"s1","cursor":"c"}`)
	deliver := func(sub string, seq int) {
		host.send(fmt.Sprintf(`{"type":"publish","subscription":%q,"topic":"a","vm":"host","seq":%d,"time":"T","payload":0}`, sub, seq))
	}
	host.send(okSubscribe)
	deliver("s1", 5)
	deliver("s1", 6)
	p.wantPart(`"status":"ok"`)
	p.wantPart(`"seq":5`)
	p.wantPart(`"seq":6`)
	p.say(`{"type":"ack","ack":"publish","subscription":"a","seq":99}`) // not given yet
	p.say(`{"type":"ack","ack":"publish","subscription":"a","seq":5}`)
	host.want(`{"type":"ack","ack":"publish","subscription":"s1","seq":5}`)
	_ = host.conn.Close()
	host = f.net.accept(t)
	host.want(`{"type":"subscribe","topic":"a","sub":"s2","from":7,"cursor":"c"}`)
	host.send(okSubscribe)
	deliver("s2", 6) // the cursor wins: not acknowledged yet
	deliver("s2", 8)
	p.wantPart(`"seq":8`) // once to each client
}

func TestSocketFatal(t *testing.T) {
	_, path, host := withHost(t)
	for name, line := range map[string]string{
		"no JSON": `hello`, "empty line": ``, "duplicate key": `{"type":"heartbeat","type":"publish"}`,
		"not UTF-8": "{\"type\":\"\xff\"}", "two objects": `{"type":"heartbeat"}{"type":"heartbeat"}`,
		"too long":      `{"type":"publish","payload":"` + strings.Repeat("x", wire.MaxFrame) + `"}`,
		"just too long": `{"x":"` + strings.Repeat("x", wire.MaxFrame-7) + `"}`,
	} {
		t.Run(name, func(t *testing.T) {
			p := connect(t, path)
			p.say(`{"type":"publish","topic":"before"}`)
			go func() { _, _ = io.WriteString(p.conn, line+"\n") }() // the long one is not read to its end
			host.wantPublish("null", 3)
			p.wantPart(`"topic":"before","seq":3`) // lines before it are answered
			p.wantPart(`{"type":"error","code":"protocol-error","reason":`)
			p.wantEnd()
		})
	}
	p := connect(t, path)
	p.say(`{"x":"` + strings.Repeat("x", wire.MaxFrame-8) + `"}`) // the longest line
	p.wantPart("bad-frame")
}

// A client that has said all it wants still gets its answers.
func TestSocketHalfClose(t *testing.T) {
	_, path, host := withHost(t)
	p := connect(t, path)
	_, _ = io.WriteString(p.conn, `{"type":"publish","id":"a"}`) // without a line end
	if err := p.conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	host.wantPublish("null", 4)
	p.wantPart(`"id":"a","seq":4`)
	p.wantEnd()
}

// A client that leaves before the host has answered a subscribe does not stay for as
// long as an answer may take: programs that do so could use up all the places.
func TestSocketHalfCloseBehindSubscribe(t *testing.T) {
	_, path, _ := withHost(t) // which does not answer
	p := connect(t, path)
	p.say(`{"type":"subscribe","topic":"a"}`, `{"type":"heartbeat"}`)
	if err := p.conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	p.want(`{"type":"ack","ack":"subscribe","status":"ok","topic":"a","subscription":"a"}`) // and not that it is queued
	p.wantPart(`"ack":"heartbeat"`)
	p.wantEnd()
}

// A client that does not read is disconnected, and nobody waits for it meanwhile.
func TestSocketSlowReader(t *testing.T) {
	f, path, host := withHost(t)
	slow, quick := connect(t, path), connect(t, path)
	slow.say(`{"type":"subscribe","topic":"a"}`)
	host.want(`{"type":"subscribe","topic":"a","sub":"s1"}`)
	host.send(okSubscribe)
	slow.wantPart(`"status":"ok"`)
	payload := strings.Repeat("x", 60_000)
	for seq := 1; f.logs.count("does not read what it subscribed to") == 0; seq++ {
		if seq > 1000 {
			t.Fatal("60 MB were buffered for a client that does not read")
		}
		host.send(fmt.Sprintf(`{"type":"publish","subscription":"s1","topic":"a","vm":"host","seq":%d,"time":"T","payload":%q}`, seq, payload))
	}
	quick.say(`{"type":"publish","id":"q"}`)
	for got := ""; !strings.Contains(got, `"id":"q"`); {
		got = host.next() // acks of what was written to the slow one, and its unsubscribe
	}
	host.ack("q", 2000)
	quick.wantPart(`"seq":2000`)
	// What was written whole is followed by the reason, in order and without a hole.
	last := 0
	for {
		line := slow.hear()
		if strings.HasPrefix(line, `{"type":"error"`) {
			if !strings.Contains(line, codeSlowConsumer) {
				t.Error(line)
			}
			break
		}
		if !strings.Contains(line, fmt.Sprintf(`"seq":%d,`, last+1)) {
			t.Fatalf("behind record %d came %.100s", last, line)
		}
		last++
	}
	slow.wantEnd()
}

// A client that publishes without reading the answers is not disconnected: its lines
// wait.
func TestSocketAnswersUnread(t *testing.T) {
	_, path, host := withHost(t)
	p := connect(t, path)
	if err := host.conn.SetDeadline(time.Now().Add(4 * hang)); err != nil {
		t.Fatal(err)
	}
	const n = 10_000
	go func() {
		for i := range n {
			if _, err := fmt.Fprintf(p.conn, `{"type":"publish","topic":"t","id":"%d"}`+"\n", i); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	go func() {
		if err := host.ackAll(n); err != nil {
			t.Error(err)
		}
	}()
	for i := range n { // on a busy machine an ack may come too late for its number to be told
		p.wantPart(fmt.Sprintf(`"status":"ok","topic":"t","id":"%d",`, i))
	}
}

// What is not known after a while is answered as queued, and answers that nobody reads
// are not piled up.
func TestClientCollects(t *testing.T) {
	c := newClient(&Agent{outbox: newOutbox(1, nil)}, nil)
	known := func() *answer { return &answer{line: make([]byte, 1000)} }
	late := &answer{by: time.Now().Add(-1), ack: wire.Ack{Kind: "subscribe"}}
	waiting := &answer{by: time.Now().Add(hang), ack: wire.Ack{Kind: "subscribe"}}
	c.answers = []*answer{known(), late, waiting, known()}
	if n, next := c.collect(); n != 2 || !next.Equal(waiting.by) || len(c.answers) != 2 {
		t.Errorf("collected %d, left %d, next at %v", n, len(c.answers), next)
	}
	if want := `{"type":"ack","ack":"subscribe","status":"ok","queued":true}` + "\n"; !strings.HasSuffix(string(c.out), want) {
		t.Errorf("late answer is %q", c.out[1000:])
	}
	c.settle(late, result{seq: 1}) // too late
	// Of a publish only the outbox knows whether it is kept.
	if n, next := (&client{answers: []*answer{{ack: wire.Ack{Kind: "publish"}}}}).collect(); n != 0 || !next.IsZero() {
		t.Errorf("%d publishes are answered by the clock, or at %v", n, next)
	}
	c.settle(waiting, result{seq: 2})
	for range 1000 {
		c.answers = append(c.answers, known())
	}
	c.collect()
	if len(c.out) < clientBuffer || len(c.out) > clientBuffer+1000 || strings.Contains(string(c.out), `"seq":1}`) {
		t.Errorf("%d bytes wait to be read", len(c.out))
	}
}

func TestSocketTakesSoManyClients(t *testing.T) {
	f, path := withSocket(t)
	f.net.refuse(errRefusedConnection)
	first := connect(t, path)
	for range maxClients - 1 {
		connect(t, path).say(`{"type":"heartbeat"}`)
	}
	p := connect(t, path)
	p.wantPart(`"code":"too-many-clients"`)
	p.wantEnd()
	ctx, cancel := context.WithTimeout(t.Context(), hang)
	defer cancel()
	if err := f.Probe(ctx); err != nil {
		t.Errorf("to turn clients away is to be alive: %v", err)
	}
	_ = first.conn.Close()
	f.until(t, func() bool { return len(f.local.room) < maxClients })
	p = connect(t, path)
	p.say(`{"type":"heartbeat"}`)
	p.wantPart("heartbeat")
}

func TestSocketAtTheEnd(t *testing.T) {
	f, path, host := withHost(t)
	p := connect(t, path)
	p.say(`{"type":"publish","id":"a"}`, `{"type":"publish","id":"b"}`)
	host.wantPublish("null", 0)
	host.wantPublish("null", 0)
	f.stop()
	p.wantPart(`"code":"shutting-down"`)
	p.wantPart(`"code":"shutting-down"`)
	p.wantEnd()
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
}

func TestListenReplacesOnlyWhatIsStale(t *testing.T) {
	path := filepath.Join(t.TempDir(), "bus.sock")
	a := &Agent{}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := listen(path, a); err == nil || !strings.Contains(err.Error(), "served by another process") {
		t.Errorf("a socket in use: %v", err)
	}
	ln.SetUnlinkOnClose(false)
	_ = ln.Close()
	v, err := listen(path, a)
	if err != nil {
		t.Fatalf("a socket left behind: %v", err)
	}
	_ = v.ln.Close()
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listen(path, a); err == nil || !strings.Contains(err.Error(), "is no socket") {
		t.Errorf("a file: %v", err)
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "precious" {
		t.Errorf("the file is now %q, %v", got, err)
	}
}
