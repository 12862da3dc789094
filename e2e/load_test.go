package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/castrabus/castra/internal/wire"
)

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

// connect gives a session of vm's, the test being over without one.
func (l *lab) connect(vm string) *wirePeer {
	l.Helper()
	p, err := dialWire(l.port, vm)
	if err != nil {
		l.Fatal(err)
	}
	l.Cleanup(func() { _ = p.Close() })
	return p.(*wirePeer)
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
// was refused for the disk's sake, or not acknowledged when a connection broke.
type publisher struct {
	vm   string
	dial func() (peer, error)
	most atomic.Int64 // of all that it publishes; 0: there is no bound

	next    int
	unacked []string // ids, in the order in which they were sent
	refused []string // ids to be sent again
	retried map[string]bool
	acked   map[string]uint64
	queued  []string // ids that castra-guestd took over
	count   atomic.Int64
	past    atomic.Int64 // of these, how many castrad has acknowledged itself
	dials   atomic.Int64
}

// load is guests that publish as fast as they can.
type load struct {
	l      *lab
	all    []*publisher
	work   sync.WaitGroup
	enough atomic.Bool

	mu       sync.Mutex
	refusals map[string]int // by code
}

const (
	window     = 64 // records a publisher has outstanding
	publishers = 4  // on the wire, beside those behind castra-guestd
	daemons    = 2
)

// publishing starts guests of both kinds.
func (l *lab) publishing() *load {
	l.Helper()
	ld := &load{l: l, refusals: make(map[string]int)}
	add := func(vm string, dial func() (peer, error)) {
		p := &publisher{vm: vm, dial: dial, acked: make(map[string]uint64), retried: make(map[string]bool)}
		ld.all = append(ld.all, p)
		ld.work.Go(func() { ld.run(p) })
	}
	l.Cleanup(ld.work.Wait) // where the test has failed; its context has ended
	for i := range publishers {
		vm := fmt.Sprintf("wire%d", i)
		add(vm, func() (peer, error) { return dialWire(l.port, vm) })
	}
	for i := range daemons {
		vm := fmt.Sprintf("guest%d", i)
		socket := l.guestd(vm)
		add(vm, func() (peer, error) { return dialSocket(socket) })
	}
	return ld
}

// acked counts the acknowledged records.
func (ld *load) acked() int64 {
	var n int64
	for _, p := range ld.all {
		n += p.count.Load()
	}
	return n
}

// goOn waits until n more records are acknowledged to the guests on the wire.
func (ld *load) goOn(n int64) {
	ld.l.Helper()
	wire := func() (n int64) {
		for _, p := range ld.all[:publishers] {
			n += p.count.Load()
		}
		return n
	}
	before := wire()
	ld.l.until(fmt.Sprintf("%d more records are acknowledged", n), func() error {
		if got := wire() - before; got < n {
			return fmt.Errorf("%d are", got)
		}
		return nil
	})
}

// refusedWith counts the refusals with a code.
func (ld *load) refusedWith(code string) int {
	ld.mu.Lock()
	defer ld.mu.Unlock()
	return ld.refusals[code]
}

// finish lets the guests see everything acknowledged that they have published, and
// waits until castrad, which must be up, has what castra-guestd keeps for it.
func (ld *load) finish() {
	ld.enough.Store(true)
	ld.work.Wait()
	for i := range daemons {
		vm := fmt.Sprintf("guest%d", i)
		(&spooler{lab: ld.l, vm: vm, bus: "unix:path=" + ld.l.path(vm+".bus")}).drained()
	}
}

func (ld *load) run(p *publisher) {
	ctx := ld.l.Context()
	for ctx.Err() == nil && (!ld.enough.Load() || len(p.unacked)+len(p.refused) > 0) {
		conn, err := p.dial()
		if err != nil {
			time.Sleep(5 * time.Millisecond) // castrad is away
			continue
		}
		p.dials.Add(1)
		stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
		ld.serve(p, conn)
		stop()
		_ = conn.Close()
	}
}

// serve publishes over one connection until it breaks or there is enough.
func (ld *load) serve(p *publisher, conn peer) {
	for _, id := range p.unacked {
		if conn.send(frameFor(p.vm, id)) != nil {
			return
		}
	}
	for !ld.enough.Load() || len(p.unacked)+len(p.refused) > 0 {
		if len(p.unacked) == 0 && len(p.refused) > 0 {
			time.Sleep(20 * time.Millisecond) // not to ask a full disk without pause
			p.unacked, p.refused = p.refused, nil
			for _, id := range p.unacked {
				if conn.send(frameFor(p.vm, id)) != nil {
					return
				}
			}
		}
		for len(p.unacked) < window && len(p.refused) == 0 && !ld.enough.Load() && (p.most.Load() == 0 || int64(p.next) < p.most.Load()) {
			id := fmt.Sprint(p.next)
			p.next++
			p.unacked = append(p.unacked, id)
			if conn.send(frameFor(p.vm, id)) != nil {
				return
			}
		}
		if len(p.unacked) == 0 {
			time.Sleep(time.Millisecond) // until it may go on
			continue
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
			if a.Type != "error" { // which says that the session ends
				ld.l.Errorf("%s: %s (%v) where the ack of %s was due", p.vm, b, err, p.unacked[0])
			}
			return
		}
		p.unacked = p.unacked[1:]
		switch {
		case a.Status != "ok":
			p.refused = append(p.refused, a.ID)
			p.retried[a.ID] = true
			ld.mu.Lock()
			ld.refusals[a.Code]++
			ld.mu.Unlock()
			if a.Code != "storage-full" && a.Code != "storage-stalled" && a.Code != "shutting-down" {
				ld.l.Errorf("%s: %s", p.vm, b)
				return
			}
			continue
		case a.Queued:
			p.queued = append(p.queued, a.ID)
		default:
			p.acked[a.ID] = a.Seq
			p.past.Add(1)
		}
		p.count.Add(1)
	}
}

func frameFor(vm, id string) []byte {
	return fmt.Appendf(nil, `{"type":"publish","topic":"load.%s","id":%q,"payload":{"n":%s}}`, vm, id, id)
}

// check compares the host stream, as it is on disk, with what was acknowledged,
// and gives how many records it has. Nothing is lost, doubled or stored under
// another number than the ack's; numbers have no hole; and a publisher's records
// are in its order, but for those that were refused and sent again.
func (ld *load) check() int {
	l := ld.l
	l.Helper()
	type key struct{ vm, id string }
	seqs := make(map[key]uint64)
	newest := make(map[string]int) // of each VM's numbers, which must rise
	retried := make(map[string]map[string]bool)
	for _, p := range ld.all {
		retried[p.vm] = p.retried
	}
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
			if retried[r.VM][r.ID] {
				continue
			}
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
	for _, p := range ld.all {
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
	l.castractl("bus", "verify", "--log-dir", l.path("log"))
	return int(last)
}
