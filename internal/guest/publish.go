package guest

import (
	"context"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/logging"
	"github.com/castrabus/castra/internal/wire"
)

// Publish keeps the record, and returns the host's number for it, or 0 where there
// is no session, it breaks, or the ack takes long: the record is then kept until
// the host has it, durably unless the spool is in memory (Status says so). If ctx
// ends first, that is open. req.Payload is compact JSON.
func (a *Agent) Publish(ctx context.Context, req bus.PublishRequest) (seq uint64, err error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	answer := make(chan result, 1) // room for the one answer: the outbox does not wait for us
	if err := a.publish(req, func(r result) { answer <- r }); err != nil {
		return 0, err
	}
	select {
	case r := <-answer: // in time: the keeper sees to it
		if r.err != nil {
			return 0, r.err
		}
		return r.seq, nil
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// publish checks a record and puts it into the outbox.
func (a *Agent) publish(req bus.PublishRequest, done func(result)) error {
	r := Record{Topic: a.own(req.Topic), ID: req.ID, Reply: a.own(req.Reply), Payload: req.Payload}
	if r.Topic == "" {
		r.Topic = defaultTopic
	}
	if err := a.check(&r); err != nil {
		return err
	}
	if r.ID == "" {
		r.ID = a.newID()
	}
	return a.outbox.put(r, done)
}

// newID makes an id that no other message of this machine has. The moment is for one that
// was put back to a snapshot of its memory: it draws the same random bits and counts the same numbers
// again, and the host would take its new messages for those it has.
func (a *Agent) newID() string {
	id := append(make([]byte, 0, 64), a.idBase...)
	id = strconv.AppendUint(id, a.ids.Add(1), 10)
	id = append(id, '-')
	return string(strconv.AppendInt(id, time.Now().UnixNano(), 36))
}

// check refuses at once what the host would refuse later, when nobody may be left
// to hear of it (contract 2).
func (a *Agent) check(r *Record) error {
	owner, owned := wire.TopicVM(r.Topic)
	switch {
	case !wire.ValidTopic(r.Topic):
		return bus.Errorf(bus.CodeBadTopic, "%.64q is no topic: 1 to %d of A-Za-z0-9._:/-", r.Topic, wire.MaxTopic)
	case r.Reply != "" && !wire.ValidTopic(r.Reply):
		return bus.Errorf(bus.CodeBadTopic, "reply %.64q is no topic", r.Reply)
	case owned && owner != a.id.name:
		return bus.Errorf(bus.CodeForbidden, "topic %s belongs to another VM; this one is %s, its own topic vm:self", r.Topic, a.id.name)
	case strings.HasPrefix(r.Topic, wire.BrokerPrefix):
		return bus.Errorf(bus.CodeForbidden, "topics beginning %s are the host's own; choose another", wire.BrokerPrefix)
	case len(r.Payload) > wire.MaxPayload:
		return bus.Errorf(bus.CodeTooLarge, "a payload takes at most %d bytes without white space, not %d", wire.MaxPayload, len(r.Payload))
	case r.ID != "" && !wire.ValidID(r.ID):
		return bus.Errorf(bus.CodeInvalidArg, "an id has 1 to %d bytes of UTF-8", wire.MaxID)
	}
	return nil
}

// defaultTopic is where a publish without a topic goes (contract 2).
const defaultTopic = "broadcast"

// selfTopic stands for the VM's own topic, so that programs need not know its name.
const selfTopic = "vm:self"

// own puts the VM's name where a topic or pattern says vm:self.
func (a *Agent) own(topic string) string {
	if rest, ok := strings.CutPrefix(topic, selfTopic); ok && (rest == "" || rest[0] == '/') {
		return "vm:" + a.id.name + rest
	}
	return topic
}

// checkPattern refuses a subscription that the host would refuse.
func (a *Agent) checkPattern(topic string) error {
	p, err := wire.ParsePattern(topic)
	if err != nil {
		return bus.Errorf(bus.CodeBadTopic, "%v", err)
	}
	if owner, owned := p.VM(); owned && owner != a.id.name {
		return bus.Errorf(bus.CodeForbidden, "topic %s belongs to another VM; this one is %s, its own topic vm:self", topic, a.id.name)
	}
	if strings.HasPrefix(topic, wire.BrokerPrefix) {
		return bus.Errorf(bus.CodeForbidden, "topics beginning %s are heard by the host alone; follow them there", wire.BrokerPrefix)
	}
	return nil
}

// WaitAck is the host's to answer.
func (*Agent) WaitAck(context.Context, uint64) (string, error) {
	return "", bus.Errorf(bus.CodeNotHere, "only the host knows which guest acknowledged a record; wait for it there")
}

// lossLog tells of records that the host refused for good after their publishers
// had been told that they are kept: the first at once, the others counted.
type lossLog struct {
	log *logrus.Entry

	mu    sync.Mutex
	last  time.Time
	count int // since
}

const lossEvery = 10 * time.Second

func (l *lossLog) lost(r *Record, err *bus.Error) {
	l.mu.Lock()
	l.count++
	n, now := l.count, time.Now()
	due := l.last.IsZero() || now.Sub(l.last) >= lossEvery
	if due {
		l.last, l.count = now, 0
	}
	l.mu.Unlock()
	if due {
		logging.MessagesLost.On(l.log).WithFields(logrus.Fields{"topic": r.Topic, "id": r.ID, "reason": err.Error(), "records": n}).Warn("the host refused a kept message for good; it is lost")
	}
}

// flush tells of what was counted last.
func (l *lossLog) flush() {
	l.mu.Lock()
	n := l.count
	l.count = 0
	l.mu.Unlock()
	if n > 0 {
		logging.MessagesLost.On(l.log).WithField("records", n).Warn("the host refused more kept messages for good; they are lost")
	}
}
