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
	"syscall"
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
	f.load.finish()
	f.serves()
	f.replays()
	f.quiet()
	f.stop("castrad", f.castrad)
	records := f.load.check()
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

// inject makes castrad's system calls fail as strace's -e inject=… says, until
// the function that it gives is called.
func (f *faultLab) inject(calls, what string) (end func()) {
	f.Helper()
	return f.injectInto(strconv.Itoa(f.castrad.Process.Pid), calls, what)
}

func (l *lab) injectInto(pid, calls, what string) (end func()) {
	l.Helper()
	out := l.path("strace.out")
	argv := sudo("strace", "--quiet=all", "-f", "-p", pid, "-o", out,
		"-e", "trace="+calls, "-e", "inject="+calls+":"+what)
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
	f.inject("fdatasync", "error=EIO:when=1")()
	f.untilFile("castrad.log", "the event log takes no records")
	f.recovers("storage-full")
	segs, err := filepath.Glob(f.path("log/bus/host/*.jsonl"))
	if err != nil || len(segs) < 2 {
		t.Errorf("after a sync that failed there is %d segment, %v; it was to be left", len(segs), err)
	}
}

// No segment can be created, nor anything else opened.
func TestFaultRotation(t *testing.T) {
	f := startFaultLab(t, `segment_size = "256KiB"`)
	end := f.inject("openat", "error=EIO")
	f.untilState("degraded: disk error")
	f.serves()
	end()
	f.recovers("storage-full")
}

// mount mounts something on the lab's directory log, until the test ends.
func (l *lab) mount(args ...string) {
	l.Helper()
	l.root(append(append([]string{"mount"}, args...), l.path("log"))...)
	l.Cleanup(func() { _ = command(sudo("umount", "--lazy", l.path("log"))...).Run() })
}

// root runs a command as root.
func (l *lab) root(argv ...string) {
	l.Helper()
	if out, err := command(sudo(argv...)...).CombinedOutput(); err != nil {
		l.Fatalf("%v: %v: %s", argv, err, out)
	}
}

// mountSmall gives log a file system of its own of 64 MiB: ext4 in a file, or
// where there are no loop devices one in memory.
func (l *lab) mountSmall() {
	l.Helper()
	if err := os.Mkdir(l.path("log"), 0o755); err != nil {
		l.Fatal(err)
	}
	l.root("truncate", "--size=64M", l.path("disk"))
	l.root("mkfs.ext4", "-q", "-m", "0", l.path("disk"))
	if exec.Command("losetup", "--find").Run() == nil {
		l.mount("-o", "loop", l.path("disk"))
	} else {
		l.mount("-t", "tmpfs", "-o", "size=64m", "none")
	}
	l.root("chmod", "0777", l.path("log"))
}

// The disk is full until somebody makes room.
func TestFaultFull(t *testing.T) {
	l := newLab(t)
	l.mountSmall()
	// castrad's own files have no room either.
	l.root("mkdir", "--mode=0777", l.path("log/state"))
	if err := os.Symlink("log/state", l.path("state")); err != nil {
		t.Fatal(err)
	}
	f := l.faults("")
	var free syscall.Statfs_t
	if err := syscall.Statfs(l.path("log"), &free); err != nil {
		t.Fatal(err)
	}
	const left = 8 << 20 // more than is written while the ballast is loaded
	l.root("fallocate", "--length", fmt.Sprint(int64(free.Bavail)*free.Bsize-left), l.path("log/ballast"))
	f.untilState("degraded: disk full")
	f.serves()
	f.replays()
	f.untilState("degraded: disk full") // still, and not now and then
	l.root("rm", l.path("log/ballast"))
	f.recovers("storage-full")
}

// The disk is mounted read-only, and then writable again.
func TestFaultReadOnly(t *testing.T) {
	f := startFaultLab(t, `segment_size = "256KiB"`)
	// What is being written cannot be remounted: a read-only view of the directory,
	// made elsewhere, is laid over it.
	view := f.path("view")
	f.root("mkdir", view)
	f.root("mount", "--bind", f.path("log"), view)
	f.Cleanup(func() { _ = command(sudo("umount", "--lazy", view)...).Run() })
	f.root("mount", "-o", "remount,bind,ro", view)
	f.mount("--bind", view)
	f.untilState("degraded: disk read-only")
	f.serves()
	f.replays()
	f.root("umount", f.path("log"))
	f.recovers("storage-full")
}

// The disk does not answer for longer than castrad lets its guests wait.
func TestFaultStalled(t *testing.T) {
	f := startFaultLab(t, "")
	end := f.inject("fdatasync", "delay_enter=8s")
	f.untilState("degraded: disk stalled")
	f.serves()
	f.replays()
	f.until("publishes are refused", func() error {
		if f.load.refusedWith("storage-stalled") == 0 {
			return errors.New("none is")
		}
		return nil
	})
	end()
	f.recovers("storage-stalled")
}
