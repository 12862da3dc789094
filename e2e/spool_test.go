package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bus"
)

// A spooler is a castra-guestd that a test ends and starts as it likes.
type spooler struct {
	*lab
	vm     string
	conf   string
	socket string
	bus    string
	cmd    *exec.Cmd
}

// spooling starts a castra-guestd with a spool in dir; more is what else its [bus]
// is to say.
func (l *lab) spooling(vm, dir, more string) *spooler {
	l.Helper()
	g := &spooler{lab: l, vm: vm, socket: l.path(vm + ".sock"), bus: l.bus(vm)}
	g.conf = l.write(vm+".toml", `[broker]
address = "127.0.0.1:%d"
[identity]
vm = %q
[bus]
socket = %q
spool_dir = %q
%s
`, l.port, vm, g.socket, l.path(dir), more)
	g.restart()
	return g
}

func (g *spooler) restart() {
	g.Helper()
	g.cmd = g.start(g.vm, []string{"DBUS_SYSTEM_BUS_ADDRESS=" + g.bus}, bin(g.TB, "castra-guestd"), "--config", g.conf)
	g.until(g.vm+" serves its programs", func() error {
		conn, err := dialSocket(g.socket)
		if err == nil {
			_ = conn.Close() // only to see that it can be made
		}
		return err
	})
}

func (g *spooler) kill() {
	g.Helper()
	if err := g.cmd.Process.Kill(); err != nil {
		g.Fatal(err)
	}
	_ = g.cmd.Wait() // killed
}

// status asks the guest's daemon, as a person in the guest would.
func (g *spooler) status() (st bus.Status) {
	g.Helper()
	inside := *g.lab
	inside.hostBus = g.bus
	g.until("castra-guestd answers", func() error { // its socket was there before its name on the bus
		out, err := inside.tryCastractl("status", "--json")
		if err == nil {
			err = json.Unmarshal([]byte(out), &st)
		}
		return err
	})
	return st
}

// drained waits until the host has all of the guest's spool.
func (g *spooler) drained() {
	g.Helper()
	g.until(g.vm+"'s spool is empty", func() error {
		if n := g.status().Broker.SpoolCount; n > 0 {
			return fmt.Errorf("%d messages are in it", n)
		}
		return nil
	})
}

// publish publishes once over the guest's socket and gives the answer.
func (g *spooler) publish(topic, id string, payload any) (answer struct {
	Status, Code string
	Seq          uint64
	Queued       bool
	Durable      *bool
	RetryAfterMS int64 `json:"retry_after_ms"`
},
) {
	g.Helper()
	conn, err := dialSocket(g.socket)
	if err != nil {
		g.Fatal(err)
	}
	defer conn.Close()
	frame, err := json.Marshal(map[string]any{"type": "publish", "topic": topic, "id": id, "payload": payload})
	if err == nil {
		err = conn.send(frame)
	}
	var b []byte
	if err == nil {
		b, err = conn.receive()
	}
	if err == nil {
		err = json.Unmarshal(b, &answer)
	}
	if err != nil {
		g.Fatal(err)
	}
	return answer
}

// stored gives the ids of a guest's records in the host stream, in order, castrad
// being up.
func (l *lab) stored(vm string) (ids []string) {
	l.Helper()
	out := l.castractl("bus", "tail", "--from", "1", "--no-follow", "-o", "json")
	for line := range strings.Lines(out) {
		var r struct{ VM, ID string }
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			l.Fatal(err)
		}
		if r.VM == vm {
			ids = append(ids, r.ID)
		}
	}
	return ids
}

// TestSpool kills castrad and castra-guestd at any point while programs in the guests
// publish. What a program was told is stored or kept is stored once, in its order.
func TestSpool(t *testing.T) {
	l := newLab(t)
	l.loadedConfig("")
	host := l.startCastrad("castrad")
	ld := &load{l: l, refusals: make(map[string]int)}
	t.Cleanup(ld.work.Wait)
	// What a program may publish until it goes on, and from then on. All of it fits into
	// the spool, or a full one would stop it while the host is away.
	const some, more = 300, 1200
	guests := []*spooler{l.spooling("guest0", "s0", ""), l.spooling("guest1", "s1", "spool_size = \"128MiB\"")}
	for _, g := range guests {
		p := &publisher{vm: g.vm, dial: func() (peer, error) { return dialSocket(g.socket) }, acked: make(map[string]uint64), retried: make(map[string]bool)}
		p.most.Store(some)
		ld.all = append(ld.all, p)
		ld.work.Go(func() { ld.run(p) })
	}
	mayPublish := func(n int64) {
		for _, p := range ld.all {
			p.most.Add(n)
		}
	}
	goOn := func() {
		before := ld.acked()
		mayPublish(some)
		l.until("programs go on", func() error {
			if n := ld.acked() - before; n < 200 {
				return fmt.Errorf("%d messages are taken", n)
			}
			return nil
		})
		mayPublish(more)
		time.Sleep(time.Duration(rand.IntN(30)) * time.Millisecond) // to kill it at any point, not to wait for one
	}
	kills := 0
	for range 6 {
		goOn()
		g := guests[rand.IntN(2)] // with the host there
		g.kill()
		g.restart()
		kills++
		goOn()
		if err := host.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = host.Wait() // killed
		for range 2 {   // with the host away
			goOn()
			g := guests[rand.IntN(2)]
			g.kill()
			g.restart()
			kills++
		}
		goOn()
		host = l.startCastrad("castrad")
		time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond) // that some kills come while the spool drains
	}
	l.answers()
	l.castractl("wait", "guest0", "guest1", "--timeout", "60s")
	for _, p := range ld.all {
		l.until(p.vm+"'s messages go past the spool", func() error {
			p.most.Add(1)
			if p.past.Load() == 0 {
				return errors.New("none did")
			}
			return nil
		})
	}
	ld.finish()
	queued := 0
	for i, g := range guests {
		g.drained()
		queued += len(ld.all[i].queued)
	}
	l.stop("castrad", host)
	records := ld.check()
	if queued == 0 || len(ld.refusals) > 0 {
		t.Errorf("%d records went by the spool; refusals: %v", queued, ld.refusals)
	}
	t.Logf("castra-guestd killed %d times, castrad 6 times; %d records, of which %d were told to be queued: none lost, none doubled, none out of order", kills, records, queued)
}

// A full spool says so, to every publisher and until there is room; it stays within
// its bound on disk, and the host gets all of it and nothing else.
func TestSpoolFull(t *testing.T) {
	l := newLab(t)
	l.loadedConfig("")
	g := l.spooling("guest0", "spool", "spool_size = \"128KiB\"")
	var kept []string
	for i := 0; ; i++ {
		id := fmt.Sprint(i)
		a := g.publish("full", id, strings.Repeat("x", 1000))
		if a.Status == "ok" && a.Queued && a.Durable == nil && a.Seq == 0 {
			kept = append(kept, id)
			continue
		}
		if a.Status != "error" || a.Code != "storage-full" || a.RetryAfterMS <= 0 {
			t.Fatalf("%d: %+v", i, a)
		}
		break
	}
	if n := len(kept); n < 100 || n > 131 {
		t.Errorf("%d records of 1 kB were kept in 128 KiB", n)
	}
	var size int64
	if err := filepath.WalkDir(l.path("spool"), func(_ string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			var info fs.FileInfo
			if info, err = e.Info(); err == nil {
				size += info.Size()
			}
		}
		return err
	}); err != nil || size > 256<<10 || size < 100_000 {
		t.Errorf("the spool takes %d bytes on disk (%v)", size, err)
	}
	if b := g.status().Broker; b.SpoolCount != len(kept) || b.SpoolDurable == nil || !*b.SpoolDurable {
		t.Errorf("status says %+v", b)
	}
	l.startCastrad("castrad")
	l.answers()
	g.drained()
	if a := g.publish("full", "last", 1); a.Status != "ok" || a.Seq == 0 {
		t.Errorf("with room again: %+v", a)
	}
	if got := l.stored("guest0"); fmt.Sprint(got) != fmt.Sprint(append(kept, "last")) {
		t.Errorf("the host has %q, want %q", got, kept)
	}
}

// A spool that fills its disk gives it back once the host has everything.
func TestSpoolFillsItsDisk(t *testing.T) {
	l := newLab(t)
	l.loadedConfig("")
	if err := os.Mkdir(l.path("small"), 0o755); err != nil {
		t.Fatal(err)
	}
	l.mount("small", "-t", "tmpfs", "-o", "size=600k,mode=777", "none")
	g := l.spooling("guest0", "small", "spool_size = \"1MiB\"")
	var kept []string
	for i := 0; ; i++ {
		a := g.publish("fill", fmt.Sprint(i), strings.Repeat("x", 4000))
		if a.Status != "ok" {
			if a.Code != "storage-full" {
				t.Fatalf("%+v", a)
			}
			break
		}
		kept = append(kept, fmt.Sprint(i))
	}
	if reason := g.status().Broker.SpoolReason; reason != "disk full" {
		t.Fatalf("the disk is not full: %q", reason)
	}
	l.startCastrad("castrad")
	l.answers()
	g.drained()
	l.until("the spool is on disk again", func() error {
		files, err := filepath.Glob(l.path("small/guest0/*.jsonl"))
		if err == nil && len(files) > 1 {
			err = fmt.Errorf("released, and still there: %q", files)
		}
		if reason := g.status().Broker.SpoolReason; err == nil && reason != "" {
			err = errors.New(reason)
		}
		return err
	})
	if got := l.stored("guest0"); fmt.Sprint(got) != fmt.Sprint(kept) {
		t.Errorf("the host has %q, want %q", got, kept)
	}
}

// What another VM's castra-guestd left on the disk is not sent under this one's name,
// nor lost: it goes when the name comes back.
func TestSpoolOfAnotherVM(t *testing.T) {
	l := newLab(t)
	l.loadedConfig("")
	one := l.spooling("one", "spool", "")
	for i := range 3 {
		if a := one.publish("t", fmt.Sprint("one", i), i); !a.Queued || a.Durable != nil {
			t.Fatalf("%+v", a)
		}
	}
	l.stop("one", one.cmd)
	l.startCastrad("castrad")
	l.answers()
	two := l.spooling("two", "spool", "")
	l.untilFile("two.log", `other=one records=3`)
	if a := two.publish("t", "two", 1); a.Status != "ok" {
		t.Fatalf("%+v", a)
	}
	two.drained()
	// Its records under the new name's directory, as a hand may put them, neither.
	l.stop("two", two.cmd)
	if err := errors.Join(os.RemoveAll(l.path("spool/two")), os.CopyFS(l.path("spool/two"), os.DirFS(l.path("spool/one")))); err != nil {
		t.Fatal(err)
	}
	two.restart()
	l.untilFile("two.log", "kept aside and not sent")
	if a := two.publish("t", "two again", 1); a.Status != "ok" {
		t.Fatalf("%+v", a)
	}
	two.drained()
	if got, want := l.stored("two"), []string{"two", "two again"}; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("the host has %q of two, want %q", got, want)
	}
	if got := l.stored("one"); len(got) > 0 {
		t.Errorf("the host has %q of one, which is not there", got)
	}
	l.stop("two", two.cmd)
	one.restart()
	one.drained()
	if got, want := l.stored("one"), []string{"one0", "one1", "one2"}; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("the host has %q of one, want %q", got, want)
	}
}

// Without a disk the guest works, and says what that means.
func TestSpoolInMemory(t *testing.T) {
	l := newLab(t)
	l.loadedConfig("")
	l.write("file", "a directory cannot be made here")
	g := l.spooling("guest0", "file", "")
	l.untilFile("guest0.log", "the spool cannot be opened")
	if a := g.publish("t", "1", 1); a.Status != "ok" || !a.Queued || a.Durable == nil || *a.Durable {
		t.Errorf("%+v", a)
	}
	b := g.status().Broker
	if b.SpoolDurable == nil || *b.SpoolDurable || !strings.Contains(b.SpoolReason, "not a directory") || b.SpoolCount != 1 {
		t.Errorf("status says %+v", b)
	}
	l.startCastrad("castrad")
	l.answers()
	g.drained()
	if got := l.stored("guest0"); len(got) != 1 {
		t.Errorf("the host has %q", got)
	}
}
