package guest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/logging"
	"github.com/castrabus/castra/internal/token"
	"github.com/castrabus/castra/internal/wire"
)

const (
	// clientBuffer is how much a client may leave unread before it is disconnected
	// for it, in bytes.
	clientBuffer = 256 << 10
	// maxOwed is how many of a client's lines may be unanswered; of more, none is
	// read.
	maxOwed = 1024
)

// client is one program connected to the local socket. One goroutine reads its
// lines, one writes its answers and what it is subscribed to.
type client struct {
	agent *Agent
	conn  *net.UnixConn

	// wake has room for one: it tells the writer to look.
	wake chan struct{}
	// owed has a token for each answer that is not written yet, maxOwed at most:
	// the reader waits for room.
	owed chan struct{}

	breached bool // of the reader, and of run once that has ended

	mu      sync.Mutex
	answers []*answer // not yet in out; in the order of the lines; at most maxOwed
	out     []byte    // to be written
	held    int       // bytes of deliveries in answers
	marks   []mark    // what of out is to be acknowledged to the host
	subs    map[string]*clientSub
	closed  bool // no delivery is added any more
}

// answer is what a line is answered with.
type answer struct {
	ack     wire.Ack
	by      time.Time // when to say that it is queued, if nothing is known by then; zero: of a publish the outbox says it
	line    []byte    // nil: not known yet
	after   []byte    // deliveries on what is subscribed to with it: they come behind
	marks   []mark
	flushed bool // it went to out
	unasked bool // no line is answered with it, and it has no token
}

// mark says that a delivery stands in what is to be written.
type mark struct {
	sub *subscription
	seq uint64
}

func newClient(a *Agent, conn *net.UnixConn) *client {
	return &client{
		agent: a, conn: conn,
		wake: make(chan struct{}, 1), owed: make(chan struct{}, maxOwed),
		subs: make(map[string]*clientSub),
	}
}

// run serves the client until it leaves, breaks the protocol or ctx is done.
func (c *client) run(ctx context.Context) {
	reading, cancel := context.WithCancel(ctx)
	defer cancel()
	var ended sync.Once // the deadline must not strike behind the reader's end
	stopReading := context.AfterFunc(reading, func() {
		ended.Do(func() { _ = c.conn.SetReadDeadline(time.Unix(1, 0)) })
	})
	defer stopReading()
	shutdown := context.AfterFunc(ctx, c.shut)
	defer shutdown()
	var writer sync.WaitGroup
	writer.Go(func() {
		c.write(reading)
		cancel() // a client that cannot be written to need not be read
	})
	c.read(reading)
	ended.Do(func() {})
	if ctx.Err() == nil {
		// It still gets its answers, for as long as it takes to know them.
		_ = c.conn.SetWriteDeadline(time.Now().Add(ackPatience + farewell))
	}
	if ctx.Err() != nil { // perhaps in between, and that deadline stood already
		_ = c.conn.SetWriteDeadline(time.Now().Add(farewell))
	}
	cancel()
	c.unsubscribeAll()
	writer.Wait()
	if c.breached {
		// What is left unread here would make the kernel reset the connection, and
		// perhaps the client not see why it ends.
		if c.conn.CloseWrite() == nil && c.conn.SetReadDeadline(time.Now().Add(farewell)) == nil {
			_, _ = io.CopyN(io.Discard, c.conn, clientBuffer)
		}
	}
	_ = c.conn.Close()
}

// read takes in lines until there are no more.
func (c *client) read(ctx context.Context) {
	lines := bufio.NewScanner(c.conn)
	// Room for the longest line, its end, and one byte more: only then does the
	// scanner tell it from one that is too long.
	lines.Buffer(make([]byte, 0, 4096), wire.MaxFrame+2)
	var dec wire.Decoder
	var m wire.Message
	for lines.Scan() {
		select {
		case c.owed <- struct{}{}:
		case <-ctx.Done():
			return
		}
		if err := dec.Decode(lines.Bytes(), &m); err != nil {
			c.breach(err.Error())
			return
		}
		c.take(&m)
	}
	if errors.Is(lines.Err(), bufio.ErrTooLong) {
		select {
		case c.owed <- struct{}{}:
			c.breach(fmt.Sprintf("a line of more than %d bytes", wire.MaxFrame))
		case <-ctx.Done():
		}
	}
}

// breach ends the connection for what the client sent, once the lines before it are
// answered. The line's token is taken.
func (c *client) breach(reason string) {
	c.breached = true
	c.mu.Lock()
	c.closed = true
	c.answers = append(c.answers, &answer{line: appendError(nil, codeProtocol, reason)})
	c.mu.Unlock()
	c.nudge()
}

// take deals with one line. Its token is taken.
func (c *client) take(m *wire.Message) {
	if m.Type == wire.TypeAck {
		<-c.owed // an ack is not answered
		c.acknowledge(m)
		return
	}
	a := &answer{ack: wire.Ack{
		Kind: m.AckKind(), Topic: bytes.Clone(m.Topic), ID: bytes.Clone(m.ID), Subscription: []byte(subscriptionOf(m)),
	}}
	if m.Type == wire.TypePublish && m.Topic == nil {
		a.ack.Topic = []byte(defaultTopic)
	}
	if m.Type != wire.TypePublish {
		a.by = time.Now().Add(ackPatience)
	}
	c.mu.Lock()
	c.answers = append(c.answers, a)
	c.mu.Unlock()
	var err error
	switch {
	case m.Bad != "":
		err = bus.Errorf(bus.CodeBadFrame, "%s", m.Bad)
	case m.Type == wire.TypePublish:
		err = c.publish(a, m)
	case m.Type == wire.TypeSubscribe:
		err = c.subscribe(a, m)
	case m.Type == wire.TypeUnsubscribe:
		if err = c.unsubscribe(m); err == nil {
			c.settle(a, result{})
		}
	case m.Type == wire.TypeHeartbeat:
		c.settle(a, result{})
	default:
		err = bus.Errorf(bus.CodeUnsupportedType, "no frame of type %q is known here", wire.Clip(m.TypeName))
	}
	if err != nil {
		c.settle(a, result{err: refusalOf(err)})
	}
}

func (c *client) publish(a *answer, m *wire.Message) error {
	if m.TooLarge {
		return bus.Errorf(bus.CodeTooLarge, "a payload takes at most %d bytes without white space", wire.MaxPayload)
	}
	if m.Topic != nil && len(m.Topic) == 0 || m.Reply != nil && len(m.Reply) == 0 {
		return bus.Errorf(bus.CodeBadTopic, "a topic has at least one byte")
	}
	req := bus.PublishRequest{Topic: string(m.Topic), ID: string(m.ID), Reply: string(m.Reply), Payload: bytes.Clone(m.Payload)}
	return c.agent.publish(req, func(r result) { c.settle(a, r) })
}

// settle completes an answer, once: what comes later is too late.
func (c *client) settle(a *answer, r result) {
	c.mu.Lock()
	c.complete(a, r)
	c.mu.Unlock()
	c.nudge()
}

// complete is settle with the lock held.
func (c *client) complete(a *answer, r result) {
	if a.line != nil {
		return
	}
	if r.err != nil {
		a.ack.Code, a.ack.Reason = string(r.err.Code), r.err.Reason
		a.ack.RetryAfterMS = r.err.RetryAfter.Milliseconds()
	}
	if r.queued {
		a.ack.Queued, a.ack.NotDurable = true, a.ack.Kind == "publish" && !r.durable
	}
	a.ack.Seq = r.seq
	a.line = append(wire.AppendAck(nil, &a.ack), '\n')
}

// nudge makes the writer look. It does not wait.
func (c *client) nudge() { token.Leave(c.wake) }

// write writes what there is to write. It returns once ctx is done and nothing is
// owed any more, or when the client does not read.
func (c *client) write(ctx context.Context) {
	late := time.NewTimer(0)
	defer late.Stop()
	done := ctx.Done()
	var spare []byte
	for {
		c.mu.Lock()
		n, next := c.collect()
		var out []byte
		var marks []mark
		if len(c.out) > 0 {
			out, marks = c.out, c.marks
			c.out, c.marks, spare = spare[:0], nil, nil
		}
		// A client that ended its side still gets its answers.
		finished := (done == nil || c.closed) && len(c.answers) == 0
		c.mu.Unlock()
		for range n {
			<-c.owed
		}
		if len(out) > 0 {
			if _, err := c.conn.Write(out); err != nil {
				return
			}
			for _, m := range marks {
				c.agent.subs.processed(m.sub, m.seq)
			}
			if spare = out; cap(spare) > clientBuffer/4 {
				spare = nil
			}
			continue
		}
		if finished {
			return
		}
		if next.IsZero() {
			late.Stop()
		} else {
			late.Reset(time.Until(next))
		}
		select {
		case <-c.wake:
		case <-late.C:
		case <-done:
			done = nil
		}
	}
}

// collect moves what is known, in order, to what is to be written. It gives how many
// answers those were, and when the next is to be given though nothing is known. Call
// with the lock held.
func (c *client) collect() (n int, next time.Time) {
	taken := 0
	for _, a := range c.answers {
		if a.line == nil && !a.by.IsZero() && time.Until(a.by) <= 0 {
			c.complete(a, result{queued: true})
		}
		if a.line == nil {
			next = a.by
			break
		}
		if len(c.out) >= clientBuffer {
			break // the client reads no answers, so its lines can wait
		}
		c.out = append(append(c.out, a.line...), a.after...)
		c.held -= len(a.after)
		for _, m := range a.marks {
			c.mark(m)
		}
		a.after, a.marks, a.flushed = nil, nil, true
		taken++
		if !a.unasked {
			n++
		}
	}
	c.answers = c.answers[taken:]
	return n, next
}

// overrun ends the connection of a client that does not read what it is subscribed
// to. Behind what it was sent it finds why, if it reads that at last.
func (c *client) overrun(topic string) {
	c.mu.Lock()
	c.closed, c.answers, c.held = true, nil, 0
	c.out = appendError(c.out, codeSlowConsumer, fmt.Sprintf("%d bytes were left unread; connect again and subscribe from where you were", clientBuffer))
	c.mu.Unlock()
	_ = c.conn.SetWriteDeadline(time.Now().Add(farewell)) // ends a write under way too
	c.nudge()
	logging.ClientTooSlow.On(c.agent.opts.Log).WithFields(logrus.Fields{"topic": topic, "bytes": clientBuffer}).Warn("a client of the local socket does not read what it subscribed to; disconnecting it")
}

// shut ends the connection because the daemon ends: what is not answered by now is
// answered so.
func (c *client) shut() {
	c.mu.Lock()
	c.closed = true
	for _, a := range c.answers {
		c.complete(a, result{err: errStopping})
	}
	c.mu.Unlock()
	_ = c.conn.SetWriteDeadline(time.Now().Add(farewell))
	c.nudge()
}

// subscriptionOf is the name of the subscription that a line is about, empty if it is
// about none.
func subscriptionOf(m *wire.Message) string {
	switch {
	case m.Type == wire.TypeSubscribe && m.Sub != nil:
		return string(m.Sub)
	case m.Type == wire.TypeUnsubscribe && m.Subscription != nil:
		return string(m.Subscription)
	case m.Type == wire.TypeSubscribe, m.Type == wire.TypeUnsubscribe:
		return string(m.Topic)
	default:
		return ""
	}
}
