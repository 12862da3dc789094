package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// usage is what a process has taken so far.
type usage struct {
	cpu     time.Duration
	wakeups int // switches that its threads made of their own accord: each is one wake-up
	rss     int // KiB, now
	at      time.Time
}

// usageOf reads it (proc_pid_stat(5), proc_pid_status(5)).
func (l *lab) usageOf(cmd *exec.Cmd) usage {
	l.Helper()
	proc := fmt.Sprintf("/proc/%d/", cmd.Process.Pid)
	stat, err := os.ReadFile(proc + "stat")
	if err != nil {
		l.Fatal(err)
	}
	u := usage{at: time.Now()}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+2:]))
	for _, ticks := range fields[11:13] { // user and system, in 1/100 s
		n, _ := strconv.Atoi(ticks)
		u.cpu += time.Duration(n) * 10 * time.Millisecond
	}
	threads, err := os.ReadDir(proc + "task")
	if err != nil {
		l.Fatal(err)
	}
	for _, t := range threads {
		status, _ := os.ReadFile(proc + "task/" + t.Name() + "/status") // it may have ended
		for line := range strings.Lines(string(status)) {
			key, value, _ := strings.Cut(line, ":")
			n, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(value), " kB"))
			switch key {
			case "voluntary_ctxt_switches":
				u.wakeups += n
			case "VmRSS":
				u.rss = n
			}
		}
	}
	return u
}

// reportIdle reports what cmd takes while nothing happens for d.
func (l *lab) reportIdle(b *testing.B, cmd *exec.Cmd, d time.Duration) {
	l.Helper()
	before := l.usageOf(cmd)
	time.Sleep(d)
	after := l.usageOf(cmd)
	s := after.at.Sub(before.at).Seconds()
	b.ReportMetric(100*(after.cpu-before.cpu).Seconds()/s, "idle-cpu-%")
	b.ReportMetric(float64(after.wakeups-before.wakeups)/s, "idle-wakeups/s")
	b.ReportMetric(float64(after.rss)/1024, "RSS-MiB")
}

// guestsBeat connects so many guests, each subscribed to its own topic, 256 at once,
// and has each send a heartbeat every 25 s, spread over that time, until stop.
func (l *lab) guestsBeat(n int) (took time.Duration, stop func()) {
	l.Helper()
	guests := make([]*wirePeer, n)
	began := time.Now()
	var work sync.WaitGroup
	next := make(chan int) // unbuffered: whoever is free takes one
	for range 256 {
		work.Go(func() {
			for i := range next {
				p, err := dialWire(l.port, fmt.Sprintf("idle%d", i))
				for end := began.Add(time.Minute); err != nil && time.Now().Before(end); p, err = dialWire(l.port, fmt.Sprintf("idle%d", i)) {
					time.Sleep(rand.N(100 * time.Millisecond)) // castrad does not listen yet
				}
				if err == nil {
					guests[i] = p.(*wirePeer)
					err = p.send(fmt.Appendf(nil, `{"type":"subscribe","topic":"bench.idle.%d"}`, i))
				}
				if err == nil {
					_, err = p.receive()
				}
				if err != nil {
					l.Errorf("guest %d: %v", i, err)
				}
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	work.Wait()
	took = time.Since(began)
	if l.Failed() {
		l.FailNow()
	}
	var ended atomic.Bool
	var beats sync.WaitGroup
	beats.Go(func() {
		for i := 0; !ended.Load(); i = (i + 1) % n {
			_ = guests[i].send([]byte(`{"type":"heartbeat"}`)) // the answers stay in the socket's buffer
			time.Sleep(25 * time.Second / time.Duration(n))
		}
	})
	return took, func() {
		ended.Store(true)
		beats.Wait()
		for _, g := range guests {
			_ = g.Close()
		}
	}
}

// BenchmarkIdleGuests connects guests that do nothing but beat, kills castrad with all
// of them connected, and starts it again. CASTRA_BENCH_GUESTS is how many; both this
// process and castrad take a descriptor for each (ulimit -n), castrad half of its own.
func BenchmarkIdleGuests(b *testing.B) {
	n := int(fromEnv(b, "CASTRA_BENCH_GUESTS", 10_000))
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil || limit.Cur < uint64(2*n) {
		b.Skipf("%d guests need %d descriptors, there may be %d: ulimit -n", n, 2*n, limit.Cur)
	}
	l, castrad := benchLab(b, "")
	empty := l.usageOf(castrad)
	took, stop := l.guestsBeat(n)
	time.Sleep(30 * time.Second) // sessions go idle, memory that connecting took is given back
	l.reportIdle(b, castrad, time.Minute)
	b.ReportMetric(float64(l.usageOf(castrad).rss-empty.rss)/float64(n), "KiB/guest")
	b.ReportMetric(took.Seconds(), "connected-s")
	l.heapProfile()
	_ = castrad.Process.Kill()
	_ = castrad.Wait()
	stop()
	l.startCastrad("castrad-again")
	took, stop = l.guestsBeat(n)
	stop()
	b.ReportMetric(took.Seconds(), "back-s")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkUsualHost has fifty guests publish ten events a second each while another
// process keeps the disk busy, and measures from a publish to the line that castractl
// writes to a terminal; then what castrad takes while the fifty do nothing.
func BenchmarkUsualHost(b *testing.B) {
	const guests, each, d = 50, 100 * time.Millisecond, 20 * time.Second
	l := newLab(b)
	l.loadedConfig("")
	castrad := l.startCastrad("castrad")
	l.answers()
	_, stop := l.guestsBeat(guests)
	time.Sleep(5 * time.Second)
	l.reportIdle(b, castrad, 30*time.Second)
	stop()

	disk := exec.Command("sh", "-c", `while dd if=/dev/zero of="$0" bs=1M count=64 conv=fsync 2>/dev/null; do :; done`, l.path("busy"))
	disk.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := disk.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() { _ = syscall.Kill(-disk.Process.Pid, syscall.SIGKILL); _ = disk.Wait() }()
	var acks, terminal latencies
	tail, lines := l.following("--topic", "bench.latency", "-n", "0")
	var work sync.WaitGroup
	work.Go(func() {
		for lines.Scan() {
			if took, ok := taken(lines.Bytes()); ok {
				terminal.add(took)
			}
		}
	})
	before := l.usageOf(castrad)
	var publishing sync.WaitGroup
	for g := range guests {
		publishing.Go(func() {
			p, err := dialWire(l.port, fmt.Sprintf("pub%d", g))
			if err != nil {
				b.Error(err)
				return
			}
			defer p.Close()
			start := time.Now().Add(rand.N(each))
			for i := range int(d / each) {
				due := start.Add(time.Duration(i) * each)
				time.Sleep(time.Until(due))
				if err = p.send(body(i, due)); err == nil {
					_, err = p.receive()
				}
				if err != nil {
					b.Error(err)
					return
				}
				acks.add(time.Since(due))
			}
		})
	}
	publishing.Wait()
	after := l.usageOf(castrad)
	l.until("all that was acknowledged is printed", func() error {
		if terminal.len() < acks.len()*9/10 { // the tail may have come later than the first
			return fmt.Errorf("%d of %d are", terminal.len(), acks.len())
		}
		return nil
	})
	_ = tail.Process.Kill()
	work.Wait()
	_ = tail.Wait()
	acks.report(b, "ack")
	terminal.report(b, "terminal")
	b.ReportMetric(100*(after.cpu-before.cpu).Seconds()/after.at.Sub(before.at).Seconds(), "busy-cpu-%")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkIdleGuestd has a castra-guestd that hears two topics for programs beside it,
// serves its socket and D-Bus, and has nothing to do but beat.
func BenchmarkIdleGuestd(b *testing.B) {
	l, _ := benchLab(b, "")
	guestd := l.guestIn("idle", "")
	l.castractl("wait", "idle")
	l.tailInGuest("idle", "broadcast")
	l.castractl("wait", "idle", "--for", "subscribed")
	time.Sleep(5 * time.Second)
	l.reportIdle(b, guestd, time.Minute)
	b.ReportMetric(0, "ns/op")
}
