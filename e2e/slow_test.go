package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

const (
	million = 1_000_000

	// slowMemory bounds castrad's memory, in KiB, whatever its subscribers leave
	// unread: they are positions in the log. It is twice what was measured: 8 MiB
	// of recent records, the program, and what garbage there is between two
	// collections.
	slowMemory = 64 << 10
)

// Subscribers that stop, a castractl for a million records and a guest that does
// not read, get all of them in order when they go on. Those that do not stop
// wait for nobody, and castrad keeps nothing for anybody.
func TestStoppedSubscriber(t *testing.T) {
	l := newLab(t)
	l.loadedConfig("")
	castrad := l.startCastrad("castrad")
	l.answers()
	const topic = "bench.million"
	subscribe := func(vm string) peer {
		p, err := dialWire(l.port, vm)
		if err == nil {
			err = p.send([]byte(`{"type":"subscribe","topic":"` + topic + `"}`))
		}
		if err == nil {
			_, err = p.receive()
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = p.Close() })
		return p
	}
	slow, live := subscribe("slow"), subscribe("live")
	tail := l.start("tail", []string{"DBUS_SYSTEM_BUS_ADDRESS=" + l.hostBus},
		bin(t, "castractl"), "bus", "tail", "--topic", topic, "-n", "all", "-o", "json")
	pub, err := dialWire(l.port, "pub")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = pub.Close() })

	var work sync.WaitGroup
	var acks, heard atomic.Int64
	work.Go(func() {
		for acks.Load() < million {
			if b, err := pub.receive(); err != nil || !bytes.Contains(b, []byte(`"status":"ok"`)) {
				t.Errorf("%d acks and then %s, %v", acks.Load(), b, err)
				return
			}
			acks.Add(1)
		}
	})
	work.Go(func() { inOrder(t, "the live guest", live, &heard) })
	publish(t, pub, topic, 0, 1)
	l.untilFile("tail.log", `"n":0}`)
	if err := tail.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	publish(t, pub, topic, 1, million)
	work.Wait() // all is acknowledged and delivered, and two have read next to nothing
	if st, err := os.Stat(l.path("tail.log")); err != nil || st.Size() > 1<<20 {
		t.Fatalf("the stopped castractl has written %v, %v", st.Size(), err)
	}
	if err := tail.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	var late atomic.Int64
	work.Go(func() { inOrder(t, "the guest that did not read", slow, &late) })
	l.within(slowHang, "castractl has written all", func() error {
		f, err := os.Open(l.path("tail.log"))
		if err != nil {
			return err
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			return err
		}
		b := make([]byte, 1024)
		n, _ := f.ReadAt(b, max(0, st.Size()-int64(len(b)))) // to the end, as it is just now
		if !bytes.Contains(b[:n], fmt.Appendf(nil, `"n":%d}}`+"\n", million-1)) {
			return errors.New("it has not")
		}
		return nil
	})
	work.Wait()
	b, err := os.ReadFile(l.path("tail.log"))
	if err != nil {
		t.Fatal(err)
	}
	n := int64(0)
	for line := range bytes.Lines(b) {
		if numberOf(line) != n {
			t.Fatalf("castractl has written %s where record %d was due", line, n)
		}
		n++
	}
	used := l.memory(castrad.Process.Pid)
	if n != million || used > slowMemory {
		t.Errorf("castractl has written %d records; castrad took %d KiB at most, the bound is %d", n, used, slowMemory)
	}
	t.Logf("%d records past two stopped subscribers and one that was not; castrad took %d KiB at most", million, used)
}

// publish sends the records numbered from first on, below end, without waiting.
func publish(t *testing.T, p peer, topic string, first, end int) {
	t.Helper()
	var out []byte
	for n := first; n < end; n++ {
		frame := fmt.Appendf(nil, `{"type":"publish","topic":%q,"payload":{"n":%d}}`, topic, n)
		out = append(append(out, 0, 0, 0, byte(len(frame))), frame...)
		if len(out) > 64<<10 || n == end-1 {
			if _, err := p.(*wirePeer).Write(out); err != nil {
				t.Fatal(err)
			}
			out = out[:0]
		}
	}
}

// inOrder reads the million, each in its place.
func inOrder(t *testing.T, who string, p peer, heard *atomic.Int64) {
	for heard.Load() < million {
		b, err := p.receive()
		if err != nil || numberOf(b) != heard.Load() {
			t.Errorf("%s hears %s, %v where record %d was due", who, b, err, heard.Load())
			return
		}
		heard.Add(1)
	}
}

// numberOf gives the n of a record's payload, -1 if there is none.
func numberOf(record []byte) int64 {
	_, digits, _ := bytes.Cut(record, []byte(`"payload":{"n":`))
	digits, _, _ = bytes.Cut(digits, []byte("}"))
	n, err := strconv.ParseInt(string(digits), 10, 64)
	if err != nil {
		return -1
	}
	return n
}

// memory gives the most that a process has had in memory, in KiB (proc(5), VmHWM).
func (l *lab) memory(pid int) int {
	l.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		l.Fatal(err)
	}
	_, rest, _ := bytes.Cut(b, []byte("VmHWM:"))
	var kib int
	if _, err := fmt.Sscan(string(rest), &kib); err != nil {
		l.Fatalf("%s: %v", b, err)
	}
	return kib
}
