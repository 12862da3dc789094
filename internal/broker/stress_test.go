package broker

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
)

// stressed is a publisher of TestStress and what it was told. It sends each message once.
type stressed struct {
	*guest
	vm      string
	hears   string // what it is subscribed to, if anything
	sent    int
	answers map[int]string // what became of a message: "ok", or a code
	seqs    map[int]uint64 // of those that were stored
	heard   []uint64
	stored  *atomic.Int64 // of all publishers: at least so many
}

type stressFrame struct {
	Type, Ack, Status, Code, ID string
	Seq                         uint64
}

func (p *stressed) subscribe(topic string) {
	p.hears = topic
	p.send(`{"type":"subscribe","topic":"` + topic + `"}`)
	p.expect(`{"ack":"subscribe","status":"ok"}`)
}

// burst sends messages, between heartbeats, and reads until the last is answered.
func (p *stressed) burst(t *testing.T, n int, topic, payload string) {
	var frames, want []string
	for range n {
		p.sent++
		frames = append(frames, fmt.Sprintf(`{"type":"publish","topic":"%s","id":"%d","payload":"%s"}`, topic, p.sent, payload), `{"type":"heartbeat"}`)
		want = append(want, fmt.Sprint(p.sent), "")
	}
	p.send(frames...)
	for _, id := range want {
		f := p.nextAnswer(t)
		switch {
		case f.ID != id || (id == "") != (f.Ack == "heartbeat"):
			t.Errorf("%s: %+v in place of the answer to %q", p.vm, f, id)
			return
		case id == "":
			continue
		case f.Status == "ok":
			f.Code = "ok"
		}
		var k int
		if _, err := fmt.Sscan(id, &k); err != nil {
			t.Error(err)
		}
		if p.answers[k], p.seqs[k] = f.Code, f.Seq; f.Code == "ok" {
			p.stored.Add(1)
		}
	}
}

// nextAnswer gives the next answer, and takes in the deliveries before it.
func (p *stressed) nextAnswer(t *testing.T) (f stressFrame) {
	for {
		got := p.next()
		f = stressFrame{}
		if err := json.Unmarshal([]byte(got), &f); err != nil {
			t.Errorf("%s: %s", p.vm, got)
			return f
		}
		if f.Type != "publish" {
			return f
		}
		p.heard = append(p.heard, f.Seq)
	}
}

// hear takes in a delivery.
func (p *stressed) hear(t *testing.T) {
	var f stressFrame
	if got := p.next(); json.Unmarshal([]byte(got), &f) != nil || f.Type != "publish" {
		t.Errorf("%s: %.200s in place of a delivery", p.vm, got)
	}
	p.heard = append(p.heard, f.Seq)
}

// Publishers that commit and deliver themselves, on a disk that stalls now and then, for
// guests that do not read for a while, superseded and handed over: each frame is answered
// once and in its place, what one publishes keeps its order, what was acknowledged is there
// and what was refused is not, and who hears it hears each record once.
func TestStress(t *testing.T) {
	disk := &stuckFS{FS: eventlog.OS}
	o := testOptions(t, t.TempDir())
	o.FS, o.StallAfter = disk, 10*time.Millisecond
	o.SegmentSize, o.HandshakeRate.Records = 4<<20, 0
	o.UnsentBytes = 64 << 10 // so that who does not read is waited for soon
	o.GuestTopics = guestTopics(t, "shared.>")
	b := start(t, o)
	const publishers, deafs = 5, 2
	var known atomic.Int64
	var pubs []*stressed
	for i := range publishers {
		p := &stressed{vm: fmt.Sprint("p", i), answers: map[int]string{}, seqs: map[int]uint64{}, stored: &known}
		p.guest = connect(t, b.addr, p.vm)
		pubs = append(pubs, p)
		if i%2 == 0 {
			p.subscribe("shared.all")
		}
	}
	var deaf []*stressed
	for i := range deafs {
		d := &stressed{vm: fmt.Sprint("d", i), guest: connect(t, b.addr, fmt.Sprint("d", i))}
		d.subscribe([]string{"shared.>", "shared.all"}[i])
		deaf = append(deaf, d)
	}

	phase := func(length time.Duration) {
		var over atomic.Bool
		var guests, weather sync.WaitGroup
		weather.Go(func() {
			for !over.Load() {
				goOn := disk.stop([]string{"sync", "sync", "fallocate", "read"}[rand.IntN(4)])
				time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
				goOn()
				time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
			}
		})
		end := time.Now().Add(length)
		for i, p := range pubs {
			guests.Go(func() {
				rnd := rand.New(rand.NewPCG(uint64(i), uint64(p.sent)))
				for time.Now().Before(end) && !t.Failed() {
					topic := "shared.one" // which one hears
					if rnd.IntN(4) == 0 {
						topic = "shared.all"
					}
					p.burst(t, 1+rnd.IntN(6), topic, strings.Repeat("x", rnd.IntN(4)*rnd.IntN(10000)))
					if p.hears == "" && rnd.IntN(4) == 0 { // its older session is superseded
						p.guest = connect(t, b.addr, p.vm)
					}
				}
			})
		}
		guests.Go(func() { // it hears everything, with pauses; the other deaf one only at the end
			for d := deaf[0]; time.Now().Before(end) && !t.Failed(); time.Sleep(time.Duration(rand.IntN(40)) * time.Millisecond) {
				for int64(len(d.heard)) < known.Load() && !t.Failed() {
					d.hear(t)
				}
			}
		})
		guests.Wait()
		over.Store(true)
		weather.Wait()
	}
	phase(time.Second)
	b = restart(t, b, publishers+deafs)
	phase(time.Second)
	o = leave(t, b, publishers+deafs)
	o.StallAfter = 0 // whatever the machine's disk is like
	b = start(t, o)
	for _, p := range pubs {
		p.burst(t, 1, "shared.all", "last")
		if p.answers[p.sent] != "ok" {
			t.Errorf("%s: the last message is answered %q", p.vm, p.answers[p.sent])
		}
	}

	// What the log has.
	var out strings.Builder
	if err := b.Tail(t.Context(), bus.TailRequest{All: true, Topics: []string{"shared.>"}}, &out); err != nil {
		t.Fatal(err)
	}
	stored := map[string]map[int]uint64{}
	last := map[string]int{}
	audible := map[string][]uint64{} // by what is subscribed to
	for dec := json.NewDecoder(strings.NewReader(out.String())); ; {
		var r struct {
			Seq       uint64
			VM, Topic string
			ID        int `json:",string"`
		}
		if err := dec.Decode(&r); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if r.ID <= last[r.VM] {
			t.Errorf("%s: message %d is stored behind %d", r.VM, r.ID, last[r.VM])
		}
		if last[r.VM] = r.ID; stored[r.VM] == nil {
			stored[r.VM] = map[int]uint64{}
		}
		stored[r.VM][r.ID] = r.Seq
		audible["shared.>"] = append(audible["shared.>"], r.Seq)
		if r.Topic == "shared.all" {
			audible[r.Topic] = append(audible[r.Topic], r.Seq)
		}
	}
	answers := map[string]int{}
	for _, p := range pubs {
		for k, answer := range p.answers {
			answers[answer]++
			seq := stored[p.vm][k]
			if answer == "ok" && seq != p.seqs[k] || answer != "ok" && answer != "storage-stalled" {
				t.Errorf("%s: message %d is answered %q %d, and stored as %d", p.vm, k, answer, p.seqs[k], seq)
			}
		}
		if len(p.answers) != p.sent {
			t.Errorf("%s: %d of %d messages are answered", p.vm, len(p.answers), p.sent)
		}
	}
	if answers["ok"] == 0 || answers["storage-stalled"] == 0 {
		t.Errorf("all answers are alike: %v", answers)
	}
	for _, g := range append(deaf, pubs...) {
		want := audible[g.hears]
		for len(g.heard) < len(want) && !t.Failed() {
			g.hear(t)
		}
		if fmt.Sprint(g.heard) != fmt.Sprint(want) {
			t.Errorf("%s heard %d records, not the %d that are stored, or not in their order", g.vm, len(g.heard), len(want))
		}
	}
	t.Logf("%d records, answers %v", len(audible["shared.>"]), answers)
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}
