package guest

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bubble"
	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

// box is an outbox with what it told, and the ids that it sent.
type box struct {
	*outbox
	t     *testing.T
	tells sync.Mutex // guards told, where others than the test's goroutine tell
	told  map[string]result
	given []string // ids of records lost
}

func newBox(t *testing.T, limit int64) *box {
	b := &box{outbox: newOutbox(limit, nil), t: t, told: make(map[string]result)}
	b.wake, b.note = func() {}, func() {}
	b.lost = func(r *Record, _ *bus.Error) { b.given = append(b.given, r.ID) }
	return b
}

func (b *box) publish(ids ...string) {
	b.t.Helper()
	for _, id := range ids {
		err := b.put(Record{Topic: "t", ID: id, Payload: []byte("1")}, func(r result) {
			b.tells.Lock()
			defer b.tells.Unlock()
			if _, again := b.told[id]; again {
				b.t.Errorf("%s was told twice", id)
			}
			b.told[id] = r
		})
		if err != nil {
			b.t.Fatal(err)
		}
	}
}

// send gives the ids of what take sends, and how long it wants to wait.
func (b *box) send() (ids []string, wait time.Duration) {
	b.t.Helper()
	out, wait := b.take(nil)
	var dec wire.Decoder
	var m wire.Message
	for len(out) > 0 {
		frame, rest, err := wire.NextFrame(out)
		if err != nil || frame == nil {
			b.t.Fatalf("no frame: %v", err)
		}
		out = rest
		if err := dec.Decode(frame, &m); err != nil || m.Bad != "" || m.Type != wire.TypePublish {
			b.t.Fatal(err, m.Bad)
		}
		ids = append(ids, string(m.ID))
	}
	return ids, wait
}

func (b *box) wantSent(want ...string) {
	b.t.Helper()
	if got, _ := b.send(); !slices.Equal(got, want) {
		b.t.Fatalf("sent %q, want %q", got, want)
	}
}

func (b *box) ok(id string, seq uint64) {
	b.t.Helper()
	if err := b.answer(&wire.Message{Status: []byte("ok"), ID: []byte(id), Seq: seq}); err != nil {
		b.t.Fatal(err)
	}
}

func (b *box) refuse(id string, code bus.Code, retry time.Duration) {
	b.t.Helper()
	m := &wire.Message{Status: []byte("error"), ID: []byte(id), Code: []byte(code), Reason: []byte("because"), RetryAfterMS: retry.Milliseconds()}
	if err := b.answer(m); err != nil {
		b.t.Fatal(err)
	}
}

func TestOutboxKeepsOrderAndTellsSeq(t *testing.T) {
	b := newBox(t, 1<<20)
	b.publish("away")
	if r := b.told["away"]; !r.queued {
		t.Errorf("without a session a publisher was told %+v", r)
	}
	b.wantSent()
	b.begin()
	b.publish("b", "c")
	b.wantSent("away", "b", "c")
	b.wantSent()
	b.ok("away", 7)
	b.ok("b", 8)
	b.refuse("c", bus.CodeForbidden, 0)
	if r := b.told["b"]; r.seq != 8 || r.err != nil {
		t.Errorf("b was told %+v", r)
	}
	if r := b.told["c"]; r.err == nil || r.err.Code != bus.CodeForbidden {
		t.Errorf("c was told %+v", r)
	}
	if c := b.counts(); c.records != 0 || c.bytes != 0 || c.published != 2 {
		t.Errorf("counts %+v", c)
	}
}

func TestOutboxTellsOfLossWhenNobodyWaits(t *testing.T) {
	b := newBox(t, 1<<20)
	b.publish("kept")
	b.begin()
	b.wantSent("kept")
	b.refuse("kept", bus.CodeForbidden, 0)
	if !slices.Equal(b.given, []string{"kept"}) {
		t.Errorf("told of the loss of %q", b.given)
	}
}

func TestOutboxResendsAfterASessionBroke(t *testing.T) {
	b := newBox(t, 1<<20)
	b.begin()
	b.publish("a", "b", "c", "d")
	b.wantSent("a", "b", "c", "d")
	b.ok("a", 1)
	b.refuse("b", bus.CodeRateLimited, time.Hour)
	b.ok("c", 2)
	b.end()
	for _, id := range []string{"b", "d"} {
		if !b.told[id].queued {
			t.Errorf("%s was told %+v", id, b.told[id])
		}
	}
	b.begin()
	b.publish("e")
	b.wantSent("b") // one by one, since it was refused; no wait is left from the other session
	b.ok("b", 3)
	b.wantSent("d", "e") // the window is 2 by now
	b.ok("d", 4)
	b.ok("e", 5)
	if c := b.counts(); c.records != 0 {
		t.Errorf("%d records are left", c.records)
	}
}

// What was accepted ahead of an older record is passed over on the next session, and
// nothing else.
func TestOutboxResendsOnlyWhatIsNotSettled(t *testing.T) {
	b := newBox(t, 1<<20)
	b.begin()
	b.publish("a", "b", "c", "d", "e")
	b.wantSent("a", "b", "c", "d", "e")
	b.refuse("a", bus.CodeStorageFull, time.Hour)
	b.ok("b", 1)
	b.refuse("c", bus.CodeStorageFull, time.Hour)
	b.ok("d", 2)
	b.end()
	b.begin()
	b.wantSent("a")
	b.ok("a", 3)
	b.wantSent("c", "e")
	b.ok("c", 4)
	b.ok("e", 5)
	if c := b.counts(); c.records != 0 || len(b.front) != 0 {
		t.Errorf("%d records are left, %d in front", c.records, len(b.front))
	}
}

func TestOutboxGoesOneByOneAfterARefusalForNow(t *testing.T) {
	for _, code := range []bus.Code{bus.CodeRateLimited, bus.CodeStorageFull, bus.CodeStorageStalled, bus.CodeShuttingDown} {
		t.Run(string(code), func(t *testing.T) {
			bubble.Test(t, func(t *testing.T) {
				b := newBox(t, 1<<20)
				b.begin()
				b.publish("a", "b", "c", "d")
				b.wantSent("a", "b", "c", "d")
				b.publish("e", "f")
				b.ok("a", 1)
				b.refuse("b", code, 100*time.Millisecond)
				b.wantSent() // c and d are still on their way
				b.ok("c", 2)
				b.refuse("d", code, 300*time.Millisecond)
				if ids, wait := b.send(); len(ids) > 0 || wait != 300*time.Millisecond {
					t.Fatalf("sent %q, waits %v", ids, wait)
				}
				time.Sleep(300 * time.Millisecond)
				b.wantSent("b")
				b.refuse("b", code, 50*time.Millisecond)
				if ids, wait := b.send(); len(ids) > 0 || wait != 50*time.Millisecond {
					t.Fatalf("sent %q, waits %v", ids, wait)
				}
				time.Sleep(50 * time.Millisecond)
				b.wantSent("b")
				b.ok("b", 3)
				b.wantSent("d")
				b.ok("d", 4)
				b.wantSent("e", "f") // the window is 2 by now
				if c := b.counts(); code == bus.CodeRateLimited && c.limited != 3 {
					t.Errorf("%d refusals for the rate were counted", c.limited)
				}
			})
		})
	}
}

func TestOutboxWindow(t *testing.T) {
	b := newBox(t, 64<<20)
	b.begin()
	for i := range 2 * windowRecords {
		b.publish(fmt.Sprint(i))
	}
	sent := 0
	for ids, _ := b.send(); len(ids) > 0; ids, _ = b.send() {
		sent += len(ids)
	}
	if sent != windowRecords {
		t.Errorf("%d records were sent ahead", sent)
	}
	b.ok("0", 1)
	b.wantSent(fmt.Sprint(windowRecords))

	big := newBox(t, 64<<20)
	big.begin()
	payload := []byte(`"` + strings.Repeat("x", 60_000) + `"`)
	for range 20 {
		if err := big.put(Record{Topic: "t", ID: "i", Payload: payload}, func(result) {}); err != nil {
			t.Fatal(err)
		}
	}
	sent = 0
	for ids, _ := big.send(); len(ids) > 0; ids, _ = big.send() {
		sent += len(ids)
	}
	if sent*len(payload) > windowBytes+len(payload) || sent < 2 {
		t.Errorf("%d records of %d bytes were sent ahead", sent, len(payload))
	}
}

func TestOutboxRejectsAcksThatFitNothing(t *testing.T) {
	b := newBox(t, 1<<20)
	b.begin()
	if err := b.answer(&wire.Message{Status: []byte("ok"), ID: []byte("x")}); err == nil {
		t.Error("an ack for nothing was taken")
	}
	b.publish("a", "b")
	b.wantSent("a", "b")
	if err := b.answer(&wire.Message{Status: []byte("ok"), ID: []byte("b")}); err == nil {
		t.Error("an ack out of order was taken")
	}
	if len(b.told) != 0 {
		t.Errorf("told %v", b.told)
	}
}

func TestOutboxFull(t *testing.T) {
	b := newBox(t, 3*(recordOverhead+3))
	b.publish("a", "b", "c")
	err := b.put(Record{Topic: "t", ID: "d", Payload: []byte("1")}, func(result) { t.Error("a refused record was told of") })
	if r := refusalOf(err); r.Code != bus.CodeStorageFull || r.RetryAfter != retryAway {
		t.Errorf("got %+v", r)
	}
	b.begin()
	b.wantSent("a", "b", "c")
	err = b.put(Record{Topic: "t", ID: "d", Payload: []byte("1")}, func(result) { t.Error("a refused record was told of") })
	if r := refusalOf(err); r.Code != bus.CodeStorageFull || r.RetryAfter != retryConnected {
		t.Errorf("got %+v", r)
	}
	b.ok("a", 1)
	b.publish("e")
}

func TestOutboxCloseAndAbandon(t *testing.T) {
	b := newBox(t, 1<<20)
	b.begin()
	b.publish("a", "b")
	b.wantSent("a", "b")
	empty := b.close()
	if err := b.put(Record{Topic: "t", ID: "c"}, func(result) {}); refusalOf(err).Code != bus.CodeShuttingDown {
		t.Errorf("a stopping outbox said %v", err)
	}
	b.ok("a", 1)
	select {
	case <-empty:
		t.Fatal("said to be empty with a record left")
	default:
	}
	if lost := b.abandon(); lost != 1 {
		t.Errorf("%d records are lost", lost)
	}
	if r := b.told["b"]; r.err == nil || r.err.Code != bus.CodeShuttingDown {
		t.Errorf("b was told %+v", r)
	}
	b.ok("b", 2)
	<-empty
}

// The limits hold, and the bytes add up, whatever is settled in which order.
func TestOutboxCounts(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	const limit = 40 * (recordOverhead + 10)
	b := newBox(t, limit)
	b.begin()
	var model []*spooled
	for range 20_000 {
		if rng.IntN(2) == 0 {
			r := Record{Topic: "t", ID: fmt.Sprint(rng.IntN(1000)), Payload: make([]byte, rng.IntN(20))}
			_, bytes := b.size()
			err := b.put(r, func(result) {})
			if fits := bytes+cost(&r) <= limit; fits != (err == nil) {
				t.Fatalf("with %d bytes: %v", bytes, err)
			}
			if err == nil {
				model = append(model, b.front[len(b.front)-1])
			}
		} else if len(model) > 0 {
			b.settle(model[rng.IntN(len(model))].pos, result{})()
			for len(model) > 0 && model[0].settled {
				model = model[1:]
			}
		}
		var want int64
		for _, it := range model {
			want += it.cost
		}
		if n, bytes := b.size(); n != len(model) || bytes != want {
			t.Fatalf("%d records of %d bytes, want %d of %d", n, bytes, len(model), want)
		}
	}
	for _, it := range model {
		b.settle(it.pos, result{})()
	}
	if n, bytes := b.size(); n != 0 || bytes != 0 || b.front != nil {
		t.Errorf("empty, it counts %d records of %d bytes", n, bytes)
	}
}

func TestOutboxCountsRecords(t *testing.T) {
	b := newBox(t, 1<<40)
	for i := range maxUnacknowledged {
		if err := b.put(Record{ID: fmt.Sprint(i)}, func(result) {}); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.put(Record{}, func(result) {}); refusalOf(err).Code != bus.CodeStorageFull {
		t.Errorf("one more than the host remembers: %v", err)
	}
}
