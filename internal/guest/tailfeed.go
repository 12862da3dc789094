package guest

import (
	"fmt"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/token"
	"github.com/castrabus/castra/internal/wire"
)

// lost notes that there is no session.
func (t *tail) lost() {
	var err *bus.Error
	if !t.req.Follow {
		link := t.agent.uplink.snapshot()
		err = link.notConnected(t.agent.id.name)
	}
	t.mu.Lock()
	t.behind = true
	clear(t.ready)
	if t.err == nil {
		t.err = err
	}
	t.mu.Unlock()
	t.nudge()
}

// fail ends the tail.
func (t *tail) fail(err *bus.Error) {
	t.mu.Lock()
	if t.err == nil {
		t.err = err
	}
	t.mu.Unlock()
	t.nudge()
}

func (t *tail) nudge() { token.Leave(t.wake) }

// feedSink is the sink of a tail's feed.
type feedSink struct {
	*tail
	i int
}

func (s feedSink) begun(*subscription) {
	s.mu.Lock()
	s.ready[s.i] = true
	s.mu.Unlock()
	s.nudge()
}

func (s feedSink) suspended(*subscription) { s.lost() }

func (s feedSink) refused(_ *subscription, err *bus.Error) { s.fail(err) }

func (s feedSink) deliver(_ *subscription, m *wire.Message) bool {
	topic := string(m.Topic)
	shown := s.selects(m, topic) && s.merge.owner(s.i, topic)
	it := item{seq: m.Seq, at: time.Now()}
	if shown {
		it.line, it.over = appendTailRecord(nil, m), s.beyond(m.Time)
	}
	return s.push(it, shown)
}

func (s feedSink) gap(_ *subscription, from, to uint64) bool {
	return s.push(item{seq: from, to: to, at: time.Now(), line: appendTailGap(nil, from, to)}, true)
}

// push hands an item to the tail; one that is not shown still says how far the feed
// has come.
func (s feedSink) push(it item, shown bool) (taken bool) {
	s.mu.Lock()
	f := s.merge.feeds[s.i]
	if shown {
		taken = f.push(it)
		s.behind = s.behind || !taken
	} else {
		taken = true
		f.bring(it.seq)
	}
	s.mu.Unlock()
	s.nudge()
	return taken
}

// selects says whether the record is of the VM that was asked for.
func (t *tail) selects(m *wire.Message, topic string) bool {
	if t.req.VM == "" || string(m.VM) == t.req.VM {
		return true
	}
	owner, owned := wire.TopicVM(topic)
	return owned && owner == t.req.VM
}

// beyond says whether a record's time lies behind the end that was asked for.
func (t *tail) beyond(when []byte) bool {
	if t.req.Until.IsZero() {
		return false
	}
	at, err := time.Parse(time.RFC3339, string(when))
	return err == nil && at.After(t.req.Until)
}

// appendTailRecord appends a record as a tail shows it.
func appendTailRecord(dst []byte, m *wire.Message) []byte {
	dst = fmt.Appendf(dst, `{"seq":%d,"time":`, m.Seq)
	dst = wire.AppendString(dst, m.Time)
	dst = append(dst, `,"vm":`...)
	dst = wire.AppendString(dst, m.VM)
	dst = append(dst, `,"topic":`...)
	dst = wire.AppendString(dst, m.Topic)
	return appendRest(dst, m)
}

func appendTailGap(dst []byte, from, to uint64) []byte {
	return fmt.Appendf(dst, `{"type":"gap","from":%d,"to":%d}`+"\n", from, to)
}
