package e2e

import (
	"bytes"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/wire"
)

// A flood is guests that publish as fast as castrad acknowledges, and one that hears
// it all. What it does for a record is little, for it has the same processors.
type flood struct {
	*lab
	load     floodLoad
	acked    atomic.Int64
	heard    atomic.Int64
	stopped  atomic.Bool
	timed    atomic.Bool // acks are
	sending  sync.WaitGroup
	hearing  sync.WaitGroup
	conns    []*wirePeer // the publishers
	waits    []latencies // of each, while timed
	listener *wirePeer
}

// A floodLoad says what is published. Each guest has window records unacknowledged.
type floodLoad struct {
	guests, size, window int
	// total is how many records there are to be; 0: as many as come until the end.
	total int64
	// lasting makes it what castra-guestd would send and hear: every record has an id,
	// and whoever hears them has a cursor, which it moves.
	lasting bool
}

// w2 is what busbench's W2 has: 8 guests with 64 records of 256 bytes outstanding.
var w2 = floodLoad{guests: 8, size: 256, window: 64}

const (
	floodTopic = "bench.flood"
	// floodID has a number of so many digits in each frame, in place.
	floodID = `"id":"0000000000",`
)

// flood begins one.
func (l *lab) flood(load floodLoad) *flood {
	l.Helper()
	f := &flood{lab: l, load: load, conns: make([]*wirePeer, load.guests), waits: make([]latencies, load.guests)}
	f.listener = l.connect("listener")
	cursor := ""
	if load.lasting {
		cursor = `,"cursor":"c"`
	}
	if err := f.listener.send(fmt.Appendf(nil, `{"type":"subscribe","topic":%q%s}`, floodTopic, cursor)); err != nil {
		l.Fatal(err)
	}
	f.hearing.Go(f.listen)
	for i := range f.conns {
		f.conns[i] = l.connect(fmt.Sprintf("pub%d", i))
	}
	for i := range f.conns {
		f.sending.Go(func() { f.publish(f.conns[i], &f.waits[i]) })
	}
	return f
}

// publish keeps the window full until the flood ends.
func (f *flood) publish(p *wirePeer, waits *latencies) {
	id := ""
	if f.load.lasting {
		id = floodID
	}
	body := fmt.Appendf(nil, `{"type":"publish",%s"topic":%q,"payload":%s}`, id, floodTopic, payloadOf(f.load.size, 0, time.Now()))
	frame := wire.AppendFrame(nil, body)
	out := bytes.Repeat(frame, f.load.window)
	digits := bytes.Index(frame, []byte(`"id":"`)) + len(`"id":"`)
	sent := make([]time.Time, f.load.window) // of each record that is outstanding
	var next, acks int
	in := frames{r: p.r, buf: make([]byte, 64<<10)}
	for free := f.load.window; !f.stopped.Load(); {
		now := time.Now()
		for i := range free {
			sent[next%len(sent)] = now
			next++
			if f.load.lasting {
				copy(out[i*len(frame)+digits:], fmt.Appendf(nil, "%010d", next))
			}
		}
		if _, err := p.Write(out[:free*len(frame)]); err != nil {
			f.Error(err)
			return
		}
		free = 0
		err := in.some(func(b []byte) error {
			if !bytes.HasPrefix(b, []byte(`{"type":"ack","ack":"publish","status":"ok"`)) {
				return fmt.Errorf("%s came where an ack was due", b)
			}
			free++
			return nil
		})
		if err != nil {
			f.Error(err)
			return
		}
		if now = time.Now(); f.timed.Load() {
			waits.mu.Lock()
			for i := range free {
				waits.all = append(waits.all, now.Sub(sent[(acks+i)%len(sent)]))
			}
			waits.mu.Unlock()
		}
		acks += free
		if n := f.acked.Add(int64(free)); f.load.total > 0 && n >= f.load.total {
			return
		}
	}
}

// listen hears what is published until its connection is closed.
func (f *flood) listen() {
	in := frames{r: f.listener.r, buf: make([]byte, 256<<10)}
	for {
		n, last := int64(-1), []byte(nil)
		err := in.some(func(b []byte) error { n++; last = b; return nil })
		if err != nil {
			return
		}
		f.heard.Add(n + 1)
		if f.load.lasting && bytes.HasPrefix(last, []byte(`{"type":"publish"`)) {
			_, digits, _ := bytes.Cut(last, []byte(`"seq":`))
			digits, _, _ = bytes.Cut(digits, []byte(","))
			_ = f.listener.send(fmt.Appendf(nil, `{"type":"ack","ack":"publish","subscription":%q,"seq":%s}`, floodTopic, digits))
		}
	}
}

// end stops the flood, or waits for its total.
func (f *flood) end() {
	f.stopped.Store(f.load.total == 0)
	f.sending.Wait()
	_ = f.listener.Close()
	f.hearing.Wait()
	for _, p := range f.conns {
		_ = p.Close()
	}
	if f.Failed() {
		f.FailNow()
	}
}

// A floodRate is what castrad did with a flood.
type floodRate struct {
	perSecond float64 // records acknowledged
	heard     float64 // records a second that the listener got
	p50, p99  float64 // from publish to ack, in µs
	cpu       float64 // castrad's, in s per 100,000 records
	rss       float64 // castrad's, in MiB
}

// measure looks at a flood for so long.
func (f *flood) measure(castrad *exec.Cmd, d time.Duration) floodRate {
	f.Helper()
	profiled := f.profile(filepath.Base(f.dir), d)
	before, acked, heard := f.usageOf(castrad), f.acked.Load(), f.heard.Load()
	f.timed.Store(true)
	time.Sleep(d)
	f.timed.Store(false)
	n := float64(f.acked.Load() - acked)
	heard = f.heard.Load() - heard
	after := f.usageOf(castrad)
	profiled()
	s := after.at.Sub(before.at).Seconds()
	var all latencies
	for i := range f.waits {
		w := &f.waits[i]
		w.mu.Lock()
		all.all = append(all.all, w.all...)
		w.mu.Unlock()
	}
	if n == 0 || len(all.all) == 0 {
		f.Fatal("nothing was acknowledged")
	}
	return floodRate{
		perSecond: n / s, heard: float64(heard) / s, p50: all.quantile(.5), p99: all.quantile(.99),
		cpu: (after.cpu - before.cpu).Seconds() / n * 1e5, rss: float64(after.rss) / 1024,
	}
}

// BenchmarkAckedRate counts the records acknowledged a second, of each size from so
// many guests; one more hears them. Once they have ids, as castra-guestd's have.
func BenchmarkAckedRate(b *testing.B) {
	const outstanding = 256 << 10 // bytes of each guest's at most
	run := func(name string, load floodLoad) {
		b.Run(name, func(b *testing.B) {
			l, castrad := benchLab(b, "")
			f := l.flood(load)
			time.Sleep(time.Second)
			r := f.measure(castrad, 4*time.Second)
			f.end()
			b.ReportMetric(r.perSecond, "acked/s")
			b.ReportMetric(r.perSecond*float64(load.size)/1e6, "payload-MB/s")
			b.ReportMetric(r.heard, "heard/s")
			b.ReportMetric(r.p50/1e3, "ack-p50-ms")
			b.ReportMetric(r.p99/1e3, "ack-p99-ms")
			b.ReportMetric(r.cpu, "cpu-s/100k")
			b.ReportMetric(r.rss, "RSS-MiB")
			b.ReportMetric(0, "ns/op")
		})
	}
	for _, guests := range []int{1, 8, 64, 1000} {
		for _, size := range []int{64, 256, 4 << 10, 32 << 10} {
			run(fmt.Sprintf("publishers=%d/payload=%d", guests, size), floodLoad{guests: guests, size: size, window: min(64, outstanding/size)})
		}
	}
	lasting := w2
	lasting.lasting = true
	run("ids", lasting)
}

// frames takes frames from a connection, as many at once as have come.
type frames struct {
	r          io.Reader
	buf        []byte // room for more than the longest frame
	begin, end int    // what is in it
}

// some waits for at least one whole frame and gives each that is there to take.
func (f *frames) some(take func([]byte) error) error {
	for {
		rest, n := f.buf[f.begin:f.end], 0
		for {
			frame, behind, err := wire.NextFrame(rest)
			if err != nil {
				return err
			}
			if frame == nil {
				break
			}
			if err := take(frame); err != nil {
				return err
			}
			rest = behind
			n++
		}
		f.begin = f.end - len(rest)
		if n > 0 {
			return nil
		}
		f.end = copy(f.buf, rest)
		f.begin = 0
		m, err := f.r.Read(f.buf[f.end:])
		if err != nil {
			return err
		}
		f.end += m
	}
}
