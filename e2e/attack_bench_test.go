package e2e

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/wire"
)

// lastingAttacks are those that can be kept up. Each runs until its process is
// killed, in a process of its own, beside castrad and the honest guest on the same
// processors. It has the key of mallory, and that of the VM named cloned.
var lastingAttacks = []struct {
	name string
	run  func(s *siege)
}{
	{"connections", func(s *siege) {
		held := make(chan *guestConn, 2000) // as many as it has at once
		s.repeat(4, func() {
			g, err := s.dial()
			if err != nil {
				return
			}
			for {
				select {
				case held <- g:
					return
				case old := <-held:
					_ = old.Close()
				}
			}
		})
	}},
	{"wrong-proofs", func(s *siege) {
		mac := []byte("auth mac=" + strings.Repeat("ab", 32) + "\n")
		s.repeat(4, func() {
			g, err := s.dial()
			if err != nil {
				return
			}
			defer g.Close()
			fmt.Fprintf(g, "hello vm:victim capabilities=%s nonce=%s\n", proveCaps, someNonce)
			_, _ = g.line()
			_, _ = g.Write(mac)
			_, _ = g.line()
		})
	}},
	{"made-up-names", func(s *siege) {
		s.repeat(4, func() {
			g, err := s.dial()
			if err != nil {
				return
			}
			defer g.Close()
			fmt.Fprintf(g, "hello vm:x%d capabilities=bus-v1\n", time.Now().UnixNano())
			_, _ = g.line()
		})
	}},
	{"clones", func(s *siege) {
		s.repeat(2, func() {
			if g, _, err := s.join("cloned", s.keys["cloned"]); err == nil {
				_, _ = g.receive() // until it is superseded
				_ = g.Close()
			}
		})
	}},
	{"one-name-again", func(s *siege) {
		s.repeat(8, func() {
			if g, _, err := s.join("mallory", s.keys["mallory"]); err == nil {
				_ = g.Close()
			}
		})
	}},
	{"bad-frames", func(s *siege) {
		s.repeat(4, func() {
			g, _, err := s.join("mallory", s.keys["mallory"])
			if err != nil {
				return
			}
			defer g.Close()
			_ = g.frame(`{"type":"publish","payload":` + strings.Repeat("[", 60000) + `}`)
			_, _ = io.Copy(io.Discard, g.r)
		})
	}},
	{"publishes", func(s *siege) {
		s.pour(frameOf(`{"type":"publish","topic":"a.flood","payload":"` + strings.Repeat("x", 200) + `"}`))
	}},
	{"large-publishes", func(s *siege) {
		s.pour(frameOf(`{"type":"publish","topic":"a.flood","payload":"` + strings.Repeat("x", 61000) + `"}`))
	}},
	{"heartbeats", func(s *siege) { s.pour(frameOf(`{"type":"heartbeat"}`)) }},
	{"refused-frames", func(s *siege) { s.pour(frameOf(`{"type":"publish","topic":"vm:victim","payload":1}`)) }},
	{"subscribes", func(s *siege) {
		s.pour(frameOf(`{"type":"subscribe","topic":"a.never","sub":"s","from":-1000000}`))
	}},
	{"cursors", func(s *siege) {
		var all []byte
		for i := range 16 {
			all = append(all, frameOf(fmt.Sprintf(`{"type":"subscribe","topic":"a.c%d","cursor":"c%d"}`, i, i))...)
			all = append(all, frameOf(fmt.Sprintf(`{"type":"unsubscribe","topic":"a.c%d"}`, i))...)
		}
		s.pour(all)
	}},
	{"never-reading", func(s *siege) {
		s.repeat(1, func() {
			g, _, err := s.join("mallory", s.keys["mallory"])
			if err != nil {
				return
			}
			defer g.Close()
			for i := range 16 {
				_ = g.frame(fmt.Sprintf(`{"type":"subscribe","topic":"vm:mallory","sub":"s%d","from":"start"}`, i))
			}
			for {
				if g.frame(`{"type":"publish","topic":"vm:mallory","payload":"`+strings.Repeat("x", 30000)+`"}`) != nil {
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
		})
	}},
	{"one-byte-frames", func(s *siege) {
		s.repeat(1, func() {
			g, _, err := s.join("mallory", s.keys["mallory"])
			if err != nil {
				return
			}
			defer g.Close()
			go func() { _, _ = io.Copy(io.Discard, g.r) }() // ends with the connection
			for f := frameOf(`{"type":"publish","topic":"a.slow","payload":"` + strings.Repeat("x", 60000) + `"}`); ; {
				for i := range f {
					if _, err := g.Write(f[i : i+1]); err != nil {
						return
					}
				}
			}
		})
	}},
	{"dbus", func(s *siege) {
		s.repeat(1, func() {
			conn := s.rawBus(s.TB)
			defer conn.Close()
			go func() { _, _ = io.Copy(io.Discard, conn) }() // or the bus hangs up
			m := call("/org/castra/Bus1", "org.castra.Bus1.Manager", "Describe", []string{})
			m.Flags = 1 // no reply is expected, and so no number of them is too many
			var one bytes.Buffer
			if m.EncodeTo(&one, binary.LittleEndian) != nil {
				return
			}
			flood := bytes.Repeat(one.Bytes(), 64)
			for {
				for i := range 64 {
					binary.LittleEndian.PutUint32(flood[i*one.Len()+8:], uint32(i+10))
				}
				if _, err := conn.Write(flood); err != nil {
					return
				}
			}
		})
	}},
}

func frameOf(f string) []byte { return wire.AppendFrame(nil, []byte(f)) }

// repeat does something for ever, n at a time.
func (s *siege) repeat(n int, attack func()) {
	var work sync.WaitGroup
	for range n {
		work.Go(func() {
			for {
				attack()
			}
		})
	}
	work.Wait()
}

// pour says the same frames in mallory's session as fast as they are read, and
// reads what they are answered with.
func (s *siege) pour(frames []byte) {
	s.repeat(1, func() {
		g, _, err := s.join("mallory", s.keys["mallory"])
		if err != nil {
			return
		}
		defer g.Close()
		_ = g.SetReadDeadline(time.Time{})
		go func() { _, _ = io.Copy(io.Discard, g.r) }() // ends with the connection
		many := bytes.Repeat(frames, 1+32<<10/len(frames))
		for {
			if _, err := g.Write(many); err != nil {
				return
			}
		}
	})
}

// TestAttacker is no test: it is the process that a benchmark starts to attack.
func TestAttacker(t *testing.T) {
	name := os.Getenv("CASTRA_ATTACK")
	if name == "" {
		return
	}
	port, err := strconv.Atoi(os.Getenv("CASTRA_ATTACK_PORT"))
	if err != nil {
		t.Fatal(err)
	}
	s := &siege{lab: &lab{TB: t, port: port, hostBus: os.Getenv("CASTRA_ATTACK_BUS")}, keys: make(map[string][]byte)}
	for word := range strings.FieldsSeq(os.Getenv("CASTRA_ATTACK_KEYS")) {
		vm, text, _ := strings.Cut(word, "=")
		if s.keys[vm], err = hex.DecodeString(text); err != nil {
			t.Fatal(err)
		}
	}
	for _, a := range lastingAttacks {
		if a.name == name {
			a.run(s)
		}
	}
	t.Fatalf("there is no attack %q", name)
}

// attack starts one in its own process; stop ends it.
func (s *siege) attack(name string) (stop func()) {
	s.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestAttacker$", "-test.timeout=0")
	cmd.Env = append(os.Environ(), "CASTRA_ATTACK="+name, "CASTRA_ATTACK_PORT="+strconv.Itoa(s.port), "CASTRA_ATTACK_BUS="+s.hostBus,
		fmt.Sprintf("CASTRA_ATTACK_KEYS=mallory=%x cloned=%x", s.keys["mallory"], s.keys["cloned"]))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := os.Create(s.path("attack-" + name + ".log"))
	if err != nil {
		s.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		s.Fatal(err)
	}
	return func() {
		_ = cmd.Process.Kill()
		if err := cmd.Wait(); err == nil || cmd.ProcessState.Exited() {
			log, _ := os.ReadFile(out.Name())
			s.Errorf("the attack %s ended by itself: %v\n%s", name, errors.Join(err), log)
		}
		_ = out.Close()
	}
}

// BenchmarkUnderAttack compares an honest guest's publishes, each to its ack, in
// quiet with those during each attack that can be kept up, in one run on the same
// processors. times-p50 is how many times its quiet value the median takes.
func BenchmarkUnderAttack(b *testing.B) {
	s := besiege(b, "")
	s.keys["cloned"] = s.add("cloned")
	s.history(20_000)
	const each = 3 * time.Second
	for _, a := range lastingAttacks {
		b.Run(a.name, func(b *testing.B) {
			for range b.N {
				quiet := s.honest.measure(each)
				stop := s.attack(a.name)
				time.Sleep(time.Second) // until it is in full swing
				under := s.honest.measure(each)
				stop()
				b.ReportMetric(us(quiet, .5), "quiet-p50-µs")
				b.ReportMetric(us(under, .5), "p50-µs")
				b.ReportMetric(us(quiet, .99), "quiet-p99-µs")
				b.ReportMetric(us(under, .99), "p99-µs")
				b.ReportMetric(us(under, .5)/us(quiet, .5), "times-p50")
				b.ReportMetric(float64(s.memory(s.castrad)>>20), "castrad-peak-MiB")
				b.ReportMetric(0, "ns/op")
			}
		})
	}
	s.honest.intact()
}

// measure gives how long publishes take, sorted.
func (h *honestGuest) measure(d time.Duration) []time.Duration {
	h.s.Helper()
	from := h.samples()
	time.Sleep(d)
	h.mu.Lock()
	defer h.mu.Unlock()
	all := slices.Clone(h.took[from:])
	if len(all) == 0 {
		h.s.Fatal("the honest guest has published nothing")
	}
	slices.Sort(all)
	return all
}

func (h *honestGuest) samples() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.took)
}

func us(sorted []time.Duration, q float64) float64 {
	return float64(sorted[int(q*float64(len(sorted)-1))].Nanoseconds()) / 1e3
}

// history has mallory publish n records, for those who search the log.
func (s *siege) history(n int) {
	s.Helper()
	g, _, err := s.join("mallory", s.keys["mallory"])
	if err != nil {
		s.Fatal(err)
	}
	defer g.Close()
	frame := frameOf(`{"type":"publish","topic":"a.history","payload":{"n":1}}`)
	for stored := 0; stored < n; {
		if _, err := g.Write(bytes.Repeat(frame, 500)); err != nil {
			s.Fatal(err)
		}
		refused := false
		for range 500 {
			f, err := g.receive()
			if err != nil {
				s.Fatal(err)
			}
			if strings.Contains(f, `"status":"ok"`) {
				stored++
			} else {
				refused = true
			}
		}
		if refused {
			time.Sleep(100 * time.Millisecond) // for its share to come back
		}
	}
}
