package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A fleet is thousands of guests in a process of its own, since they connect from
// inside a container's network: these tests, run by nsenter, and built without the
// race detector. With it the guests would be slower than the castrad that they measure.
const fleetEnv = "CASTRA_FLEET"

func TestMain(m *testing.M) {
	if size := os.Getenv(fleetEnv); size != "" {
		var f fleet
		if _, err := fmt.Sscanf(size, "%d %d", &f.publishing, &f.idle); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		f.main()
		return
	}
	os.Exit(m.Run())
}

// fleetStats is what a fleet tells of itself.
type fleetStats struct {
	Connected int           // now
	Lost      int64         // connections, since the fleet began
	Acked     int64         // records
	Refused   int64         // publishes, which are then sent again
	Pause     time.Duration // the longest between a publish and its ack since the last mark
	Back      time.Duration // from the first loss since then to the newest session
	Wrong     []string      // what should not have happened
	Records   int           // in the log, once it was checked
}

// fleetRun is a fleet as its test sees it.
type fleetRun struct {
	*lab
	in  io.Writer
	out *bufio.Reader
}

// fleet starts so many guests that publish, one record after the other, and so many
// that are idle, and returns when all are connected.
func (h *host) fleet(publishing, idle int) *fleetRun {
	h.Helper()
	self := h.path("fleet")
	if out, err := exec.Command("go", "test", "-c", "-o", self, ".").CombinedOutput(); err != nil {
		h.Fatalf("building the fleet: %v: %s", err, out)
	}
	argv := sudo("nsenter", "--target", h.leader, "--net", "env", fmt.Sprintf("%s=%d %d", fleetEnv, publishing, idle), self)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		h.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		h.Fatal(err)
	}
	h.Cleanup(func() { _ = in.Close(); _ = cmd.Wait() })
	f := &fleetRun{h.lab, in, bufio.NewReader(out)}
	f.untilConnected(publishing + idle)
	return f
}

// ask has the fleet do something, and gives its stats then.
func (f *fleetRun) ask(what string) fleetStats {
	f.Helper()
	var st fleetStats
	_, err := fmt.Fprintln(f.in, what)
	if err == nil {
		var line []byte
		if line, err = f.out.ReadBytes('\n'); err == nil {
			err = json.Unmarshal(line, &st)
		}
	}
	if err != nil {
		f.Fatalf("asking the fleet to %s: %v", what, err)
	}
	for _, w := range st.Wrong {
		f.Error(w)
	}
	return st
}

func (f *fleetRun) untilConnected(n int) {
	f.Helper()
	f.within(4*hang, fmt.Sprintf("%d guests are connected", n), func() error {
		if got := f.ask("tell").Connected; got != n {
			return fmt.Errorf("%d are", got)
		}
		return nil
	})
}

// untilAcked waits until so many more records were acknowledged.
func (f *fleetRun) untilAcked(n int64) {
	f.Helper()
	n += f.ask("tell").Acked
	f.until(fmt.Sprintf("%d records are acknowledged", n), func() error {
		if got := f.ask("tell").Acked; got < n {
			return fmt.Errorf("%d are", got)
		}
		return nil
	})
}

// What follows runs in the other process.

type fleet struct {
	publishing, idle int

	work      sync.WaitGroup
	all       []*fleetGuest
	connected atomic.Int64
	lost      atomic.Int64
	count     atomic.Int64
	refused   atomic.Int64
	enough    atomic.Bool

	mu         sync.Mutex
	pause      time.Duration
	firstLoss  time.Time // since the last mark
	lastReturn time.Time
	wrong      []string
}

type fleetGuest struct {
	*fleet
	vm      string
	idle    bool
	next    int
	pending int // the number that is not acknowledged yet; 0: none
	began   time.Time
	acked   map[string]uint64
}

func (f *fleet) main() {
	_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 1 << 16, Max: 1 << 16}) // dialling will tell
	gate := make(chan struct{}, 256)                                                          // so many handshakes at once, to begin with
	for i := range f.publishing + f.idle {
		g := &fleetGuest{fleet: f, vm: fmt.Sprintf("p%d", i), acked: make(map[string]uint64)}
		if g.idle = i >= f.publishing; g.idle {
			g.vm = fmt.Sprintf("i%d", i-f.publishing)
		}
		f.all = append(f.all, g)
		f.work.Go(func() { g.run(gate) })
	}
	commands := bufio.NewScanner(os.Stdin)
	for commands.Scan() {
		records := 0
		switch verb, arg, _ := strings.Cut(commands.Text(), " "); verb {
		case "mark":
			f.mu.Lock()
			f.pause, f.firstLoss = 0, time.Time{}
			f.mu.Unlock()
		case "finish": // with the log that all should be in
			f.mu.Lock()
			f.enough.Store(true) // with the lock: none begins once outstanding has looked
			f.mu.Unlock()
			for end := time.Now().Add(hang); f.outstanding() && time.Now().Before(end); {
				time.Sleep(10 * time.Millisecond)
			}
			records = f.check(arg)
		}
		f.mu.Lock()
		st := fleetStats{
			Connected: int(f.connected.Load()), Lost: f.lost.Load(), Acked: f.count.Load(), Refused: f.refused.Load(),
			Pause: f.pause, Back: f.lastReturn.Sub(f.firstLoss), Wrong: f.wrong, Records: records,
		}
		f.wrong = nil
		f.mu.Unlock()
		b, _ := json.Marshal(st)
		fmt.Printf("%s\n", b)
	}
	os.Exit(0)
}

func (f *fleet) complain(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.wrong) < 20 {
		f.wrong = append(f.wrong, fmt.Sprintf(format, args...))
	}
}

// outstanding tells whether a publish waits for its ack.
func (f *fleet) outstanding() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, g := range f.all {
		if g.pending != 0 {
			return true
		}
	}
	return false
}

// run keeps a session, connecting anew as castra-guestd does: at once, but not all
// of them at once, and then more slowly.
func (g *fleetGuest) run(gate chan struct{}) {
	gate <- struct{}{}
	first := true
	for wait := time.Duration(0); ; wait = min(30*time.Second, 2*wait) {
		p, err := dialWire(7070, g.vm)
		if err == nil {
			wait = 0
			g.mu.Lock()
			g.lastReturn = time.Now()
			g.mu.Unlock()
			g.connected.Add(1)
			if first {
				first = false
				<-gate
			}
			err = g.serve(p)
			_ = p.Close()
			g.connected.Add(-1)
			g.lost.Add(1)
			g.mu.Lock()
			if g.firstLoss.IsZero() {
				g.firstLoss = time.Now()
			}
			g.mu.Unlock()
			if !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, errBye) {
				g.complain("%s: %v", g.vm, err)
			}
			time.Sleep(rand.N(time.Second))
			continue
		}
		wait = max(wait, time.Second)
		time.Sleep(time.Second + rand.N(wait))
	}
}

var errBye = errors.New("the broker said good-bye")

// beat is how often an idle guest, and one that waits, sends a heartbeat.
const beat = 15 * time.Second

// serve subscribes, publishes or does not, and checks each answer.
func (g *fleetGuest) serve(p peer) error {
	conn := p.(*wirePeer)
	if err := p.send(fmt.Appendf(nil, `{"type":"subscribe","topic":"vm:%s"}`, g.vm)); err != nil {
		return err
	}
	if g.pending != 0 {
		if err := p.send(frameFor(g.vm, strconv.Itoa(g.pending))); err != nil {
			return err
		}
	}
	for {
		if !g.idle && g.pending == 0 && !g.enough.Load() {
			time.Sleep(rand.N(200 * time.Millisecond))
			if !g.publishes() {
				continue
			}
			if err := p.send(frameFor(g.vm, strconv.Itoa(g.next))); err != nil {
				return err
			}
		}
		_ = conn.SetReadDeadline(time.Now().Add(beat/2 + rand.N(beat/2)))
		_, err := conn.r.Peek(1)
		if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() {
			_ = conn.SetReadDeadline(time.Time{})
			if err := p.send([]byte(`{"type":"heartbeat"}`)); err != nil {
				return err
			}
			continue
		}
		_ = conn.SetReadDeadline(time.Time{})
		b, err := p.receive()
		if err != nil {
			return err
		}
		var m struct {
			Type, Ack, Status, Code, ID string
			Seq                         uint64
			Retry                       int64 `json:"retry_after_ms"`
		}
		if err := json.Unmarshal(b, &m); err != nil {
			return err
		}
		switch {
		case m.Type == "error":
			return errBye
		case m.Type != "ack" || m.Status != "ok" && m.Code != "storage-stalled":
			return fmt.Errorf("%s came", b)
		case m.Ack != "publish":
		case m.ID != strconv.Itoa(g.pending):
			return fmt.Errorf("%s came where the ack of %d was due", b, g.pending)
		case m.Status == "error":
			g.refused.Add(1)
			time.Sleep(time.Duration(m.Retry) * time.Millisecond)
			if err := p.send(frameFor(g.vm, m.ID)); err != nil {
				return err
			}
		default:
			g.acked[m.ID] = m.Seq
			g.count.Add(1)
			g.mu.Lock()
			g.fleet.pause = max(g.fleet.pause, time.Since(g.began))
			g.pending = 0
			g.mu.Unlock()
		}
	}
}

// publishes begins another record, unless there is enough.
func (g *fleetGuest) publishes() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.enough.Load() {
		return false
	}
	g.next++
	g.pending, g.began = g.next, time.Now()
	return true
}

// check compares the log in dir with what was acknowledged: each record is there,
// once, in its guest's order, under the number in its ack.
func (f *fleet) check(dir string) (records int) {
	type key struct{ vm, id string }
	seqs := make(map[key]uint64)
	newest := make(map[string]int)
	last := uint64(0)
	files, err := filepath.Glob(filepath.Join(dir, "*.jsonl"))
	if err != nil || len(files) == 0 {
		f.complain("no log in %s, %v", dir, err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			f.complain("%v", err)
		}
		for line := range strings.Lines(string(b)) {
			var r struct {
				Seq     uint64
				VM, ID  string
				Payload struct{ N int }
			}
			if err := json.Unmarshal([]byte(line), &r); err != nil || r.Seq != last+1 {
				f.complain("record %d is followed by %s (%v)", last, line, err)
				return int(last)
			}
			last = r.Seq
			if r.ID == "" {
				continue
			}
			if twice, ok := seqs[key{r.VM, r.ID}]; ok {
				f.complain("%s's %s is stored twice: %d and %d", r.VM, r.ID, twice, r.Seq)
			}
			seqs[key{r.VM, r.ID}] = r.Seq
			if r.Payload.N <= newest[r.VM] {
				f.complain("%s's %d is stored behind its %d", r.VM, r.Payload.N, newest[r.VM])
			}
			newest[r.VM] = r.Payload.N
		}
	}
	for _, g := range f.all {
		if g.pending != 0 {
			f.complain("%s's %d was never acknowledged", g.vm, g.pending)
		}
		for id, seq := range g.acked {
			if got := seqs[key{g.vm, id}]; got != seq {
				f.complain("%s's %s was acknowledged as %d and is stored as %d", g.vm, id, seq, got)
			}
		}
	}
	return int(last)
}
