package guest

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bubble"
	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

// recorder is a sink that notes what it is told.
type recorder struct {
	log  []string
	full bool
}

func (r *recorder) begun(*subscription)     { r.log = append(r.log, "begun") }
func (r *recorder) suspended(*subscription) { r.log = append(r.log, "suspended") }
func (r *recorder) refused(_ *subscription, err *bus.Error) {
	r.log = append(r.log, "refused "+string(err.Code))
}

func (r *recorder) deliver(_ *subscription, m *wire.Message) bool {
	if !r.full {
		r.log = append(r.log, fmt.Sprint(m.Seq))
	}
	return !r.full
}

func (r *recorder) gap(_ *subscription, from, to uint64) bool {
	if !r.full {
		r.log = append(r.log, fmt.Sprintf("gap %d-%d", from, to))
	}
	return !r.full
}

func (r *recorder) want(t *testing.T, want ...string) {
	t.Helper()
	if !slices.Equal(r.log, want) {
		t.Errorf("the sink was told %q, want %q", r.log, want)
	}
	r.log = nil
}

func testTable() *table {
	tab := newTable()
	tab.wake, tab.note, tab.shorter = func() {}, func() {}, func(uint64) {}
	return tab
}

// sent gives what take sends, as "subscribe topic name from", "unsubscribe name" and
// "ack name seq".
func sent(t *testing.T, tab *table) (lines []string) {
	t.Helper()
	out := tab.take(nil)
	var dec wire.Decoder
	var m wire.Message
	for len(out) > 0 {
		frame, rest, err := wire.NextFrame(out)
		if err != nil || frame == nil {
			t.Fatalf("no frame: %v", err)
		}
		out = rest
		if err := dec.Decode(frame, &m); err != nil || m.Bad != "" {
			t.Fatal(err, m.Bad)
		}
		switch m.Type {
		case wire.TypeSubscribe:
			lines = append(lines, fmt.Sprintf("subscribe %s %s %s", m.Topic, m.Sub, fromJSON(&m)))
		case wire.TypeUnsubscribe:
			lines = append(lines, fmt.Sprintf("unsubscribe %s", m.Subscription))
		case wire.TypeAck:
			lines = append(lines, fmt.Sprintf("ack %s %d", m.Subscription, m.Seq))
		default:
			t.Fatalf("sent a %s", m.TypeName)
		}
	}
	return lines
}

func wantLines(t *testing.T, tab *table, want ...string) {
	t.Helper()
	if got := sent(t, tab); !slices.Equal(got, want) {
		t.Errorf("sent %q, want %q", got, want)
	}
}

var okAck = &wire.Message{Ack: []byte("subscribe"), Status: []byte("ok")}

func delivery(name string, seq uint64) *wire.Message {
	return &wire.Message{Type: wire.TypePublish, Subscription: []byte(name), Seq: seq}
}

func TestTableResumesBehindWhatWasDelivered(t *testing.T) {
	tab := testTable()
	a, b := &recorder{}, &recorder{}
	for _, s := range []*subscription{{topic: "a", from: "-3", sink: a}, {topic: "b", sink: b}} {
		if live, err := tab.add(s); live || err != nil {
			t.Fatal(live, err)
		}
	}
	wantLines(t, tab)
	tab.begin()
	wantLines(t, tab, "subscribe a s1 -3", "subscribe b s2 ")
	tab.answer(okAck)
	tab.answer(okAck)
	tab.deliver(delivery("s1", 5))
	tab.deliver(delivery("s1", 9))
	tab.gap(&wire.Message{Subscription: []byte("s1"), GapFrom: 10, GapTo: 12})
	a.want(t, "begun", "5", "9", "gap 10-12")
	tab.end()
	a.want(t, "suspended")
	tab.begin()
	wantLines(t, tab, "subscribe a s3 13", "subscribe b s4 ", "subscribe a s5 ")
	tab.answer(okAck)
	tab.deliver(delivery("s1", 11)) // under the name of the session before
	tab.deliver(delivery("s3", 12)) // once more
	tab.deliver(delivery("s3", 13))
	tab.gap(&wire.Message{Subscription: []byte("s3"), GapFrom: 10, GapTo: 12})
	tab.gap(&wire.Message{Subscription: []byte("s3"), GapFrom: 12, GapTo: 20})
	a.want(t, "begun", "13", "gap 14-20")
	b.want(t, "begun", "suspended")
}

// A host that says behind which record a subscription begins makes it resumable
// before anything was delivered.
func TestTableResumesFromTheAck(t *testing.T) {
	tab := testTable()
	_, _ = tab.add(&subscription{topic: "a", sink: &recorder{}})
	tab.begin()
	wantLines(t, tab, "subscribe a s1 ")
	tab.answer(&wire.Message{Status: []byte("ok"), Seq: 41, HasSeq: true})
	tab.end()
	tab.begin()
	wantLines(t, tab, "subscribe a s2 42", "subscribe a s3 ")
}

// "The last 3" of a topic that was empty is all that came since.
func TestTableResumesWhatWasEmpty(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		tab := testTable()
		_, _ = tab.add(&subscription{topic: "a", from: "-3", sink: &recorder{}})
		tab.begin()
		wantLines(t, tab, "subscribe a s1 -3")
		tab.answer(okAck)
		tab.end()
		tab.begin()
		wantLines(t, tab, "subscribe a s2 -3") // it may just not have come
		tab.answer(okAck)
		time.Sleep(quietAfter + 1)
		tab.end()
		tab.begin()
		wantLines(t, tab, `subscribe a s3 "start"`)
	})
}

func TestTablePausesAndGoesOn(t *testing.T) {
	tab := testTable()
	r := &recorder{}
	s := &subscription{topic: "a", sink: r}
	tab.begin()
	if live, err := tab.add(s); !live || err != nil {
		t.Fatal(live, err)
	}
	wantLines(t, tab, "subscribe a s1 ")
	tab.answer(okAck)
	tab.deliver(delivery("s1", 5))
	r.full = true
	tab.deliver(delivery("s1", 6))
	tab.deliver(delivery("s1", 7))
	wantLines(t, tab, "unsubscribe s1")
	tab.end()
	tab.begin()
	wantLines(t, tab) // a paused one waits for its sink
	r.full = false
	tab.resume(s)
	wantLines(t, tab, "subscribe a s2 6")
	tab.answer(okAck)
	tab.deliver(delivery("s2", 6))
	r.want(t, "begun", "5", "suspended", "begun", "6")
}

// The sink may have room again before the table has noted that it had none.
func TestTableResumeBeforePause(t *testing.T) {
	tab := testTable()
	s := &subscription{topic: "a"}
	s.sink = hasty{&recorder{}, func() { tab.resume(s) }}
	tab.begin()
	_, _ = tab.add(s)
	wantLines(t, tab, "subscribe a s1 ")
	tab.answer(okAck)
	tab.deliver(delivery("s1", 5))
	wantLines(t, tab, "unsubscribe s1", "subscribe a s2 5")
}

type hasty struct {
	*recorder
	resume func()
}

func (h hasty) deliver(*subscription, *wire.Message) bool {
	h.resume()
	return false
}

func TestTableRemoves(t *testing.T) {
	tab := testTable()
	tab.begin()
	unsent, asked, live := &subscription{topic: "a", sink: &recorder{}}, &subscription{topic: "b", sink: &recorder{}}, &subscription{topic: "c", sink: &recorder{}}
	_, _ = tab.add(live)
	_, _ = tab.add(asked)
	wantLines(t, tab, "subscribe c s1 ", "subscribe b s2 ")
	tab.answer(okAck)
	_, _ = tab.add(unsent)
	tab.processed(live, 3)
	tab.remove(unsent)
	tab.remove(asked)
	tab.remove(live)
	wantLines(t, tab, "unsubscribe s2", "unsubscribe s1")
	tab.answer(okAck) // of the one that was asked for
	tab.deliver(delivery("s1", 9))
	for _, s := range []*subscription{unsent, asked, live} {
		want := []string{}
		if s == live {
			want = []string{"begun"}
		}
		s.sink.(*recorder).want(t, want...)
	}
	if tab.answer(okAck) {
		t.Error("an ack for nothing was taken")
	}
}

func TestTableAcksTheNewestOnly(t *testing.T) {
	tab := testTable()
	s := &subscription{topic: "a", sink: &recorder{}}
	tab.begin()
	_, _ = tab.add(s)
	wantLines(t, tab, "subscribe a s1 ")
	tab.answer(okAck)
	tab.processed(s, 8)
	wantLines(t, tab) // nothing was delivered yet
	tab.deliver(delivery("s1", 5))
	tab.deliver(delivery("s1", 8))
	tab.processed(s, 5)
	tab.processed(s, 8)
	tab.processed(s, 7)
	wantLines(t, tab, "ack s1 8")
	tab.processed(s, 8)
	wantLines(t, tab)
}

// An unsubscribe that the host's disk has kept from being done is sent again.
func TestTableUnsubscribesAgain(t *testing.T) {
	tab := testTable()
	s := &subscription{topic: "a", sink: &recorder{}}
	_, _ = tab.add(s)
	tab.begin()
	wantLines(t, tab, "subscribe a s1 ")
	tab.answer(okAck)
	tab.remove(s)
	wantLines(t, tab, "unsubscribe s1")
	wantLines(t, tab)
	answer := &wire.Message{Ack: []byte("unsubscribe"), Status: []byte("error"), Code: []byte(bus.CodeStorageStalled), Subscription: []byte("s1")}
	for range 2 {
		tab.dropped(answer)
		tab.dropped(answer) // not asked for
		wantLines(t, tab, "unsubscribe s1")
	}
	tab.dropped(&wire.Message{Ack: []byte("unsubscribe"), Status: []byte("ok"), Subscription: []byte("s1")})
	tab.dropped(answer)
	wantLines(t, tab)
}

func TestTableRefusals(t *testing.T) {
	tab := testTable()
	r := &recorder{}
	_, _ = tab.add(&subscription{topic: "a", sink: r})
	tab.begin()
	wantLines(t, tab, "subscribe a s1 ")
	tab.answer(&wire.Message{Status: []byte("error"), Code: []byte("too-many-subscriptions")})
	tab.end()
	tab.begin()
	wantLines(t, tab, "subscribe a s2 ") // perhaps there is room now
	r.want(t, "refused too-many-subscriptions", "suspended")
	if topics := tab.topics(); len(topics) != 0 {
		t.Errorf("subscribed to %q", topics)
	}
	for range maxSubscriptions - 1 {
		if _, err := tab.add(&subscription{topic: "x", sink: r}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := tab.add(&subscription{topic: "x", sink: r}); refusalOf(err).Code != bus.CodeTooManySubscriptions {
		t.Errorf("one too many: %v", err)
	}
}
