package e2e

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// keptLogs is the variable that names a directory where logs that take minutes to make
// are left for the next run; what it adds to them stays in them.
const keptLogs = "CASTRA_BENCH_LOGS"

// A past is what castrad has behind it when it is measured.
type past struct {
	name  string
	store string // what its [store] is to say
	// small, if it says something, is the [store] of a third castrad, as empty as the second
	// and so soon at its limits that it removes as much as it writes when it is measured, as the
	// one with the past does: what is left of the difference comes of the past.
	small string
	// register, if there is one, defines VMs: names that nobody has registered have to
	// share what is kept, and with thousands of them each would have little.
	register func(l *lab)
	// make has a castrad, which does not sync, take it in.
	make func(l *lab)
	// again, if there is one, makes a castrad that has just been started know of it.
	again func(l *lab)
}

// BenchmarkNoGrowth compares a castrad that has much behind it with an empty one, by
// turns: what it acknowledges of W2's load, and how long it takes to start, with
// nothing of its log in the page cache.
func BenchmarkNoGrowth(b *testing.B) {
	gib := fromEnv(b, "CASTRA_BENCH_GIB", 1)
	hours := fromEnv(b, "CASTRA_BENCH_HOURS", .25)
	streams := int(fromEnv(b, "CASTRA_BENCH_STREAMS", 10_000))
	// No side of the first two reaches a limit in its turns: what removing costs the day shows.
	const unlimited = `host_retention_size = "1TiB"`
	for _, p := range []past{
		{
			name: fmt.Sprintf("%gGiB", gib), store: unlimited,
			make: func(l *lab) {
				const size = 4 << 10
				l.flood(floodLoad{guests: 8, size: size, window: 64, total: int64(gib * (1 << 30) / size)}).end()
			},
		},
		{
			name: fmt.Sprintf("%d-streams", streams), store: unlimited,
			register: func(l *lab) {
				l.manyVMs(streams)
				for i := range w2.guests {
					l.write(fmt.Sprintf("vms.d/pub%d.toml", i), "no_key = true\n")
				}
			},
			make:  func(l *lab) { l.publishOnce(streams, "1") },
			again: func(l *lab) { l.publishOnce(streams, "2") },
		},
		{
			name: fmt.Sprintf("%gh-of-50-VMs", hours), small: `host_retention_size = "256MiB"`,
			make: func(l *lab) {
				// With more outstanding they would come faster than the copies to the VMs'
				// streams, and be refused until those have caught up.
				l.flood(floodLoad{guests: 50, size: 256, window: 8, lasting: true, total: int64(hours * 3600 * 50 * 10)}).end()
			},
		},
	} {
		b.Run(p.name, func(b *testing.B) { p.measure(b) })
	}
}

// A side is a castrad that BenchmarkNoGrowth measures, and what it got, a figure a turn.
type side struct {
	*lab
	name    string
	castrad *exec.Cmd
	settle  time.Duration // from the load's beginning to the measurement's

	starts, rates, cpu, p99 []float64 // ms, records a second, s per 100,000 records, ms
	rss                     float64   // MiB, in its last turn
}

// begin starts it, and takes the time.
func (s *side) begin() {
	castrad, took := s.timedStart(fmt.Sprint("castrad", len(s.starts)))
	s.castrad, s.starts = castrad, append(s.starts, took.Seconds()*1e3)
}

// turn measures it under load for d.
func (s *side) turn(d time.Duration) {
	s.coldLog() // what was written or removed before is not to be written beside it
	f := s.flood(w2)
	time.Sleep(s.settle)
	r := f.measure(s.castrad, d)
	f.end()
	s.rates, s.cpu, s.p99, s.rss = append(s.rates, r.perSecond), append(s.cpu, r.cpu), append(s.p99, r.p99/1e3), r.rss
}

// anew is turn for one that is begun with nothing each time.
func (s *side) anew(d time.Duration) {
	s.begin()
	s.turn(d)
	s.stop("castrad", s.castrad)
	for _, dir := range []string{"log", "state"} {
		if err := os.RemoveAll(s.path(dir)); err != nil {
			s.Fatal(err)
		}
	}
}

// times gives, turn by turn, how many times another's figures those of all are.
func times(all, others []float64) []float64 {
	ratios := make([]float64, len(all))
	for i := range all {
		ratios[i] = all[i] / others[i]
	}
	return ratios
}

func (p *past) measure(b *testing.B) {
	const rounds, starts, d = 12, 3, 5 * time.Second
	full := &side{lab: newLab(b), name: "full", settle: time.Second}
	kept := p.keep(b, full.lab)
	if p.register != nil {
		p.register(full.lab)
	}
	full.loadedConfig(p.store + "\nsync = \"never\"")
	if !kept {
		full.castrad = full.startCastrad("castrad-before")
		full.answers()
		began := time.Now()
		p.make(full.lab)
		full.stop("castrad-before", full.castrad)
		b.Logf("made in %v", time.Since(began).Round(time.Second))
	}
	full.writeLoaded(p.store)
	size, files := full.logSize()
	for i := range starts {
		if i > 0 {
			full.stop("castrad", full.castrad)
		}
		full.coldLog()
		full.begin()
	}
	if p.again != nil {
		p.again(full.lab)
	}

	sides := []*side{full, {lab: newLab(b), name: "empty", settle: time.Second}}
	sides[1].loadedConfig(p.store)
	if p.small != "" {
		sides = append(sides, &side{lab: newLab(b), name: "small", settle: d})
		sides[2].loadedConfig(p.small)
	}
	turns := []func(){func() { full.turn(d) }}
	for _, s := range sides[1:] {
		turns = append(turns, func() { s.anew(d) })
	}
	for i := range rounds {
		for _, turn := range turns {
			turn()
		}
		// What a turn leaves the disk to do is not always to be the same one's burden.
		slices.Reverse(turns)
		if i%2 == 1 {
			turns = append(turns[1:], turns[0])
		}
		for _, s := range sides {
			b.Logf("%s %.0f/s, %.2f s per 100,000, ack p99 %.1f ms", s.name, s.rates[i], s.cpu[i], s.p99[i])
		}
	}
	full.castractl("bus", "tail", "-n", "1", "--no-follow")
	for _, s := range sides {
		b.ReportMetric(median(s.starts), s.name+"-start-ms")
		b.ReportMetric(median(s.rates), s.name+"-acked/s")
		b.ReportMetric(median(s.cpu), s.name+"-cpu-s/100k")
		b.ReportMetric(median(s.p99), s.name+"-ack-p99-ms")
		if s != full {
			b.ReportMetric(median(times(full.rates, s.rates)), "times-"+s.name+"-acked")
			b.ReportMetric(median(times(full.cpu, s.cpu)), "times-"+s.name+"-cpu")
		}
	}
	b.ReportMetric(full.rss, "RSS-MiB")
	b.ReportMetric(float64(size)/(1<<30), "log-GiB")
	b.ReportMetric(float64(files), "log-files")
	b.ReportMetric(0, "ns/op")
}

// keep has l's log and state in the directory for kept ones, if there is one, and tells
// whether they are there already.
func (p *past) keep(b *testing.B, l *lab) (there bool) {
	b.Helper()
	dir := os.Getenv(keptLogs)
	if dir == "" {
		return false
	}
	dir, err := filepath.Abs(filepath.Join(dir, p.name))
	if err != nil {
		b.Fatal(err)
	}
	_, err = os.Stat(dir)
	for _, name := range []string{"log", "state"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			b.Fatal(err)
		}
		if err := os.Symlink(filepath.Join(dir, name), l.path(name)); err != nil {
			b.Fatal(err)
		}
	}
	return err == nil
}

// logSize gives the bytes in the lab's log and the number of its files.
func (l *lab) logSize() (bytes int64, files int) {
	l.Helper()
	dir, err := filepath.EvalSymlinks(l.path("log"))
	if err == nil {
		err = filepath.WalkDir(dir, func(_ string, d os.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			st, err := d.Info()
			if err == nil {
				bytes, files = bytes+st.Size(), files+1
			}
			return err
		})
	}
	if err != nil {
		l.Fatal(err)
	}
	return bytes, files
}

// timedStart starts castrad and gives how long it took to tell the service manager that
// it is ready, by when it listens.
func (l *lab) timedStart(name string) (castrad *exec.Cmd, took time.Duration) {
	l.Helper()
	_ = os.Remove(l.path("notify"))
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: l.path("notify")})
	if err != nil {
		l.Fatal(err)
	}
	defer manager.Close()
	l.Setenv("NOTIFY_SOCKET", l.path("notify"))
	defer os.Unsetenv("NOTIFY_SOCKET")
	began := time.Now()
	castrad = l.profiledCastrad(name)
	_ = manager.SetReadDeadline(began.Add(10 * time.Minute)) // it copies what a castrad before was killed over
	for buf := make([]byte, 4096); ; {
		n, err := manager.Read(buf)
		if err != nil {
			l.Fatal(err)
		}
		if bytes.Contains(buf[:n], []byte("READY=1")) {
			break
		}
	}
	took = time.Since(began)
	l.connect("first") // or it would not serve
	return castrad, took
}

// atOnce is how many VMs publishOnce has publish at a time.
const atOnce = 64

// publishOnce has so many VMs connect, publish a record with that id and leave.
func (l *lab) publishOnce(vms int, id string) {
	l.Helper()
	var next atomic.Int64
	var work sync.WaitGroup
	for range atOnce {
		work.Go(func() {
			for n := int(next.Add(1)); n <= vms && !l.Failed(); n = int(next.Add(1)) {
				var answer []byte
				p, err := dialWire(l.port, fmt.Sprintf("vm%d", n))
				if err == nil {
					if err = p.send(fmt.Appendf(nil, `{"type":"publish","topic":"bench.once","id":%q,"payload":{"n":%d}}`, id, n)); err == nil {
						answer, err = p.receive()
					}
					_ = p.Close()
				}
				if err != nil || !strings.Contains(string(answer), `"status":"ok"`) {
					l.Errorf("vm%d: %s, %v", n, answer, err)
				}
			}
		})
	}
	work.Wait()
	if l.Failed() {
		l.FailNow()
	}
}
