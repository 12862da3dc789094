package e2e

import (
	"bytes"
	"fmt"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// benchLab is a lab whose castrad lets any guest publish any amount; store is what
// else its [store] is to say.
func benchLab(b *testing.B, store string) (*lab, *exec.Cmd) {
	l := newLab(b)
	l.loadedConfig(store)
	castrad := l.profiledCastrad("castrad")
	l.answers()
	return l, castrad
}

// body is a publish frame with a payload of 256 bytes that says when it was sent.
func body(n int, at time.Time) []byte {
	return append(append([]byte(`{"type":"publish","topic":"bench.latency","payload":`), payloadOf(256, n, at)...), '}')
}

// payloadOf is a payload of so many bytes, at least 64, that says when it was sent, or due.
func payloadOf(size, n int, at time.Time) []byte {
	payload := fmt.Appendf(nil, `{"t":%d,"n":%d,"pad":"`, at.UnixNano(), n)
	payload = append(payload, bytes.Repeat([]byte("x"), size-2-len(payload))...)
	return append(payload, `"}`...)
}

// taken gives how long ago that was, of the record in line.
func taken(line []byte) (time.Duration, bool) {
	i := bytes.Index(line, []byte(`"payload":{"t":`))
	if i < 0 {
		return 0, false
	}
	digits := line[i+len(`"payload":{"t":`):]
	at, err := strconv.ParseInt(string(digits[:bytes.IndexByte(digits, ',')]), 10, 64)
	return time.Since(time.Unix(0, at)), err == nil
}

// latencies gathers durations of one kind.
type latencies struct {
	mu  sync.Mutex
	all []time.Duration
}

func (l *latencies) add(d time.Duration) {
	l.mu.Lock()
	l.all = append(l.all, d)
	l.mu.Unlock()
}

func (l *latencies) len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.all)
}

func (l *latencies) report(b *testing.B, what string) {
	for _, q := range []struct {
		name string
		at   float64
	}{{"p50", .5}, {"p99", .99}, {"p99.9", .999}} {
		b.ReportMetric(l.quantile(q.at), what+"-"+q.name+"-µs")
	}
}

// quantile gives the one at q of 0 to 1, in µs.
func (l *latencies) quantile(q float64) float64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	slices.Sort(l.all)
	return us(l.all, q)
}

// paced has n records sent, rate a second, on a schedule that waits for nobody. It tells
// when each is held to have been sent: now, or, where the caller comes more than a
// millisecond late, when it was due, or what keeps it from being sent would be left out. It
// sleeps by nanosleep(2) on a thread of its own, since the runtime's timers are a
// millisecond late at times, several times what castrad takes.
func paced(n, rate int, send func(i int, at time.Time)) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	start := time.Now()
	for i := range n {
		due := start.Add(time.Duration(i) * time.Second / time.Duration(rate))
		if left := time.Until(due); left > 0 {
			ts := unix.NsecToTimespec(int64(left))
			_ = unix.Nanosleep(&ts, nil) // interrupted: early by less than a period
		}
		at := time.Now()
		if at.Sub(due) > time.Millisecond {
			at = due
		}
		send(i, at)
	}
}

// BenchmarkLatency publishes 1,000 records a second on a schedule that waits
// for nobody, and measures from when each is sent: to its ack, to its delivery
// to another guest, and to the line that castractl writes.
func BenchmarkLatency(b *testing.B) {
	const rate = 1000
	l, _ := benchLab(b, "")
	var acks, deliveries, terminal latencies
	var work sync.WaitGroup
	defer work.Wait()

	sub, err := dialWire(l.port, "sub")
	if err != nil {
		b.Fatal(err)
	}
	defer sub.Close()
	if err := sub.send([]byte(`{"type":"subscribe","topic":"bench.latency"}`)); err != nil {
		b.Fatal(err)
	}
	if _, err := sub.receive(); err != nil {
		b.Fatal(err)
	}
	tail, lines := l.following("--topic", "bench.latency", "-n", "0")
	defer func() { _ = tail.Process.Kill(); _ = tail.Wait() }()
	work.Go(func() {
		for {
			f, err := sub.receive()
			if err != nil {
				return
			}
			if d, ok := taken(f); ok {
				deliveries.add(d)
			}
		}
	})
	work.Go(func() {
		for lines.Scan() {
			if d, ok := taken(lines.Bytes()); ok {
				terminal.add(d)
			}
		}
	})
	pub, err := dialWire(l.port, "pub")
	if err != nil {
		b.Fatal(err)
	}
	defer pub.Close()
	// The tail is there when a first record comes through it.
	for terminal.len() == 0 {
		if err := pub.send(body(-1, time.Now())); err != nil {
			b.Fatal(err)
		}
		if _, err := pub.receive(); err != nil {
			b.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	terminal.all, deliveries.all = nil, nil

	n := max(b.N, 10*rate)
	sent := make(chan time.Time, n) // all of them: acks come in this order
	work.Go(func() {
		for range n {
			if _, err := pub.receive(); err != nil {
				b.Error(err)
				return
			}
			acks.add(time.Since(<-sent))
		}
	})
	b.ResetTimer()
	paced(n, rate, func(i int, at time.Time) {
		sent <- at
		if err := pub.send(body(i, at)); err != nil {
			b.Fatal(err)
		}
	})
	l.until("all arrived", func() error {
		if acks.len() < n || deliveries.len() < n || terminal.len() < n {
			return fmt.Errorf("%d acks, %d deliveries, %d lines of %d", acks.len(), deliveries.len(), terminal.len(), n)
		}
		return nil
	})
	b.StopTimer()
	acks.report(b, "ack")
	deliveries.report(b, "delivery")
	terminal.report(b, "terminal")
	b.ReportMetric(0, "ns/op")
	_ = sub.Close()
	_ = tail.Process.Kill()
}
