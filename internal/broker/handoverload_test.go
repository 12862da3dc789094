package broker

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/wire"
)

// Nine brokers after one another, under load: no connection is lost, no record, no
// answer and no delivery, none comes twice, and all of it is in order.
func TestHandOverUnderLoad(t *testing.T) {
	o := testOptions(t, t.TempDir())
	o.GuestTopics = guestTopics(t, "load")
	b := start(t, o)
	const guests, restarts = 3, 8
	var work sync.WaitGroup
	var enough atomic.Bool
	flows := make([]*flow, guests)
	for i := range flows {
		g := connect(t, b.addr, fmt.Sprintf("g%d", i))
		if err := g.conn.SetDeadline(time.Now().Add(4 * hang)); err != nil {
			t.Fatal(err)
		}
		g.send(`{"type":"subscribe","topic":"load","cursor":"c"}`, `{"type":"subscribe","topic":"*","sub":"all"}`)
		g.expect(`{"ack":"subscribe"}`, `{"ack":"subscribe"}`)
		f := &flow{guest: g, vm: fmt.Sprintf("g%d", i), window: make(chan struct{}, 100)}
		flows[i] = f
	}
	for _, f := range flows {
		work.Go(func() { f.publish(&enough) })
		work.Go(f.follow)
	}
	for range restarts {
		goal := flows[0].acked.Load() + 50
		eventually(t, "the guests go on", func() bool { return flows[0].acked.Load() > goal || t.Failed() })
		if t.Failed() {
			break
		}
		b = restart(t, b, guests)
	}
	enough.Store(true)
	work.Wait()
	total := int64(0)
	for _, f := range flows {
		total += f.acked.Load()
	}
	t.Logf("%d restarts, %d records", restarts, total)
}

// flow is a guest that publishes the numbers from 1 and hears them again.
type flow struct {
	*guest
	vm     string
	window chan struct{} // a token for each publish that is not acknowledged
	sent   atomic.Int64  // how many it were; 0: it goes on
	acked  atomic.Int64
}

// publish cuts the stream of bytes anywhere.
func (f *flow) publish(enough *atomic.Bool) {
	n := 0
	for end := false; !end; {
		var b []byte
		if end = enough.Load() && n > 0; end {
			f.sent.Store(int64(n))
			b = wire.AppendFrame(b, []byte(`{"type":"heartbeat"}`)) // whose answer says that there is an end
		} else {
			for range 1 + rand.IntN(20) {
				n++
				b = wire.AppendFrame(b, fmt.Appendf(nil, `{"type":"publish","topic":"load","id":"%d","payload":%d}`, n, n))
				f.window <- struct{}{}
			}
		}
		for len(b) > 0 {
			cut := min(len(b), 1+rand.IntN(200))
			if _, err := f.conn.Write(b[:cut]); err != nil {
				f.t.Errorf("%s: %v", f.vm, err)
				return
			}
			b = b[cut:]
		}
	}
}

// follow reads until everything sent is acknowledged and heard on both
// subscriptions, in order and once.
func (f *flow) follow() {
	defer func() { // whatever failed, publish must not wait for it
		for f.sent.Load() == 0 {
			select {
			case <-f.window:
			case <-time.After(time.Millisecond):
			}
		}
	}()
	type from struct{ sub, vm string }
	heard := make(map[from]int64)
	newest := make(map[string]uint64)
	for sent := int64(0); sent == 0 || f.acked.Load() < sent || heard[from{"load", f.vm}] < sent || heard[from{"all", f.vm}] < sent; sent = f.sent.Load() {
		b := f.next()
		var m struct {
			Type, Ack, Status, ID, Subscription, VM string
			Seq                                     uint64
			Payload                                 int64
		}
		if err := json.Unmarshal([]byte(b), &m); err != nil {
			f.t.Errorf("%s: %s behind %d acks, %v", f.vm, b, f.acked.Load(), err)
			return
		}
		switch {
		case m.Type == "ack" && m.Ack == "heartbeat":
		case m.Type == "ack":
			if m.Status != "ok" || m.ID != fmt.Sprint(f.acked.Load()+1) {
				f.t.Errorf("%s: %s behind the ack of %d", f.vm, b, f.acked.Load())
				return
			}
			f.acked.Add(1)
			<-f.window
		case m.Type == "publish":
			if m.Seq <= newest[m.Subscription] {
				f.t.Errorf("%s: %s behind %d", f.vm, b, newest[m.Subscription])
				return
			}
			newest[m.Subscription] = m.Seq
			k := from{m.Subscription, m.VM}
			if last, ok := heard[k]; ok && m.Payload != last+1 {
				f.t.Errorf("%s: %s behind %d", f.vm, b, last)
				return
			}
			heard[k] = m.Payload
		default:
			f.t.Errorf("%s: %s", f.vm, b)
			return
		}
	}
}
