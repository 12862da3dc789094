package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bus"
)

// A faultLab is a castrad with publishing guests, one that only sends
// heartbeats, and a disk that a test makes fail.
type faultLab struct {
	*lab
	castrad *exec.Cmd
	load    *load
	beats   *atomic.Int64 // heartbeats answered
	quiet   func()        // ends them
}

func startFaultLab(t *testing.T, store string) *faultLab {
	l := newLab(t)
	return l.faults(store)
}

func (l *lab) faults(store string) *faultLab {
	l.Helper()
	l.loadedConfig(store)
	f := &faultLab{lab: l, castrad: l.startCastrad("castrad"), beats: new(atomic.Int64)}
	l.answers()
	f.load = l.publishing()
	f.heartbeats()
	f.load.goOn(1000)
	return f
}

// heartbeats makes a guest send one after the other. Its session must not end.
func (f *faultLab) heartbeats() {
	conn, err := dialWire(f.port, "pulse")
	if err != nil {
		f.Fatal(err)
	}
	var work sync.WaitGroup
	var end atomic.Bool
	work.Go(func() {
		defer conn.Close()
		for !end.Load() {
			err := conn.send([]byte(`{"type":"heartbeat"}`))
			var b []byte
			if err == nil {
				b, err = conn.receive()
			}
			if err != nil || !bytes.Contains(b, []byte(`"ack":"heartbeat","status":"ok"`)) {
				f.Errorf("a heartbeat is answered with %s, %v", b, err)
				return
			}
			f.beats.Add(1)
			time.Sleep(10 * time.Millisecond)
		}
	})
	f.quiet = func() { end.Store(true); work.Wait() }
	f.Cleanup(f.quiet)
}

// serves tells of what has to go on, whatever the disk does: a guest that has a
// session keeps it and is answered, and a new one gets one.
func (f *faultLab) serves() {
	f.Helper()
	beats := f.beats.Load()
	f.until("heartbeats go on", func() error {
		if f.beats.Load() < beats+20 {
			return errors.New("they do not")
		}
		return nil
	})
	conn, err := dialWire(f.port, "late")
	if err != nil {
		f.Fatalf("a new guest: %v", err)
	}
	defer conn.Close()
	if err := conn.send([]byte(`{"type":"subscribe","topic":"bench.load","from":"start"}`)); err != nil {
		f.Fatal(err)
	}
	if b, err := conn.receive(); err != nil || !bytes.Contains(b, []byte(`"status":"ok"`)) {
		f.Fatalf("a new guest's subscription: %s, %v", b, err)
	}
}

// replays tells whether what a guest has published can be read from the disk, and
// whether what is there is sound, seen from beside castrad.
func (f *faultLab) replays() {
	f.Helper()
	acked := f.load.all[0].count.Load()
	out := f.castractl("bus", "tail", "--topic", "load.wire0", "--from", "1", "--no-follow", "-o", "cat")
	if got := int64(strings.Count(out, "\n")); got < acked || acked == 0 {
		f.Errorf("%d records can be replayed of %d acknowledged", got, acked)
	}
	f.castractl("bus", "verify")
}

// state is what castractl status says of castrad.
func (f *faultLab) state() string {
	f.Helper()
	var st bus.Status
	if err := json.Unmarshal([]byte(f.castractl("status", "--json")), &st); err != nil {
		f.Fatal(err)
	}
	return st.Broker.State
}

func (f *faultLab) untilState(want string) {
	f.Helper()
	f.until("castrad is "+want, func() error {
		if got := f.state(); got != want {
			return errors.New("it is " + got)
		}
		return nil
	})
}

// recovers is the end of each test, the fault being over: without anybody's
// help all goes on, and of what was acknowledged nothing is lost.
func (f *faultLab) recovers(code string) {
	f.Helper()
	f.load.goOn(1000)
	f.untilState("running")
	records := f.ends()
	for _, p := range f.load.all[:publishers] {
		if n := p.dials.Load(); n != 1 {
			f.Errorf("%s had %d sessions", p.vm, n)
		}
	}
	n := f.load.refusedWith(code)
	if n == 0 {
		f.Errorf("nothing was refused with %s", code)
	}
	f.Logf("%d refused with %s; %d records, %d acknowledged: none lost, none doubled", n, code, records, f.load.acked())
}

// ends stops publishers and castrad in good order, and counts the records: none is lost.
func (f *faultLab) ends() (records int) {
	f.Helper()
	f.load.finish()
	f.serves()
	f.replays()
	f.quiet()
	f.stop("castrad", f.castrad)
	return f.load.check()
}

// inject makes castrad's system calls fail as strace's -e inject=… says, those on
// paths alone if there are any, until the function that it gives is called.
func (f *faultLab) inject(calls, what string, paths ...string) (end func()) {
	f.Helper()
	return f.injectInto(strconv.Itoa(f.castrad.Process.Pid), calls, what, paths...)
}

func (l *lab) injectInto(pid, calls, what string, paths ...string) (end func()) {
	l.Helper()
	out := l.path("strace.out")
	_ = os.Remove(out) // of the fault before
	argv := sudo("strace", "--quiet=all", "-f", "-p", pid, "-o", out,
		"-e", "trace="+calls, "-e", "inject="+calls+":"+what)
	for _, path := range paths {
		argv = append(argv, "-P", path)
	}
	cmd := l.start("strace", nil, argv...)
	l.until("the fault is injected", func() error {
		b, err := os.ReadFile(out)
		begun := strings.HasPrefix(what, "delay_enter") && bytes.Contains(b, []byte(calls+"(")) // it is marked when it ends
		if err == nil && !bytes.Contains(b, []byte("INJECTED")) && !begun {
			err = fmt.Errorf("strace has seen %q", b)
		}
		return err
	})
	return func() { l.stop("strace", cmd) }
}

// Syncs fail, one on each thread that the committer runs on until the fault is
// seen. What the kernel made of the pages is unknown, so nothing of such a write
// counts, and a new segment takes what comes next.
func TestFaultSync(t *testing.T) {
	f := startFaultLab(t, "")
	for f.load.refusedWith("storage-full") == 0 { // it may hit what castra-guestd sent, and retries
		f.inject("fdatasync", "error=EIO:when=1")()
		f.untilFile("castrad.log", "degraded: disk error: publishes are refused")
		f.load.goOn(100)
	}
	f.recovers("storage-full")
	segs, err := filepath.Glob(f.path("log/bus/host/*.jsonl"))
	if err != nil || len(segs) < 2 {
		t.Errorf("after a sync that failed there is %d segment, %v; it was to be left", len(segs), err)
	}
}

// One single sync fails, in all of castrad, and one single write: each costs the
// records that it was for, and the next ones go to a new segment at once.
func TestFaultOnce(t *testing.T) {
	f := startFaultLab(t, "")
	for _, call := range []string{"fdatasync", "pwrite64"} {
		// It may hit what castra-guestd sent alone, and retries: then once more.
		for before := f.load.refusedWith("storage-full"); f.load.refusedWith("storage-full") == before; {
			failed, newest := f.logged("degraded: disk error"), f.segments()
			// Of this file: what comes after the fault is in another one.
			f.inject(call, "error=EIO:when=1", newest[len(newest)-1])()
			f.until("a write has failed", func() error {
				if f.logged("degraded: disk error") == failed {
					return errors.New("castrad does not say so")
				}
				return nil
			})
			f.load.goOn(1000)
			f.untilState("running")
			if now := f.segments(); len(now) != len(newest)+1 {
				t.Errorf("after one %s that failed the segments are %q, and were %q", call, now, newest)
			}
		}
	}
	f.recovers("storage-full")
}

// logged counts what castrad has said.
func (f *faultLab) logged(what string) int {
	f.Helper()
	b, err := os.ReadFile(f.path("castrad.log"))
	if err != nil {
		f.Fatal(err)
	}
	return bytes.Count(b, []byte(what))
}

// segments gives the host stream's files, oldest first.
func (l *lab) segments() []string {
	l.Helper()
	segs, err := filepath.Glob(l.path("log/bus/host/*.jsonl"))
	if err != nil || len(segs) == 0 {
		l.Fatalf("segments: %q, %v", segs, err)
	}
	return segs
}

// A segment cannot be cut to its size when it is full, the next one cannot be
// created, its directory not be synced.
func TestFaultRotation(t *testing.T) {
	f := startFaultLab(t, `segment_size = "256KiB"`)
	for _, step := range []struct {
		call  string
		lasts bool // the next segment has it, too
	}{{"ftruncate", false}, {"openat", true}, {"fsync", true}} {
		before := f.load.refusedWith("storage-full")
		end := f.inject(step.call, "error=EIO")
		f.until("publishes are refused", func() error {
			if f.load.refusedWith("storage-full") == before {
				return errors.New("none is")
			}
			return nil
		})
		if step.lasts {
			f.untilState("degraded: disk error")
		}
		f.serves()
		end()
		f.load.goOn(500)
		f.untilState("running")
	}
	f.recovers("storage-full")
}

// What is written behind the host stream cannot be: the VMs' streams, their ids,
// the guests' cursors. Publishes go on and are acknowledged, status, D-Bus and the
// journal tell, and in the end all is complete.
func TestFaultBehind(t *testing.T) {
	f := startFaultLab(t, `vm_retention_size = "512KiB"`) // segments of 64 KiB
	states := f.states()
	sub, err := dialWire(f.port, "reader")
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Close()
	reads := func(frame string) []byte {
		t.Helper()
		b := []byte(nil)
		err := sub.send([]byte(frame))
		if err == nil {
			b, err = sub.receive()
		}
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if b := reads(`{"type":"subscribe","topic":"broadcast","cursor":"c"}`); !bytes.Contains(b, []byte(`"status":"ok"`)) {
		t.Fatalf("%s", b)
	}
	for _, behind := range []struct{ dir, part, state string }{
		{"log/bus/vm", "vm-streams", "degraded: VM streams: disk read-only"},
		{"state/ids", "vm-streams", "degraded: VM streams: disk read-only"},
		{"state/cursors", "cursors", "degraded: cursors: disk read-only"},
	} {
		end := f.readOnly(behind.dir)
		if behind.part == "cursors" {
			f.castractl("bus", "publish", `{"n":1}`)
			b, err := sub.receive()
			var delivery struct{ Seq uint64 }
			if err == nil {
				err = json.Unmarshal(b, &delivery)
			}
			if err == nil {
				err = sub.send(fmt.Appendf(nil, `{"type":"ack","ack":"publish","subscription":"broadcast","seq":%d}`, delivery.Seq))
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		f.untilState(behind.state)
		f.advised(behind.part, "disk read-only", "see why "+f.path(behind.dir))
		states.until(behind.state)
		f.load.goOn(1000)
		f.serves()
		end()
		f.untilState("running")
		states.until("running")
	}
	f.load.finish()
	f.quiet()
	f.stop("castrad", f.castrad)
	f.load.check() // that the VMs' streams are complete, too
	if n := len(f.load.refusals); n > 0 {
		t.Errorf("publishes were refused: %v", f.load.refusals)
	}
}

// Guests are let in while the disk does not answer whoever registers a VM.
func TestFaultRegistry(t *testing.T) {
	f := startFaultLab(t, "")
	added := make(chan error, 1) // for the one result
	go func() {
		for !f.traced() && t.Context().Err() == nil {
			time.Sleep(10 * time.Millisecond)
		}
		_, err := f.tryCastractl("vm", "add", "late", "--no-key")
		added <- err
	}()
	end := f.inject("fsync", "delay_enter=15s", f.path("state/vms"))
	f.connect("newcomer")
	if list := f.castractl("vm", "list"); strings.Contains(list, "late") {
		t.Errorf("the disk had answered by then:\n%s", list)
	}
	end()
	if err := <-added; err != nil {
		t.Error(err)
	}
	f.load.finish()
	f.quiet()
	f.stop("castrad", f.castrad)
	f.load.check()
}
