package guest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/castrabus/castra/internal/bubble"
	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

// lines collects what a tail writes.
type lines struct {
	mu    sync.Mutex
	cond  *sync.Cond
	buf   bytes.Buffer
	block chan struct{} // nil: writes do not wait
}

func newLines() *lines {
	l := &lines{}
	l.cond = sync.NewCond(&l.mu)
	return l
}

func (l *lines) Write(p []byte) (int, error) {
	if l.block != nil {
		<-l.block
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cond.Broadcast()
	return l.buf.Write(p)
}

// record is a tail's line.
type record struct {
	Seq     uint64
	VM      string
	Topic   string
	Payload json.RawMessage
	Type    string
}

func (l *lines) records(t *testing.T) (all []record) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range bytes.Lines(l.buf.Bytes()) {
		var r record
		if err := json.Unmarshal(line, &r); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		all = append(all, r)
	}
	return all
}

func (l *lines) payloads(t *testing.T) (all []string) {
	t.Helper()
	for _, r := range l.records(t) {
		all = append(all, string(r.Payload))
	}
	return all
}

// follow runs a tail in the background. stop ends it and gives what it returned.
func (f *fixture) follow(t *testing.T, req bus.TailRequest, w io.Writer) (stop func() error) {
	t.Helper()
	req.Follow = true
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Tail(ctx, req, w) }()
	stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	t.Cleanup(func() { _ = stop() })
	return stop
}

func TestTailReplays(t *testing.T) {
	h := newRealHost(t)
	f := withRealHost(t, h, "web1")
	var first, middle uint64
	var since time.Time
	for i := range 60 {
		topic := []string{"broadcast", "vm:web1", "vm:web1/cmd", "orders.eu", "vm:web2", "vm:web3/x"}[i%6]
		seq := h.publish(topic, fmt.Sprint(i))
		switch i {
		case 0:
			first = seq
		case 29:
			time.Sleep(2 * time.Millisecond) // a record's time has microseconds
			since = time.Now()
			time.Sleep(2 * time.Millisecond)
		case 30:
			middle = seq
		}
	}
	for range 3 {
		if seq, err := f.Publish(t.Context(), bus.PublishRequest{Topic: "vm:self", Payload: []byte(`"own"`)}); err != nil || seq == 0 {
			t.Fatal(seq, err)
		}
	}
	audible := func(from, to int) (want []string) { // what web1 hears of the sixty
		for i := from; i < to; i++ {
			if i%6 < 4 {
				want = append(want, fmt.Sprint(i))
			}
		}
		return want
	}
	own := []string{`"own"`, `"own"`, `"own"`}
	for name, tt := range map[string]struct {
		req  bus.TailRequest
		want []string
	}{
		"everything":                {bus.TailRequest{All: true}, append(audible(0, 60), own...)},
		"the last over patterns":    {bus.TailRequest{Lines: 5}, []string{`56`, `57`, `"own"`, `"own"`, `"own"`}},
		"more than there are":       {bus.TailRequest{Lines: 1000}, append(audible(0, 60), own...)},
		"the last of one pattern":   {bus.TailRequest{Lines: 2, Topics: []string{"orders.*"}}, []string{"51", "57"}},
		"all of one pattern":        {bus.TailRequest{All: true, Topics: []string{"vm:self/>"}}, []string{"2", "8", "14", "20", "26", "32", "38", "44", "50", "56"}},
		"overlapping patterns":      {bus.TailRequest{Lines: 3, Topics: []string{"orders.eu", "orders.*", ">"}}, []string{"51", "54", "57"}},
		"the same pattern twice":    {bus.TailRequest{Lines: 1, Topics: []string{"orders.eu", "orders.eu"}}, []string{"57"}},
		"from a number":             {bus.TailRequest{From: middle}, append(audible(30, 60), own...)},
		"from the first":            {bus.TailRequest{From: first}, append(audible(0, 60), own...)},
		"from beyond the end":       {bus.TailRequest{From: middle + 1000}, nil},
		"since":                     {bus.TailRequest{Since: since}, append(audible(30, 60), own...)},
		"since later":               {bus.TailRequest{Since: time.Now().Add(time.Hour)}, nil},
		"until":                     {bus.TailRequest{All: true, Until: since}, audible(0, 30)},
		"of one VM":                 {bus.TailRequest{Lines: 4, VM: "web1"}, []string{`56`, `"own"`, `"own"`, `"own"`}},
		"of the host":               {bus.TailRequest{Lines: 2, VM: "host"}, []string{"56", "57"}},
		"topics that nobody used":   {bus.TailRequest{All: true, Topics: []string{"nothing", "nobody.>"}}, nil},
		"one topic nobody used":     {bus.TailRequest{Lines: 10, Topics: []string{"nothing"}}, nil},
		"nothing old, nothing new":  {bus.TailRequest{}, nil},
		"one used, one never":       {bus.TailRequest{Lines: 1, Topics: []string{"nothing", "orders.eu"}}, []string{"57"}},
		"since, on an empty topic":  {bus.TailRequest{Since: since, Topics: []string{"nothing", "orders.eu"}}, []string{"33", "39", "45", "51", "57"}},
		"since, after one's newest": {bus.TailRequest{Since: since, Topics: []string{"vm:self"}}, []string{"31", "37", "43", "49", "55", `"own"`, `"own"`, `"own"`}},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), hang)
			defer cancel()
			got := newLines()
			if err := f.Tail(ctx, tt.req, got); err != nil {
				t.Fatal(err)
			}
			if p := got.payloads(t); !slices.Equal(p, tt.want) {
				t.Errorf("shown %v\nwant  %v", p, tt.want)
			}
		})
	}
	for _, topic := range []string{"vm:web2", "castra.>", "a*"} {
		if err := f.Tail(t.Context(), bus.TailRequest{All: true, Topics: []string{topic}}, io.Discard); refusalOf(err).Code == bus.CodeInternal {
			t.Errorf("%s: %v", topic, err)
		}
	}
	f.until(t, func() bool { return len(f.subs.topics()) == 0 })
}

// TestTailFollows loses sessions and hosts under a tail of several patterns: nothing
// is missing, nothing comes twice, and the order is the log's.
func TestTailFollows(t *testing.T) {
	h := newRealHost(t)
	f := withRealHost(t, h, "web1")
	var want []string
	topics := []string{"broadcast", "vm:web1", "a.b", "vm:web1/x", "a"}
	rng := rand.New(rand.NewPCG(5, 6))
	publish := func(n int) {
		for range n {
			p := fmt.Sprint(len(want))
			want = append(want, p)
			h.publish(topics[rng.IntN(len(topics))], p)
		}
	}
	publish(20)
	got := newLines()
	stop := f.follow(t, bus.TailRequest{Lines: 10}, got)
	caughtUp := func() bool { return len(got.records(t)) >= len(want)-10 }
	f.until(t, caughtUp)
	for range 4 {
		for range 10 {
			publish(1)
			f.until(t, caughtUp)
		}
		_ = h.Close()
		f.until(t, func() bool { return !f.connected() })
		h.open()
		publish(100)
		h.serve()
		f.until(t, caughtUp)
	}
	if err := stop(); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	p := got.payloads(t)
	if !slices.Equal(slices.Sorted(slices.Values(p)), slices.Sorted(slices.Values(want[10:]))) {
		t.Fatalf("shown %v\nwant  %v", p, want[10:])
	}
	if !slices.IsSortedFunc(got.records(t), func(a, b record) int { return int(a.Seq) - int(b.Seq) }) {
		t.Errorf("out of order: %v", p)
	}
}

// Live records that come through different subscriptions are put in order where they
// come close to each other; one that comes later is shown all the same.
func TestTailPutsLiveRecordsInOrder(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := runAgent(t, nil)
		got := newLines()
		tl := &tail{agent: f.Agent, w: got, wake: make(chan struct{}, 1), merge: *testMerge(t, ">", "vm:web1")}
		tl.subs = []*subscription{{}, {}}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- tl.live(ctx) }()
		bring := func(feed int, topic string, seq uint64) {
			if !(feedSink{tl, feed}).deliver(nil, &wire.Message{Seq: seq, Topic: []byte(topic), Payload: []byte("0")}) {
				t.Error("there was no room")
			}
		}
		bring(0, "a", 2)
		time.Sleep(reorderFor - 1)
		if n := len(got.records(t)); n > 0 {
			t.Errorf("%d records were shown before others could come", n)
		}
		bring(1, "vm:web1", 1)
		bring(0, "a", 3)
		time.Sleep(reorderFor)
		bring(0, "a", 5)
		time.Sleep(reorderFor + 1)
		bring(1, "vm:web1", 4)
		time.Sleep(reorderFor)
		synctest.Wait()
		cancel()
		<-done
		var seqs []uint64
		for _, r := range got.records(t) {
			seqs = append(seqs, r.Seq)
		}
		if want := []uint64{1, 2, 3, 5, 4}; !slices.Equal(seqs, want) {
			t.Errorf("shown %v, want %v", seqs, want)
		}
	})
}

// A tail that shows what is new only must not show what is old when it comes back.
func TestTailFollowsNewRecords(t *testing.T) {
	for name, req := range map[string]bus.TailRequest{
		"everything": {}, "one topic": {Topics: []string{"broadcast"}},
		"from a number": {From: 1000}, "from a time": {Since: time.Now().Add(time.Hour)},
	} {
		t.Run(name, func(t *testing.T) {
			h := newRealHost(t)
			f := withRealHost(t, h, "web1")
			h.publish("broadcast", `"old"`)
			old := h.publish("vm:web1", `"old"`)
			if req.From > 0 {
				req.From = old + 1
			}
			if !req.Since.IsZero() {
				time.Sleep(2 * time.Millisecond) // a record's time has microseconds
				req.Since = time.Now()
			}
			got := newLines()
			f.follow(t, req, got)
			f.until(t, func() bool { return len(f.Status(nil).VMs[0].Subscriptions) > 0 })
			// Until the tail has begun, records may still be old ones to it.
			f.until(t, func() bool {
				h.publish("broadcast", `"new"`)
				return len(got.records(t)) > 0
			})
			_ = h.Close()
			f.until(t, func() bool { return !f.connected() })
			h.open()
			h.serve()
			h.publish("broadcast", `"last"`)
			f.until(t, func() bool { return slices.Contains(got.payloads(t), `"last"`) })
			if p := got.payloads(t); slices.Contains(p, `"old"`) {
				t.Errorf("shown %v", p)
			}
		})
	}
}

// A reader that stops reading stalls nobody, and when it goes on it gets everything.
func TestTailSlowReader(t *testing.T) {
	for name, req := range map[string]bus.TailRequest{
		"one pattern":      {All: true, Topics: []string{"big"}},
		"several patterns": {All: true},
	} {
		t.Run(name, func(t *testing.T) {
			h := newRealHost(t)
			f := withRealHost(t, h, "web1")
			h.publish("big", "0")
			got := newLines()
			got.block = make(chan struct{})
			f.follow(t, req, got)
			const n = 200
			text := strings.Repeat("x", 20_000)
			for i := range n {
				h.publish("big", fmt.Sprintf(`"%d %s"`, i, text))
			}
			other := newLines()
			f.follow(t, bus.TailRequest{All: true, Topics: []string{"vm:self"}}, other)
			if _, err := f.Publish(t.Context(), bus.PublishRequest{Topic: "vm:self", Payload: []byte("1")}); err != nil {
				t.Fatal(err)
			}
			f.until(t, func() bool { return len(other.records(t)) == 1 })
			paused := func() (n int) {
				f.subs.mu.Lock()
				defer f.subs.mu.Unlock()
				for _, s := range f.subs.all {
					if s.state == subPaused {
						n++
					}
				}
				return n
			}
			f.until(t, func() bool { return paused() > 0 })
			close(got.block)
			f.until(t, func() bool { return len(got.records(t)) >= n+1 })
			var last uint64
			big := 0
			for _, r := range got.records(t) {
				if r.Seq <= last {
					t.Fatalf("record %d behind %d", r.Seq, last)
				}
				last = r.Seq
				if r.Topic == "big" {
					big++
				}
			}
			if big != n+1 {
				t.Errorf("%d records were shown, want %d", big, n+1)
			}
		})
	}
}

func TestTailWithoutAHost(t *testing.T) {
	h := newRealHost(t)
	f := withRealHost(t, h, "web1")
	_ = h.Close()
	f.until(t, func() bool { return !f.connected() })
	err := f.Tail(t.Context(), bus.TailRequest{All: true}, io.Discard)
	if r := refusalOf(err); r.Code != CodeNotConnected || !strings.Contains(r.Reason, h.addr) {
		t.Errorf("got %v", err)
	}
	got := newLines()
	f.follow(t, bus.TailRequest{All: true}, got)
	h.open()
	h.serve()
	h.publish("broadcast", "1")
	f.until(t, func() bool { return len(got.records(t)) > 0 })
	done := make(chan error, 1)
	go func() { done <- f.Tail(context.Background(), bus.TailRequest{Follow: true}, io.Discard) }()
	f.until(t, func() bool { return len(f.subs.topics()) == 3 })
	f.stop()
	if err := <-done; err != nil {
		t.Errorf("when the agent ended, the tail said %v", err)
	}
}

func TestTailUntil(t *testing.T) {
	h := newRealHost(t)
	f := withRealHost(t, h, "web1")
	h.publish("broadcast", "1")
	got := newLines()
	if err := f.Tail(t.Context(), bus.TailRequest{All: true, Follow: true, Until: time.Now().Add(200 * time.Millisecond)}, got); err != nil {
		t.Fatal(err)
	}
	if p := got.payloads(t); !slices.Equal(p, []string{"1"}) {
		t.Errorf("shown %v", p)
	}
}

func TestTailReaderGone(t *testing.T) {
	h := newRealHost(t)
	f := withRealHost(t, h, "web1")
	h.publish("broadcast", "1")
	r, w := io.Pipe()
	_ = r.Close()
	if err := f.Tail(t.Context(), bus.TailRequest{All: true, Follow: true}, w); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("got %v", err)
	}
}

// The host waits for the ack of a guest that showed the record.
func TestTailAcknowledges(t *testing.T) {
	h := newRealHost(t)
	f := withRealHost(t, h, "web1")
	got := newLines()
	f.follow(t, bus.TailRequest{Topics: []string{"vm:self"}}, got)
	f.until(t, func() bool { return len(f.subs.topics()) > 0 })
	f.until(t, func() bool {
		seq := h.publish("vm:web1", "1")
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		vm, err := h.WaitAck(ctx, seq)
		return err == nil && vm == "web1"
	})
}
