package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/wire"
)

const (
	kills      = 10
	window     = 64 // records a publisher has outstanding
	publishers = 4  // on the wire, beside those behind castra-guestd
	daemons    = 2
)

// TestKill kills castrad ten times while guests publish as fast as they can.
// What was acknowledged is in the stream, once, under the number in the ack;
// numbers have no hole; and the guests come back by themselves.
func TestKill(t *testing.T) {
	l := newLab(t)
	l.hostBus = l.bus("host")
	l.port = freePort(t)
	conf := l.write("castrad.toml", `[broker]
listen = ["127.0.0.1:%d"]
unknown_vms = "accept"
[store]
state_dir = %q
log_dir = %q
segment_size = "1MiB"
[limits]
publish_rate = 10000000
publish_burst = 10000000
`, l.port, l.path("state"), l.path("log"))
	castrad := func(run int) *exec.Cmd {
		return l.start(fmt.Sprintf("castrad-%d", run), []string{"DBUS_SYSTEM_BUS_ADDRESS=" + l.hostBus}, bin(t, "castrad"), "--config", conf)
	}
	host := castrad(0)

	var all []*publisher
	var work sync.WaitGroup
	var enough atomic.Bool
	add := func(vm string, dial func() (peer, error)) {
		p := &publisher{vm: vm, dial: dial, acked: make(map[string]uint64)}
		all = append(all, p)
		work.Go(func() { p.run(t, &enough) })
	}
	for i := range publishers {
		vm := fmt.Sprintf("wire%d", i)
		add(vm, func() (peer, error) { return dialWire(l.port, vm) })
	}
	for i := range daemons {
		vm := fmt.Sprintf("guest%d", i)
		socket := l.guestd(vm)
		add(vm, func() (peer, error) { return dialSocket(socket) })
	}
	for run := range kills {
		before := total(all)
		l.until("guests publish", func() error {
			if n := total(all); n < before+1000 {
				return fmt.Errorf("%d records acknowledged since the last start", n-before)
			}
			return nil
		})
		time.Sleep(time.Duration(rand.IntN(200)) * time.Millisecond) // to kill it at any point, not to wait for one
		if err := host.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = host.Wait() // killed
		host = castrad(run + 1)
	}
	l.castractlEnv("wait", "guest0", "guest1", "--timeout", "60s")
	enough.Store(true)
	work.Wait()
	l.stop("castrad", host)
	records := l.check(all)
	t.Logf("%d kills, %d records, %d acknowledged: none lost, none doubled", kills, records, total(all))
}

// castractlEnv is castractl, for a castrad that may just be starting.
func (l *lab) castractlEnv(args ...string) {
	l.Helper()
	l.until("castractl "+strings.Join(args, " "), func() error {
		_, err := l.tryCastractl(args...)
		return err
	})
}

// guestd starts a castra-guestd with a message bus of its own and gives its
// socket's path.
func (l *lab) guestd(vm string) string {
	l.Helper()
	socket := l.path(vm + ".sock")
	conf := l.write(vm+".toml", `[broker]
address = "127.0.0.1:%d"
[identity]
vm = %q
[bus]
socket = %q
spool_dir = %q
`, l.port, vm, socket, l.path(vm+".spool"))
	l.start(vm, []string{"DBUS_SYSTEM_BUS_ADDRESS=" + l.bus(vm)}, bin(l.TB, "castra-guestd"), "--config", conf)
	l.until(vm+"'s socket is there", func() error {
		_, err := os.Stat(socket)
		return err
	})
	return socket
}

// peer carries frames: the wire itself, or castra-guestd's socket.
type peer interface {
	send(frame []byte) error
	receive() ([]byte, error)
	io.Closer
}

type wirePeer struct {
	net.Conn
	r *bufio.Reader
}

func dialWire(port int, vm string) (peer, error) {
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return nil, err
	}
	p := &wirePeer{conn, bufio.NewReader(conn)}
	_, err = p.r.ReadString('\n')
	if err == nil {
		_, err = fmt.Fprintf(conn, "hello vm:%s capabilities=bus-v1\n", vm)
	}
	var line string
	if err == nil {
		line, err = p.r.ReadString('\n')
	}
	if err == nil && !strings.HasPrefix(line, "ok session=") {
		err = fmt.Errorf("answered %q", line)
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return p, nil
}

func (p *wirePeer) send(frame []byte) error {
	_, err := p.Write(wire.AppendFrame(nil, frame))
	return err
}

func (p *wirePeer) receive() ([]byte, error) { return wire.ReadFrame(p.r, nil) }

type socketPeer struct {
	net.Conn
	r *bufio.Reader
}

func dialSocket(path string) (peer, error) {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	return &socketPeer{conn, bufio.NewReader(conn)}, nil
}

func (p *socketPeer) send(frame []byte) error {
	_, err := p.Write(append(frame, '\n'))
	return err
}

func (p *socketPeer) receive() ([]byte, error) { return p.r.ReadBytes('\n') }

// publisher is a guest's program: it numbers its records, and sends again what
// was not acknowledged when a connection broke.
type publisher struct {
	vm   string
	dial func() (peer, error)

	next    int
	unacked []string // ids, in order
	acked   map[string]uint64
	queued  []string // ids that castra-guestd took over
	count   atomic.Int64
}

func total(all []*publisher) int64 {
	var n int64
	for _, p := range all {
		n += p.count.Load()
	}
	return n
}

func (p *publisher) run(t *testing.T, enough *atomic.Bool) {
	for !enough.Load() || len(p.unacked) > 0 {
		conn, err := p.dial()
		if err != nil {
			time.Sleep(5 * time.Millisecond) // castrad is away
			continue
		}
		p.serve(t, conn, enough)
		_ = conn.Close()
	}
}

// serve publishes over one connection until it breaks or there is enough.
func (p *publisher) serve(t *testing.T, conn peer, enough *atomic.Bool) {
	for _, id := range p.unacked {
		if conn.send(frameFor(p.vm, id)) != nil {
			return
		}
	}
	for !enough.Load() || len(p.unacked) > 0 {
		for len(p.unacked) < window && !enough.Load() {
			id := fmt.Sprint(p.next)
			p.next++
			p.unacked = append(p.unacked, id)
			if conn.send(frameFor(p.vm, id)) != nil {
				return
			}
		}
		b, err := conn.receive()
		if err != nil {
			return
		}
		var a struct {
			Type, Ack, Status, Code, ID string
			Seq                         uint64
			Queued                      bool
		}
		if err := json.Unmarshal(b, &a); err != nil || a.Ack != "publish" || a.ID != p.unacked[0] {
			t.Errorf("%s: %s (%v) where the ack of %s was due", p.vm, b, err, p.unacked[0])
			return
		}
		switch {
		case a.Status != "ok" && (a.Code == "shutting-down" || a.Code == "storage-full" || a.Code == "storage-stalled"):
			return // not stored: again, over a new connection
		case a.Status != "ok":
			t.Errorf("%s: %s", p.vm, b)
			return
		case a.Queued:
			p.queued = append(p.queued, a.ID)
		default:
			p.acked[a.ID] = a.Seq
		}
		p.count.Add(1)
		p.unacked = p.unacked[1:]
	}
}

func frameFor(vm, id string) []byte {
	return fmt.Appendf(nil, `{"type":"publish","topic":"load.%s","id":%q,"payload":{"n":%s}}`, vm, id, id)
}

// check compares the host stream, as it is on disk, with what was acknowledged,
// and gives how many records it has.
func (l *lab) check(all []*publisher) int {
	l.Helper()
	type key struct{ vm, id string }
	seqs := make(map[key]uint64)
	newest := make(map[string]int) // of each VM's numbers, which must rise
	files, err := filepath.Glob(l.path("log/bus/host/*.jsonl"))
	if err != nil || len(files) == 0 {
		l.Fatal(files, err)
	}
	last := uint64(0)
	for _, file := range files {
		f, err := os.Open(file)
		if err != nil {
			l.Fatal(err)
		}
		lines := bufio.NewScanner(f)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			var r struct {
				Seq     uint64
				VM, ID  string
				Payload struct{ N int }
			}
			if err := json.Unmarshal(lines.Bytes(), &r); err != nil || r.Seq != last+1 {
				l.Fatalf("%s: record %d is followed by %s (%v)", file, last, lines.Bytes(), err)
			}
			last = r.Seq
			if r.ID == "" {
				continue // presence
			}
			if first, twice := seqs[key{r.VM, r.ID}]; twice {
				l.Errorf("%s's %s is stored twice: %d and %d", r.VM, r.ID, first, r.Seq)
			}
			seqs[key{r.VM, r.ID}] = r.Seq
			if n, ok := newest[r.VM]; ok && r.Payload.N <= n {
				l.Errorf("%s's %d is stored behind its %d", r.VM, r.Payload.N, n)
			}
			newest[r.VM] = r.Payload.N
		}
		if err := lines.Err(); err != nil {
			l.Fatal(err)
		}
		_ = f.Close()
	}
	for _, p := range all {
		for id, seq := range p.acked {
			if got := seqs[key{p.vm, id}]; got != seq {
				l.Errorf("%s's %s was acknowledged as %d and is stored as %d", p.vm, id, seq, got)
			}
		}
		for _, id := range p.queued {
			if seqs[key{p.vm, id}] == 0 {
				l.Errorf("%s's %s was taken over and is not stored", p.vm, id)
			}
		}
	}
	return int(last)
}
