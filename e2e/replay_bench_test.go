package e2e

import (
	"bytes"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// median gives the middle one, the lower of two.
func median(all []float64) float64 {
	all = slices.Sorted(slices.Values(all))
	return all[(len(all)-1)/2]
}

// fromEnv gives the number in a variable, or what holds without it.
func fromEnv(b *testing.B, name string, otherwise float64) float64 {
	b.Helper()
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	n, err := strconv.ParseFloat(s, 64)
	if err != nil || n <= 0 {
		b.Fatalf("%s is %q, and must be a number above 0", name, s)
	}
	return n
}

// ownTime is the processor's time that this process has taken.
func ownTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// coldLog makes the kernel forget what it has in memory of the files in the lab's log,
// once they are written: dirty pages stay.
func (l *lab) coldLog() {
	l.Helper()
	syscall.Sync()
	dir, err := filepath.EvalSymlinks(l.path("log"))
	if os.IsNotExist(err) {
		return
	}
	if err != nil {
		l.Fatal(err)
	}
	err = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".jsonl") {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	})
	if err != nil {
		l.Fatal(err)
	}
}

// subscribe makes p hear what there is of a flood from the beginning on.
func (p *wirePeer) subscribe() error {
	return p.send([]byte(`{"type":"subscribe","topic":"` + floodTopic + `","from":"start"}`))
}

// hear reads n deliveries, none of which may be anything else, and tells after each how many
// there were.
func (p *wirePeer) hear(in *frames, n int, each func(heard int)) error {
	const delivery = `{"type":"publish"`
	for heard := 0; heard < n; {
		err := in.some(func(b []byte) error {
			if string(b[:min(len(b), len(delivery))]) == delivery {
				heard++
				each(heard)
			} else if !strings.HasPrefix(string(b), `{"type":"ack","ack":"subscribe","status":"ok"`) {
				return fmt.Errorf("%s came where a delivery was due", b)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// BenchmarkReplayToOne has one guest hear a million records of 256 bytes from the first
// on (CASTRA_BENCH_RECORDS: another number), with all of them in the page cache and
// with none, five times each.
func BenchmarkReplayToOne(b *testing.B) {
	l, castrad := benchLab(b, "")
	records := int(fromEnv(b, "CASTRA_BENCH_RECORDS", million))
	l.flood(floodLoad{guests: 8, size: 256, window: 64, total: int64(records)}).end()
	for _, cold := range []bool{false, true} {
		name := "memory"
		if cold {
			name = "disk"
		}
		b.Run(name, func(b *testing.B) {
			l := &lab{TB: b, dir: l.dir, port: l.port}
			var rates, server, client []float64
			for i := range 5 {
				if cold {
					l.coldLog()
				}
				p := l.connect("replayer")
				in := &frames{r: p.r, buf: make([]byte, 1<<20)}
				before, own := l.usageOf(castrad), ownTime(b)
				done := l.profile(strconv.Itoa(i), time.Second)
				err := p.subscribe()
				if err == nil {
					err = p.hear(in, records, func(int) {})
				}
				if err != nil {
					b.Fatal(err)
				}
				after := l.usageOf(castrad)
				done()
				rates = append(rates, float64(records)/after.at.Sub(before.at).Seconds())
				server = append(server, (after.cpu-before.cpu).Seconds()*million/float64(records))
				client = append(client, (ownTime(b)-own).Seconds()*million/float64(records))
				_ = p.Close()
			}
			b.ReportMetric(median(rates), "records/s")
			b.ReportMetric(slices.Min(rates), "least-records/s")
			b.ReportMetric(median(server), "castrad-cpu-s/million")
			b.ReportMetric(median(client), "reader-cpu-s/million")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// replayerEnv makes TestReplayer read, in a process of its own: "PORT RECORDS".
const replayerEnv = "CASTRA_REPLAYER"

// replayerSays is after how many records TestReplayer writes a line.
const replayerSays = 10_000

// TestReplayer hears so many records from the first on, again and again, until it is
// killed, and writes a line after each replayerSays of them: it is a part of
// BenchmarkLaggingSubscriber.
func TestReplayer(t *testing.T) {
	args := os.Getenv(replayerEnv)
	if args == "" {
		t.Skip("is the subscriber of BenchmarkLaggingSubscriber")
	}
	l := &lab{TB: t}
	var records int
	if _, err := fmt.Sscan(args, &l.port, &records); err != nil {
		t.Fatal(err)
	}
	p := l.connect("replayer")
	in := &frames{r: p.r, buf: make([]byte, 1<<20)}
	for {
		if err := p.subscribe(); err != nil {
			t.Fatal(err)
		}
		err := p.hear(in, records, func(heard int) {
			if heard%replayerSays == 0 {
				fmt.Println()
			}
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// lines counts those that are written to it.
type lines struct{ n atomic.Int64 }

func (l *lines) Write(b []byte) (int, error) {
	l.n.Add(int64(bytes.Count(b, []byte("\n"))))
	return len(b), nil
}

// beside starts a process that runs beside a measurement and writes to out.
func (l *lab) beside(out io.Writer, env string, argv ...string) (stop func()) {
	l.Helper()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env, cmd.Stdout = append(os.Environ(), env), out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		l.Fatal(err)
	}
	return func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if cmd.ProcessState.Exited() {
			l.Errorf("%v ended by itself: %v", argv, cmd.ProcessState)
		}
	}
}

// BenchmarkLaggingSubscriber has one guest publish a thousand records a second and
// another hear them, as W1 of busbench does, in quiet and beside a third that is behind:
// one that hears a million records (CASTRA_BENCH_RECORDS) at full speed, again and
// again, and one that reads nothing. To compare, nobody at all, and a process that computes
// and has nothing to do with castrad. Quiet and not take turns, many of them: on a virtual
// machine a p99 is made of the moments in which its host does something else.
func BenchmarkLaggingSubscriber(b *testing.B) {
	const rounds, each, rate = 16, 4 * time.Second, 1000
	l, castrad := benchLab(b, "")
	records := int(fromEnv(b, "CASTRA_BENCH_RECORDS", million))
	l.flood(floodLoad{guests: 8, size: 256, window: 64, total: int64(records)}).end()

	var heard latencies
	var timed atomic.Bool
	sub := l.connect("sub")
	if err := sub.send([]byte(`{"type":"subscribe","topic":"bench.latency"}`)); err != nil {
		b.Fatal(err)
	}
	go func() { // ends with the connection
		in := frames{r: sub.r, buf: make([]byte, 256<<10)}
		for in.some(func(f []byte) error {
			if d, ok := taken(f); ok && timed.Load() {
				heard.add(d)
			}
			return nil
		}) == nil {
		}
	}()
	pub := l.connect("pub")
	go func() { // ends with the connection
		in := frames{r: pub.r, buf: make([]byte, 256<<10)}
		for in.some(func([]byte) error { return nil }) == nil {
		}
	}()
	publish := func(d time.Duration) *latencies {
		n := int(d.Seconds() * rate)
		heard.all = nil
		timed.Store(true)
		paced(n, rate, func(i int, at time.Time) {
			if err := pub.send(body(i, at)); err != nil {
				b.Fatal(err)
			}
		})
		l.until("all are heard", func() error {
			if got := heard.len(); got < n {
				return fmt.Errorf("%d are", got)
			}
			return nil
		})
		timed.Store(false)
		return &latencies{all: heard.all}
	}
	for _, c := range []struct {
		name  string
		start func(l *lab, out io.Writer) (stop func())
	}{
		{"replaying", func(l *lab, out io.Writer) func() {
			return l.beside(out, fmt.Sprintf("%s=%d %d", replayerEnv, l.port, records), os.Args[0], "-test.run=^TestReplayer$", "-test.timeout=0")
		}},
		{"reading-nothing", func(l *lab, _ io.Writer) func() {
			p := l.connect("deaf")
			if err := p.subscribe(); err != nil {
				l.Fatal(err)
			}
			return func() { _ = p.Close() }
		}},
		{"nobody", func(*lab, io.Writer) func() { return func() {} }},
		{"not-subscribed", func(l *lab, out io.Writer) func() { return l.beside(out, "", "sh", "-c", "while :; do :; done") }},
	} {
		b.Run(c.name, func(b *testing.B) {
			l := &lab{TB: b, dir: l.dir, port: l.port}
			publish(time.Second)
			var quiet, beside latencies
			var p50s, p99s, replays []float64
			var said lines // by the third, as it hears
			for range rounds {
				q := publish(each)
				stop := c.start(l, &said)
				time.Sleep(500 * time.Millisecond) // until it is in full swing
				done := l.profile("beside", each)
				before, saidBefore := l.usageOf(castrad), said.n.Load()
				s := publish(each)
				after, saidAfter := l.usageOf(castrad), said.n.Load()
				done()
				stop()
				replays = append(replays, float64(saidAfter-saidBefore)*replayerSays/after.at.Sub(before.at).Seconds())
				p50s = append(p50s, s.quantile(.5)/q.quantile(.5))
				p99s = append(p99s, s.quantile(.99)/q.quantile(.99))
				quiet.all, beside.all = append(quiet.all, q.all...), append(beside.all, s.all...)
				b.Logf("p50 %.0f and %.0f µs, p99 %.0f and %.0f; castrad takes %.2f of a core", q.quantile(.5), s.quantile(.5), q.quantile(.99), s.quantile(.99),
					(after.cpu-before.cpu).Seconds()/math.Max(after.at.Sub(before.at).Seconds(), 1))
			}
			if said.n.Load() > 0 {
				b.ReportMetric(median(replays), "replayed/s")
			}
			b.ReportMetric(quiet.quantile(.5), "quiet-p50-µs")
			b.ReportMetric(beside.quantile(.5), "p50-µs")
			b.ReportMetric(quiet.quantile(.99), "quiet-p99-µs")
			b.ReportMetric(beside.quantile(.99), "p99-µs")
			b.ReportMetric(median(p50s), "times-p50")
			b.ReportMetric(median(p99s), "times-p99")
			b.ReportMetric(0, "ns/op")
		})
	}
}
