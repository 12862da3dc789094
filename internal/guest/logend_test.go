package guest

import (
	"fmt"
	"os"
	"slices"
	"testing"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

func endsAt(seq uint64) *wire.Message {
	return &wire.Message{Ack: []byte("subscribe"), Status: []byte("ok"), Seq: seq, HasSeq: seq > 0}
}

// heardUpTo50 makes a table that has heard records up to 50 of a and none of b, and is
// on a second session, whose host has answered for both.
func heardUpTo50(t *testing.T) (tab *table, a, b *subscription) {
	t.Helper()
	tab = testTable()
	a, b = &subscription{topic: "a", sink: &recorder{}}, &subscription{topic: "b", sink: &recorder{}}
	_, _ = tab.add(a)
	_, _ = tab.add(b)
	tab.begin()
	wantLines(t, tab, "subscribe a s1 ", "subscribe b s2 ") // nothing was heard yet
	tab.answer(okAck)
	tab.answer(okAck)
	tab.deliver(delivery("s1", 50))
	tab.processed(a, 50)
	wantLines(t, tab, "ack s1 50")
	tab.end()
	tab.begin()
	wantLines(t, tab, "subscribe a s3 51", "subscribe b s4 ", "subscribe a s5 ")
	tab.answer(endsAt(50))
	tab.answer(endsAt(0))
	return tab, a, b
}

func TestTableOfTheSameLog(t *testing.T) {
	tab, a, _ := heardUpTo50(t)
	tab.answer(endsAt(50))
	tab.deliver(delivery("s5", 51)) // it was on its way
	tab.deliver(delivery("s3", 51))
	wantLines(t, tab, "unsubscribe s5")
	a.sink.(*recorder).want(t, "begun", "50", "suspended", "begun", "51")
}

// A log that ends before what was heard of it is another one. What comes is heard,
// and acknowledged, though its numbers are lower.
func TestTableOfAnotherLog(t *testing.T) {
	tab, a, b := heardUpTo50(t)
	var told []uint64
	tab.shorter = func(end uint64) { told = append(told, end) }
	tab.answer(endsAt(7))
	wantLines(t, tab, "unsubscribe s5", "unsubscribe s3", "subscribe a s6 8")
	tab.processed(a, 50) // of the log before
	tab.answer(endsAt(7))
	tab.deliver(delivery("s6", 8))
	tab.processed(a, 8)
	wantLines(t, tab, "ack s6 8")
	a.sink.(*recorder).want(t, "begun", "50", "suspended", "begun", "gap 1-7", "begun", "8")
	b.sink.(*recorder).want(t, "begun", "suspended", "begun")
	if !slices.Equal(told, []uint64{7}) {
		t.Errorf("told of %d", told)
	}
}

func TestTableOfAnEmptyLog(t *testing.T) {
	tab, a, _ := heardUpTo50(t)
	tab.answer(endsAt(0))
	wantLines(t, tab, "unsubscribe s5", "unsubscribe s3", "subscribe a s6 1")
	a.sink.(*recorder).want(t, "begun", "50", "suspended", "begun")
}

// A host that never says where a subscription begins does not say that its log is empty.
func TestTableOfAHostThatDoesNotSay(t *testing.T) {
	tab := testTable()
	_, _ = tab.add(&subscription{topic: "a", sink: &recorder{}})
	for range 2 {
		tab.begin()
		sent(t, tab)
		tab.answer(okAck)
		tab.deliver(delivery("s1", 50))
		tab.end()
	}
	tab.begin()
	wantLines(t, tab, "subscribe a s4 51", "subscribe a s5 ")
	tab.answer(okAck)
	tab.answer(okAck)
	wantLines(t, tab, "unsubscribe s5")
}

func TestTableThatIsFull(t *testing.T) {
	tab, a, _ := heardUpTo50(t)
	tab.answer(&wire.Message{Status: []byte("error"), Code: []byte("too-many-subscriptions")})
	tab.deliver(delivery("s3", 51))
	wantLines(t, tab)
	a.sink.(*recorder).want(t, "begun", "50", "suspended", "begun", "51")
	for range sessionSubscriptions - 2 {
		_, _ = tab.add(&subscription{topic: "c", sink: &recorder{}})
	}
	tab.end()
	tab.begin()
	if n := len(sent(t, tab)); n != sessionSubscriptions {
		t.Errorf("%d subscriptions are asked for", n)
	}
}

// TestHostWithALogBegunAnew takes the host's log away while the guest runs: what is
// published then is heard.
func TestHostWithALogBegunAnew(t *testing.T) {
	h := newRealHost(t)
	f := withRealHost(t, h, "web1")
	got := newLines()
	f.follow(t, bus.TailRequest{All: true, Topics: []string{"broadcast", "vm:self"}}, got)
	for i := range 50 {
		h.publish("broadcast", fmt.Sprint(i))
	}
	f.until(t, func() bool { return len(got.payloads(t)) == 50 })
	_ = h.Close()
	f.until(t, func() bool { return !f.connected() })
	if err := os.RemoveAll(h.dir); err != nil {
		t.Fatal(err)
	}
	h.open()
	h.publish("broadcast", `"early"`)
	h.serve()
	f.until(t, func() bool { return f.logs.count("ends before what this guest has heard") == 1 })
	f.until(t, func() bool { return len(f.subs.topics()) == 2 })
	h.publish("broadcast", `"late"`)
	f.until(t, func() bool { return slices.Contains(got.payloads(t), `"late"`) })
	if seq, err := f.Publish(t.Context(), bus.PublishRequest{Topic: "vm:self", Payload: []byte(`"own"`)}); err != nil || f.Status(nil).Broker.HeadSeq != seq {
		t.Errorf("published %d (%v), and the newest is said to be %d", seq, err, f.Status(nil).Broker.HeadSeq)
	}
	f.until(t, func() bool { return slices.Contains(got.payloads(t), `"own"`) })
}
