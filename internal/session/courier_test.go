package session

import (
	"context"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/wire"
)

// Sessions come out of the queue in the order in which they went in, none twice and
// none lost, and what has gone through it takes no room.
func TestCouriersQueue(t *testing.T) {
	c := NewCouriers()
	var want []*Session
	rnd := rand.New(rand.NewPCG(1, 2))
	most := 0
	for range 20000 {
		switch {
		case len(want) < 100 && rnd.IntN(2) == 0:
			a, b := &Session{}, &Session{}
			c.Wake(a, b)
			c.Wake(b, a) // they wait already
			want = append(want, a, b)
		case len(want) > 0:
			s := c.next()
			if s != want[0] {
				t.Fatal("not whose turn it was")
			}
			if want = want[1:]; rnd.IntN(3) == 0 {
				c.again(s)
				want = append(want, s)
			}
		}
		most = max(most, len(want))
	}
	if most < 50 || cap(c.queue) > 8*most {
		t.Errorf("the queue has room for %d, and %d were in it at most", cap(c.queue), most)
	}
	for _, s := range c.queue[:c.taken] {
		if s != nil {
			t.Fatal("it holds a session that was attended to")
		}
	}
}

// Who helps delivers what there is once, however much others publish meanwhile: the guest
// that it reads for waits for an ack.
func TestHelpEnds(t *testing.T) {
	c := NewCouriers()
	log, _, err := eventlog.Open(eventlog.Options{Dir: t.TempDir(), SegmentSize: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = log.Close() })
	conn, _ := pair(t)
	s := newSession(conn, rawConn{conn}, nil, &Options{Log: log, Couriers: c})
	topics := []string{"odd", "even"} // each is looked for before the other, in turn
	subs := make([]*Subscription, len(topics))
	seq, heard := uint64(0), 0
	publish := func() {
		b := &eventlog.Batch{Entries: []eventlog.Entry{{VM: "a", Topic: []byte(topics[seq%2])}}}
		seq++
		if err := log.Append(t.Context(), b); err != nil {
			t.Error(err)
		}
		if subs[(seq-1)%2].Notify(seq) {
			c.Leave(s)
		}
	}
	for i, topic := range topics {
		pattern, err := wire.ParsePattern(topic)
		if err != nil {
			t.Fatal(err)
		}
		subs[i] = &Subscription{s: s, name: topic, pattern: pattern, reader: log.NewReader(1)}
		subs[i].visible = func(*eventlog.Record) bool {
			if heard++; heard < 10 {
				publish()
			}
			return true
		}
	}
	s.subs.Store(&subs)
	publish()
	c.Help(func() { t.Error("it is kept waiting") })
	if heard != 1 {
		t.Fatalf("%d records were delivered by who helps", heard)
	}
	if c.next() != s {
		t.Error("the next one is delivered by nobody")
	}
}

// Who helps one session delivers to it for no longer than a courier does at a time, and
// leaves what there is still to a courier.
func TestHelpLeavesTheRest(t *testing.T) {
	c := NewCouriers()
	log, _, err := eventlog.Open(eventlog.Options{Dir: t.TempDir(), SegmentSize: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = log.Close() })
	b := &eventlog.Batch{}
	for range scanLimit + 1 {
		b.Entries = append(b.Entries, eventlog.Entry{VM: "a", Topic: []byte("other")})
	}
	if err := log.Append(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	s := newSession(nil, nil, nil, &Options{Log: log, Couriers: c})
	pattern, err := wire.ParsePattern("t")
	if err != nil {
		t.Fatal(err)
	}
	subs := []*Subscription{{s: s, name: "t", pattern: pattern, reader: log.NewReader(1)}}
	s.subs.Store(&subs)
	if !subs[0].Notify(1) {
		t.Fatal("nobody is to deliver")
	}
	c.Leave(s)
	c.Help(func() { t.Error("it is kept waiting") })
	if got := subs[0].position.Load(); got != scanLimit {
		t.Errorf("who helps came to the record %d", got)
	}
	c.mu.Lock()
	next := c.first()
	c.mu.Unlock()
	if next != s {
		t.Fatal("the rest is delivered by nobody")
	}
	(&courier{of: c}).attend(s)
	if got := subs[0].position.Load(); got != scanLimit+1 {
		t.Errorf("the courier came to the record %d", got)
	}
}

// Who helps has all that were left delivered to, those that it does not take itself by
// the couriers.
func TestHelpLeavesNobody(t *testing.T) {
	c := NewCouriers()
	ctx, stop := context.WithCancel(t.Context())
	var run sync.WaitGroup
	run.Go(func() { c.Run(ctx) })
	t.Cleanup(func() { stop(); run.Wait() })
	var all [3]*Session // they have ended: nothing is delivered, but somebody has seen to it
	for i := range all {
		all[i] = newSession(nil, nil, nil, &Options{Couriers: c})
		all[i].ended.Store(&End{})
	}
	for range 100 {
		for _, s := range all {
			c.Leave(s)
		}
		c.Help(nil)
		for i, s := range all {
			for end := time.Now().Add(20 * time.Second); !s.deliveries.start(); time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("session %d is left", i)
				}
			}
			s.deliveries.next()
		}
	}
}
