package session

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bubble"
	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/wire"
)

// letting is a broker that lets a guest hear everything.
type letting struct{ Broker }

func (letting) Visible(string) func(*eventlog.Record) bool {
	return func(*eventlog.Record) bool { return true }
}
func (letting) Subscribe(*Subscription)            {}
func (letting) Unsubscribe(*Subscription)          {}
func (letting) Subscribed(*Session, []string)      {}
func (letting) Acknowledged(*Subscription, uint64) {}

// alone makes a session that nothing but a test reads for, over an empty log.
func alone(t *testing.T) (s *Session, heard func() string) {
	t.Helper()
	log, _, err := eventlog.Open(eventlog.Options{Dir: t.TempDir(), SegmentSize: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = log.Close() })
	c, peer := pair(t)
	s = newSession(c, rawConn{c}, letting{}, &Options{Log: log, Idle: &Idle{}, Couriers: NewCouriers(), MaxSubscriptions: 16, Scans: make(chan struct{}, 1)})
	s.vm, s.guest = "g", beating{}
	return s, func() string { // what it has been sent so far, which is less than this
		b := make([]byte, 64<<10)
		n, err := peer.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
}

// However many changes of subscriptions come at once, a delivery that a disk keeps is
// waited for once: heartbeats stand behind them. One that comes when the disk has
// answered is made, and a session that has ended waits no more.
func TestStalledReadBurst(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		s, heard := alone(t)
		const changes = 14
		burst := func() (time.Duration, error) {
			var data []byte
			for i := range changes {
				data = wire.AppendSubscribeFrame(data, "t", fmt.Sprint("s", i), "", "")
			}
			data = wire.AppendHeartbeatFrame(data)
			ws := workspaces.Get().(*workspace)
			began := time.Now()
			_, err := s.burst(nil, &ws, data)
			return time.Since(began), err
		}
		count := func(answers, code string) {
			t.Helper()
			if n := strings.Count(answers, code); n != changes || !strings.Contains(answers, `"ack":"heartbeat","status":"ok"`) {
				t.Errorf("%d of %d changes have %s, with %.300s", n, changes, code, answers)
			}
		}
		s.reading <- struct{}{} // somebody delivers
		for range 2 {
			if took, err := burst(); err != nil || took != searchTime {
				t.Errorf("a burst waits for %v, %v", took, err)
			}
			count(heard(), `"code":"storage-stalled"`)
		}
		time.AfterFunc(time.Second, func() { <-s.reading })
		if took, err := burst(); err != nil || took != time.Second {
			t.Errorf("a disk that answers after a second keeps a burst for %v, %v", took, err)
		}
		count(heard(), `"ack":"subscribe","status":"ok"`)
		s.reading <- struct{}{}
		time.AfterFunc(time.Second, func() { s.End(TroubleSuperseded, "") })
		if took, err := burst(); err == nil || took > time.Second+restStep {
			t.Errorf("a session that ended after a second has waited for %v, %v", took, err)
		}
	})
}
