package guest

import (
	"fmt"
	"slices"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/logging"
	"github.com/castrabus/castra/internal/wire"
)

// listenAlways subscribes to exactly these topics for good.
func (a *Agent) listenAlways(topics []string) error {
	wanted := make([]string, 0, len(topics))
	for _, topic := range topics {
		topic = a.own(topic)
		if err := a.checkPattern(topic); err != nil {
			return fmt.Errorf("subscribe, under [bus]: %w", err)
		}
		if !slices.Contains(wanted, topic) {
			wanted = append(wanted, topic)
		}
	}
	a.always = slices.DeleteFunc(a.always, func(s *subscription) bool {
		if slices.Contains(wanted, s.topic) {
			return false
		}
		a.subs.remove(s)
		return true
	})
	for _, topic := range wanted {
		if slices.ContainsFunc(a.always, func(s *subscription) bool { return s.topic == topic }) {
			continue
		}
		s := &subscription{topic: topic, sink: &listener{agent: a}}
		if _, err := a.subs.add(s); err != nil {
			return err
		}
		a.always = append(a.always, s)
	}
	return nil
}

// listener is the sink of a topic that is always listened to. To hear is to have
// handled.
type listener struct {
	agent   *Agent
	refusal string // as last logged; of the session's reader alone
}

func (*listener) suspended(*subscription) {}

func (l *listener) begun(*subscription) { l.refusal = "" }

func (l *listener) refused(s *subscription, err *bus.Error) {
	if l.refusal != err.Error() {
		l.refusal = err.Error()
		logging.SubscriptionRefused.On(l.agent.opts.Log).WithFields(logrus.Fields{"topic": s.topic, "reason": err.Error()}).Warn("the host refuses a subscription of the configuration")
	}
}

func (l *listener) deliver(s *subscription, m *wire.Message) bool {
	l.agent.subs.processed(s, m.Seq)
	return true
}

func (l *listener) gap(s *subscription, from, to uint64) bool {
	logging.RecordsMissed.On(l.agent.opts.Log).WithFields(logrus.Fields{"topic": s.topic, "from": from, "to": to}).Warn("there are records that this guest will not hear")
	return true
}
