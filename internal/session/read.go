package session

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/wire"
)

// readSize holds the longest frame and its length.
const readSize = 4 + wire.MaxFrame

// workspace is what reading needs while there are bytes to read. It is lent to
// a session for one burst, so that an idle session holds none.
type workspace struct {
	buf   []byte
	ready func(fd uintptr) // reads into buf once, see readReady
	n     int              // what that gave
	err   error
	dec   wire.Decoder
	msg   wire.Message
	batch eventlog.Batch
	at    time.Time // when the batch was begun
	arena []byte    // topics, ids and replies of the batch: the decoder reuses its own
	acks  []reply   // what the frames of the burst are answered with, in their order
	out   []byte
}

// reply is an answer still to be encoded.
type reply struct {
	ack   wire.Ack
	entry int // of the batch; -1: the answer is known already
}

var workspaces = sync.Pool{New: func() any {
	w := &workspace{buf: make([]byte, readSize)}
	w.ready = func(fd uintptr) { w.n, w.err = readOnce(fd, w.buf) }
	return w
}}

// run reads until the session is idle, or ends; then it says why.
func (s *Session) run(early []byte) {
	var err error
	if !s.woken {
		err = s.pause(len(early) == 0, false) // a new one has nothing to do, as a rule
	}
	s.conclude(s.read(nil, early, err))
}

// read serves bursts of frames until an error ends it, errIdle among them. rest is an
// incomplete frame, held in no more room than it needs. c leaves before anything is
// waited for.
func (s *Session) read(c *courier, rest []byte, err error) error {
	for err == nil {
		if !s.woken {
			c.leave()
		}
		var ws *workspace
		var n int
		if ws, n, err = s.receive(&rest); errors.Is(err, errNothing) {
			err = s.pause(len(rest) == 0, false)
			continue
		}
		if err != nil {
			break
		}
		var left []byte
		if left, err = s.burst(c, &ws, ws.buf[:n]); err != nil {
			return err
		}
		rest, err = s.settle(c, ws, rest, left)
	}
	if !errors.Is(err, errIdle) { // else somebody else may be reading already
		s.unread = rest
	}
	return err
}

// settle is the end of a burst: left is what remains of it, and rest is where to.
func (s *Session) settle(c *courier, ws *workspace, rest, left []byte) ([]byte, error) {
	rest = append(rest[:0], left...)
	if len(rest) == 0 {
		rest = nil // an idle session holds no buffer
	}
	workspaces.Put(ws)
	s.rest(c)
	return rest, s.pause(len(rest) == 0, true)
}

const (
	// subscriptionCost is how many frames' work a change of subscriptions is.
	subscriptionCost = 100
	// bytesCost is how many bytes of a frame are another frame's work.
	bytesCost = 1 << 10
	// restReads is how many reads of one frame are counted together.
	restReads = 256
	// restStep is how soon a session that rests, or waits for who delivers, notices that
	// it has ended.
	restStep = 50 * time.Millisecond
)

// rest reads nothing for as long as the guest has made more work than is its share:
// what it sends meanwhile waits at its own end of the connection.
func (s *Session) rest(c *courier) {
	spent := s.spent
	if s.spent = 0; spent == 0 {
		return
	}
	for left := s.guest.Spend(spent); left > 0 && s.ended.Load() == nil; left -= restStep {
		c.leave()
		time.Sleep(min(left, restStep))
	}
}

// maxBeat is longer than a heartbeat is.
const maxBeat = 64

// burst answers every whole frame in data and gives the incomplete one at its
// end. It may replace *ws where a stalled disk keeps the one it had. c leaves at the first
// frame that takes longer than a heartbeat.
func (s *Session) burst(c *courier, ws **workspace, data []byte) (left []byte, err error) {
	if len(data) > maxBeat {
		c.leave()
	}
	s.gaveUp = false
	for heard := false; ; heard = true {
		frame, rest, err := wire.NextFrame(data)
		if err == nil && frame == nil {
			return s.flushHere(c, ws, rest)
		}
		if err == nil && !heard {
			s.guest.Heard() // a frame is a sign of life, a byte of one is not
		}
		w := *ws
		s.spent += len(frame) / bytesCost
		if err == nil {
			err = w.dec.Decode(frame, &w.msg)
		}
		if err != nil || w.msg.Type != wire.TypeHeartbeat {
			c.leave()
		}
		if err != nil {
			// What came before the bad frame is answered first.
			if _, ferr := s.flush(ws, nil); ferr != nil {
				return nil, ferr
			}
			return nil, err
		}
		if data, err = s.frame(ws, rest); err != nil {
			return nil, err
		}
	}
}

// frame takes in one decoded frame. It gives rest back, moved where the
// workspace was replaced.
func (s *Session) frame(ws **workspace, rest []byte) ([]byte, error) {
	w := *ws
	m := &w.msg
	kind := m.AckKind()
	s.woken = s.woken && m.Type != wire.TypePublish
	s.spent++
	if m.Type == wire.TypeSubscribe || m.Type == wire.TypeUnsubscribe {
		s.spent += subscriptionCost - 1
	}
	refuseFrame := func(code bus.Code, reason string) ([]byte, error) {
		w.acks = append(w.acks, reply{ack: wire.Ack{Kind: kind, Code: string(code), Reason: reason, Topic: w.keep(m.Topic), ID: w.keep(m.ID)}, entry: -1})
		return rest, nil
	}
	switch {
	case m.Bad != "":
		return refuseFrame(bus.CodeBadFrame, m.Bad)
	case m.Type == wire.TypePublish:
		s.publish(w)
		return rest, nil
	case m.Type == wire.TypeHeartbeat:
		s.guest.Heartbeat()
		w.acks = append(w.acks, reply{ack: wire.Ack{Kind: kind, ID: w.keep(m.ID)}, entry: -1})
		return rest, nil
	case m.Type == wire.TypeAck && string(m.Ack) == "publish":
		s.acknowledged(m)
		return rest, nil
	case m.Type == wire.TypeSubscribe || m.Type == wire.TypeUnsubscribe:
		// The answer must come behind those of the frames before it, and
		// deliveries behind the answer.
		sub := s.copyRequest(m)
		rest, err := s.flush(ws, rest)
		if err != nil {
			return nil, err
		}
		return rest, s.change(sub)
	default:
		return refuseFrame(bus.CodeUnsupportedType, fmt.Sprintf("no frame of type %q is known here", wire.Clip(m.TypeName)))
	}
}

// keep copies b to where the next frame does not overwrite it.
func (w *workspace) keep(b []byte) []byte {
	if b == nil {
		return nil
	}
	n := len(w.arena)
	w.arena = append(w.arena, b...)
	return w.arena[n:len(w.arena):len(w.arena)]
}

// publish adds the record to the batch, or the refusal to the answers.
func (s *Session) publish(w *workspace) {
	m := &w.msg
	topic := m.Topic
	if topic == nil {
		topic = []byte(defaultTopic)
	}
	a := wire.Ack{Kind: "publish", Topic: w.keep(topic), ID: w.keep(m.ID)}
	refuse := func(code bus.Code, format string, args ...any) {
		a.Code, a.Reason = string(code), fmt.Sprintf(format, args...)
		w.acks = append(w.acks, reply{ack: a, entry: -1})
	}
	switch owner, owned := wire.TopicVM(topic); {
	case m.TooLarge:
		refuse(bus.CodeTooLarge, "a payload takes at most %d bytes without white space", wire.MaxPayload)
		return
	case !wire.ValidTopic(topic):
		refuse(bus.CodeBadTopic, "%q is no topic: 1 to %d of A-Za-z0-9._:/-", wire.Clip(topic), wire.MaxTopic)
		return
	case m.Reply != nil && !wire.ValidTopic(m.Reply):
		refuse(bus.CodeBadTopic, "reply %q is no topic", wire.Clip(m.Reply))
		return
	case owned && string(owner) != s.vm:
		refuse(bus.CodeForbidden, "topic %s belongs to another VM", topic)
		return
	case brokersOwn(topic):
		refuse(bus.CodeForbidden, "topics beginning castra. are the broker's")
		return
	}
	if s.overtakes(&a) {
		w.acks = append(w.acks, reply{ack: a, entry: -1})
		return
	}
	if len(w.batch.Entries) == 0 {
		w.at = time.Now() // for all of it: it came at once, and to look takes 4 % of a record's time
	}
	if wait := s.guest.Allow(len(m.Payload), w.at); wait > 0 {
		a.RetryAfterMS = wholeMS(wait)
		refuse(bus.CodeRateLimited, "more than this VM may publish; retry in %d ms", a.RetryAfterMS)
		s.hold(&w.acks[len(w.acks)-1].ack)
		s.noteLimited()
		return
	}
	w.acks = append(w.acks, reply{ack: a, entry: len(w.batch.Entries)})
	w.batch.Entries = append(w.batch.Entries, eventlog.Entry{
		VM: s.vm, Topic: a.Topic, ID: a.ID, Reply: w.keep(m.Reply), Payload: m.Payload,
	})
}

// flush commits the batch and writes the answers. It gives rest back, moved
// where the batch, and with it the buffer, had to be left to the log.
func (s *Session) flush(ws **workspace, rest []byte) ([]byte, error) {
	var err error
	if w := *ws; len(w.batch.Entries) > 0 {
		// Not the session's context: what is queued will be committed.
		err = s.broker.Append(context.Background(), &w.batch)
	}
	return s.answer(nil, ws, rest, err)
}

// flushHere is flush at the end of a burst, where the goroutine may be kept for as long
// as a disk or another guest takes. Then another one goes on, and this one gets errHeldUp.
func (s *Session) flushHere(c *courier, ws **workspace, rest []byte) ([]byte, error) {
	w := *ws
	if len(w.batch.Entries) == 0 {
		return s.answer(c, ws, rest, nil)
	}
	var over atomic.Bool // who sets it goes on
	err := s.broker.AppendHere(context.Background(), &w.batch, func(err error) {
		if over.CompareAndSwap(false, true) {
			go s.resume(w, rest, err)
		}
	})
	if !over.CompareAndSwap(false, true) {
		return nil, errHeldUp
	}
	return s.answer(nil, ws, rest, err)
}

// resume goes on where flushHere was held up.
func (s *Session) resume(w *workspace, rest []byte, err error) {
	left, err := s.answer(nil, &w, rest, err)
	if err != nil {
		s.conclude(err)
		return
	}
	rest, err = s.settle(nil, w, nil, left)
	s.conclude(s.read(nil, rest, err))
}

// answer writes the answers of a burst, err being what became of its batch.
func (s *Session) answer(c *courier, ws **workspace, rest []byte, err error) ([]byte, error) {
	w := *ws
	if len(w.acks) == 0 {
		return rest, nil
	}
	if err == nil {
		s.countPublished(w.batch.Entries)
	}
	w.out = w.out[:0]
	failed := false
	for i := range w.acks {
		r := &w.acks[i]
		if r.entry >= 0 {
			s.outcome(r, &w.batch.Entries[r.entry], err)
			if r.ack.Code != "" && !failed {
				failed = true
				s.hold(&r.ack) // it was before whatever was held when it was taken in
			}
		}
		w.out = wire.AppendAckFrame(w.out, &r.ack)
	}
	out := w.out
	if errors.Is(err, eventlog.ErrStalled) && !errors.Is(err, eventlog.ErrNotQueued) {
		fresh := workspaces.Get().(*workspace)
		rest = fresh.buf[:copy(fresh.buf, rest)]
		*ws = fresh
	} else {
		w.batch.Entries, w.arena, w.acks = w.batch.Entries[:0], w.arena[:0], w.acks[:0]
	}
	return rest, s.write(c, out)
}

// countPublished notes what was stored; a refused record was not, and a retry
// was before.
func (s *Session) countPublished(entries []eventlog.Entry) {
	n := 0
	for i := range entries {
		if entries[i].Err == nil && !entries[i].Duplicate {
			n++
		}
	}
	if n > 0 {
		s.guest.Published(n)
	}
}

// outcome fills in the answer to a publish.
func (s *Session) outcome(r *reply, e *eventlog.Entry, err error) {
	if err == nil {
		err = e.Err
	}
	if err == nil {
		r.ack.Seq, r.ack.NotDurable = e.Seq, s.opts.Lazy
		return
	}
	refuse(&r.ack, err)
}
