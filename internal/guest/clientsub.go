package guest

import (
	"fmt"
	"strconv"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

// clientSub is what a client of the local socket is subscribed to, under the name
// that it chose.
type clientSub struct {
	client *client
	name   string
	answer *answer // to the line that subscribed
	sub    *subscription
	last   uint64 // the newest record given to the client; guarded by its lock
}

// subscribe makes a subscription, in place of the one of that name if there is one.
func (c *client) subscribe(a *answer, m *wire.Message) error {
	name, own := subscriptionOf(m), c.agent.own(string(m.Topic))
	if err := c.agent.checkPattern(own); err != nil {
		return err
	}
	s := &clientSub{client: c, name: name, answer: a}
	s.sub = &subscription{topic: own, from: fromJSON(m), cursor: string(m.Cursor), sink: s}
	c.mu.Lock()
	old := c.subs[name]
	c.subs[name] = s
	c.mu.Unlock()
	if old != nil {
		c.end(old)
	}
	live, err := c.agent.subs.add(s.sub)
	if err != nil {
		c.forget(s)
		return err
	}
	if !live {
		s.suspended(s.sub)
	}
	return nil
}

// unsubscribe ends a subscription. That there is none is no error: what was asked
// for is so.
func (c *client) unsubscribe(m *wire.Message) error {
	name := subscriptionOf(m)
	if name == "" {
		return bus.Errorf(bus.CodeBadFrame, "an unsubscribe names a subscription or a topic")
	}
	c.mu.Lock()
	s := c.subs[name]
	c.mu.Unlock()
	if s != nil {
		c.forget(s)
		c.end(s)
	}
	return nil
}

// end gives a subscription up. Where it was still to be answered it was made, as far
// as the client can tell.
func (c *client) end(s *clientSub) {
	c.agent.subs.remove(s.sub)
	c.settle(s.answer, result{})
}

func (c *client) unsubscribeAll() {
	c.mu.Lock()
	subs := c.subs
	c.subs = nil
	c.mu.Unlock()
	for _, s := range subs {
		c.end(s) // or the connection would stay for as long as an answer may take
	}
}

func (c *client) forget(s *clientSub) {
	c.mu.Lock()
	if c.subs[s.name] == s {
		delete(c.subs, s.name)
	}
	c.mu.Unlock()
}

// acknowledge takes the client's word that it has processed what it was given. Only
// for a subscription with a cursor does it matter: the others are acknowledged as
// they are written.
func (c *client) acknowledge(m *wire.Message) {
	c.mu.Lock()
	s := c.subs[string(m.Subscription)]
	ok := s != nil && string(m.Ack) == "publish" && m.HasSeq && m.Seq <= s.last
	c.mu.Unlock()
	if ok {
		c.agent.subs.processed(s.sub, m.Seq)
	}
}

// mark notes that a delivery is in out. Call with the lock held.
func (c *client) mark(m mark) {
	for i := range c.marks {
		if c.marks[i].sub == m.sub {
			c.marks[i].seq = m.seq
			return
		}
	}
	c.marks = append(c.marks, m)
}

func (s *clientSub) begun(*subscription) { s.client.settle(s.answer, result{}) }

func (s *clientSub) suspended(*subscription) { s.client.settle(s.answer, result{queued: true}) }

// refused tells the client, who may have been told before that it is subscribed.
func (s *clientSub) refused(_ *subscription, err *bus.Error) {
	c := s.client
	c.forget(s)
	c.agent.subs.remove(s.sub)
	c.mu.Lock()
	promised := s.answer.line != nil
	if promised && !c.closed {
		c.closed = true
		c.answers = append(c.answers, &answer{unasked: true, line: appendError(nil, string(err.Code), fmt.Sprintf("the host refuses the subscription %.64q, which was to be made when it is there: %s", s.name, err.Reason))})
	}
	c.complete(s.answer, result{err: err})
	c.mu.Unlock()
	c.nudge()
}

func (s *clientSub) deliver(_ *subscription, m *wire.Message) bool {
	return s.add(m.Seq, func(dst []byte) []byte { return appendDelivery(dst, s.name, m) })
}

func (s *clientSub) gap(_ *subscription, from, to uint64) bool {
	return s.add(to, func(dst []byte) []byte { return appendGap(dst, s.name, from, to) })
}

// add puts a line behind the answer to the subscribe. It always takes it: a client
// without room for it is disconnected.
func (s *clientSub) add(seq uint64, line func(dst []byte) []byte) bool {
	c := s.client
	c.mu.Lock()
	if c.closed || c.subs[s.name] != s {
		c.mu.Unlock()
		return true
	}
	if len(c.out)+c.held >= clientBuffer {
		c.mu.Unlock()
		c.overrun(s.sub.topic)
		return true
	}
	s.last = seq
	m := mark{sub: s.sub, seq: seq}
	if a := s.answer; a.flushed {
		c.out = line(c.out)
		if s.sub.cursor == "" {
			c.mark(m)
		}
	} else {
		before := len(a.after)
		a.after = line(a.after)
		c.held += len(a.after) - before
		if s.sub.cursor == "" {
			a.marks = append(a.marks, m)
		}
	}
	c.mu.Unlock()
	c.nudge()
	return true
}

// fromJSON writes down where a subscription is to begin as the frame said it.
func fromJSON(m *wire.Message) string {
	if !m.HasFrom {
		return ""
	}
	switch m.From.Kind {
	case wire.FromStart:
		return `"start"`
	case wire.FromSeq:
		return strconv.FormatUint(m.From.N, 10)
	case wire.FromLast:
		return "-" + strconv.FormatUint(m.From.N, 10)
	case wire.FromTime:
		return `"` + m.From.Time.Format(time.RFC3339Nano) + `"`
	default:
		return `"now"`
	}
}
