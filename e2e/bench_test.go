package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// benchLab is a lab whose castrad lets any guest publish any amount.
func benchLab(b *testing.B) *lab {
	l := newLab(b)
	l.loadedConfig("")
	l.startCastrad("castrad")
	l.answers()
	return l
}

// body is a publish frame with a payload of 256 bytes that says when it was due.
func body(n int, due time.Time) []byte {
	payload := fmt.Appendf(nil, `{"t":%d,"n":%d,"pad":"`, due.UnixNano(), n)
	payload = append(payload, bytes.Repeat([]byte("x"), 256-2-len(payload))...)
	return append(append([]byte(`{"type":"publish","topic":"bench.latency","payload":`), payload...), `"}}`...)
}

// taken gives how long ago the record in line was due.
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
	l.mu.Lock()
	defer l.mu.Unlock()
	slices.Sort(l.all)
	for _, q := range []struct {
		name string
		at   float64
	}{{"p50", .5}, {"p99", .99}, {"p99.9", .999}} {
		v := l.all[int(q.at*float64(len(l.all)-1))]
		b.ReportMetric(float64(v.Microseconds()), what+"-"+q.name+"-µs")
	}
}

// BenchmarkLatency publishes 1,000 records a second on a schedule that waits
// for nobody, and measures from when each was due: to its ack, to its delivery
// to another guest, and to the line that castractl writes.
func BenchmarkLatency(b *testing.B) {
	const rate = 1000
	l := benchLab(b)
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
	tail := exec.Command(bin(b, "castractl"), "bus", "tail", "--topic", "bench.latency", "-n", "0", "-o", "json")
	tail.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS="+l.hostBus)
	out, err := tail.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := tail.Start(); err != nil {
		b.Fatal(err)
	}
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
		lines := bufio.NewScanner(out)
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
	dues := make(chan time.Time, n) // all of them: acks come in this order
	work.Go(func() {
		for range n {
			if _, err := pub.receive(); err != nil {
				b.Error(err)
				return
			}
			acks.add(time.Since(<-dues))
		}
	})
	b.ResetTimer()
	start := time.Now()
	for i := range n {
		due := start.Add(time.Duration(i) * time.Second / rate)
		time.Sleep(time.Until(due))
		dues <- due
		if err := pub.send(body(i, due)); err != nil {
			b.Fatal(err)
		}
	}
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

// BenchmarkAckedRate has 8 guests with 64 records outstanding each, and counts
// the acknowledged ones.
func BenchmarkAckedRate(b *testing.B) {
	const guests, outstanding = 8, 64
	l := benchLab(b)
	var acked atomic.Int64
	var work sync.WaitGroup
	var stop atomic.Bool
	frame := body(0, time.Now())
	for g := range guests {
		p, err := dialWire(l.port, fmt.Sprintf("pub%d", g))
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = p.Close() })
		work.Go(func() {
			burst := func(n int) bool {
				w := p.(*wirePeer)
				var out []byte
				for range n {
					out = append(out, 0, 0, byte(len(frame)>>8), byte(len(frame)))
					out = append(out, frame...)
				}
				_, err := w.Write(out)
				return err == nil
			}
			if !burst(outstanding) {
				return
			}
			for !stop.Load() {
				got := 0
				for first := true; first || p.(*wirePeer).r.Buffered() > 0; first = false {
					f, err := p.receive()
					var a struct{ Status string }
					if err != nil || json.Unmarshal(f, &a) != nil || a.Status != "ok" {
						b.Errorf("%s, %v", f, err)
						return
					}
					got++
				}
				acked.Add(int64(got))
				if !burst(got) {
					return
				}
			}
		})
	}
	const settle, measure = time.Second, 5 * time.Second
	time.Sleep(settle)
	before := acked.Load()
	b.ResetTimer()
	time.Sleep(measure)
	n := acked.Load() - before
	b.StopTimer()
	stop.Store(true)
	work.Wait()
	b.ReportMetric(float64(n)/measure.Seconds(), "acked/s")
	b.ReportMetric(0, "ns/op")
}
