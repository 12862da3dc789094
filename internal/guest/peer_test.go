package guest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/wire"
)

// hang bounds every wait of these tests on a real clock; none should come near it.
const hang = 30 * time.Second

// network connects an agent with scripted hosts over pipes, so that a whole session
// can run on a test's own clock.
type network struct {
	dials chan net.Conn // unbuffered: a host's end for each attempt that is accepted

	mu  sync.Mutex
	err error // of attempts while it is not nil
}

func newNetwork() *network { return &network{dials: make(chan net.Conn)} }

func (n *network) refuse(err error) {
	n.mu.Lock()
	n.err = err
	n.mu.Unlock()
}

func (n *network) dial(ctx context.Context, _ string) (net.Conn, error) {
	n.mu.Lock()
	err := n.err
	n.mu.Unlock()
	if err != nil {
		return nil, err
	}
	ours, theirs := net.Pipe()
	select {
	case n.dials <- theirs:
		return ours, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// evenly is a pacer without chance in it.
type evenly struct {
	pause  time.Duration
	resets int
}

func (p *evenly) Next() time.Duration { return p.pause }
func (p *evenly) Reset()              { p.resets++ }

// peer is the host's end of a session.
type peer struct {
	t    testing.TB
	conn net.Conn
	r    *bufio.Reader
	dec  wire.Decoder
	buf  []byte
}

// accept takes the next attempt and grants it a session.
func (n *network) accept(t testing.TB) *peer {
	t.Helper()
	p := n.greet(t)
	p.write("ok session=sess-1\n")
	return p
}

// greet takes the next attempt up to its hello.
func (n *network) greet(t testing.TB) *peer {
	t.Helper()
	conn := <-n.dials
	p := &peer{t: t, conn: conn, r: bufio.NewReader(conn)}
	p.write(wire.Greeting + "\n")
	if line, err := p.r.ReadString('\n'); err != nil || !strings.HasPrefix(line, "hello vm:web1 ") {
		t.Fatalf("hello is %q, %v", line, err)
	}
	return p
}

func (p *peer) write(s string) {
	p.t.Helper()
	if _, err := io.WriteString(p.conn, s); err != nil {
		p.t.Fatal(err)
	}
}

// send writes JSON objects as frames.
func (p *peer) send(frames ...string) {
	p.t.Helper()
	for _, f := range frames {
		p.write(string(wire.AppendFrame(nil, []byte(f))))
	}
}

// next reads a frame and gives its bytes.
func (p *peer) next() string {
	p.t.Helper()
	frame, err := wire.ReadFrame(p.r, p.buf)
	if err != nil {
		p.t.Fatal(err)
	}
	p.buf = frame
	return string(frame)
}

// want reads a frame and compares it.
func (p *peer) want(frame string) {
	p.t.Helper()
	if got := p.next(); got != frame {
		p.t.Fatalf("got frame %s\nwant %s", got, frame)
	}
}

// wantID reads a publish, gives its id, and acknowledges it unless seq is 0.
func (p *peer) wantPublish(payload string, seq uint64) (id string) {
	p.t.Helper()
	var m wire.Message
	if err := p.dec.Decode([]byte(p.next()), &m); err != nil || m.Type != wire.TypePublish || string(m.Payload) != payload {
		p.t.Fatalf("got a %s of %s (%v), want a publish of %s", m.TypeName, m.Payload, err, payload)
	}
	id = string(m.ID)
	if seq > 0 {
		p.ack(id, seq)
	}
	return id
}

// ackAll acknowledges the next n publishes, numbered from 1. Any goroutine may call it.
func (p *peer) ackAll(n int) error {
	var m wire.Message
	for i := range n {
		frame, err := wire.ReadFrame(p.r, nil)
		if err == nil {
			err = p.dec.Decode(frame, &m)
		}
		if err == nil {
			_, err = p.conn.Write(wire.AppendAckFrame(nil, &wire.Ack{Kind: "publish", ID: m.ID, Seq: uint64(i + 1)}))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (p *peer) ack(id string, seq uint64) {
	p.t.Helper()
	p.send(fmt.Sprintf(`{"type":"ack","ack":"publish","status":"ok","topic":"t","id":%q,"seq":%d}`, id, seq))
}

// logs collects what an agent logs.
type logs struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (l *logs) count(part string) int { return strings.Count(l.String(), part) }

func (l *logs) entry() *logrus.Entry {
	log := logrus.New()
	log.SetOutput(l)
	log.SetLevel(logrus.DebugLevel)
	log.SetFormatter(&logrus.TextFormatter{DisableColors: true, DisableTimestamp: true})
	return logrus.NewEntry(log)
}

// fixture is an agent that runs against a network of scripted hosts.
type fixture struct {
	*Agent
	net  *network
	pace *evenly
	logs *logs
	stop func() // ends the agent and waits
}

func runAgent(t testing.TB, change func(*Options)) *fixture {
	t.Helper()
	f := &fixture{net: newNetwork(), pace: &evenly{pause: time.Second}, logs: &logs{}}
	opts := Options{Name: "web1", Address: "host:7070", Version: "test", SpoolSize: 1 << 20, Log: f.logs.entry()}
	if change != nil {
		change(&opts)
	}
	if opts.Socket != "" {
		f.pace.pause = 20 * time.Millisecond // sockets are on the real clock
	}
	a, err := newAgent(opts, f.pace, f.net.dial)
	if err != nil {
		t.Fatal(err)
	}
	f.Agent = a
	f.start(t)
	return f
}

func (f *fixture) start(t testing.TB) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.Run(ctx)
	}()
	f.stop = sync.OnceFunc(func() {
		cancel()
		<-done
	})
	t.Cleanup(f.stop)
}

var errRefusedConnection = errors.New("connection refused")
