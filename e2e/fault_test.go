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

	"github.com/godbus/dbus/v5"

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

// mount mounts something on a directory of the lab's, until the test ends.
func (l *lab) mount(dir string, args ...string) {
	l.Helper()
	l.root(append(append([]string{"mount"}, args...), l.path(dir))...)
	l.Cleanup(func() { _ = command(sudo("umount", "--lazy", l.path(dir))...).Run() })
}

// root runs a command as root.
func (l *lab) root(argv ...string) {
	l.Helper()
	if out, err := command(sudo(argv...)...).CombinedOutput(); err != nil {
		l.Fatalf("%v: %v: %s", argv, err, out)
	}
}

// mountSmall gives log, and with it state, a file system of their own of 64 MiB and
// so many inodes: ext4 in a file, or where there are no loop devices one in memory.
func (l *lab) mountSmall(inodes int) {
	l.Helper()
	if err := os.Mkdir(l.path("log"), 0o755); err != nil {
		l.Fatal(err)
	}
	l.root("truncate", "--size=64M", l.path("disk"))
	l.root("mkfs.ext4", "-q", "-m", "0", "-N", fmt.Sprint(inodes), l.path("disk"))
	if exec.Command("losetup", "--find").Run() == nil {
		l.mount("log", "-o", "loop", l.path("disk"))
	} else {
		l.mount("log", "-t", "tmpfs", "-o", fmt.Sprintf("size=64m,nr_inodes=%d", inodes), "none")
	}
	l.root("chmod", "0777", l.path("log"))
	// castrad's own files have no room either.
	l.root("mkdir", "--mode=0777", l.path("log/state"))
	if err := os.Symlink("log/state", l.path("state")); err != nil {
		l.Fatal(err)
	}
}

// advised waits until status, its JSON and the journal have what is wrong with a part,
// and how it is mended. A disk that has just become full may take some more meanwhile.
func (f *faultLab) advised(part, cause, mend string) {
	f.Helper()
	f.untilFault(part, cause)
	f.until("status says that "+part+" has "+cause, func() error {
		text := f.castractl("status")
		if !strings.Contains(text, "\n"+part+": "+cause+", since ") || !strings.Contains(text, mend) {
			return fmt.Errorf("it does not say %q:\n%s", mend, text)
		}
		return nil
	})
	f.untilFile("castrad.log", mend)
}

// untilFault waits until a part has no other fault than cause, "" being none.
func (f *faultLab) untilFault(part, cause string) {
	f.Helper()
	f.until(fmt.Sprintf("%s has %q", part, cause), func() error {
		var st bus.Status
		if err := json.Unmarshal([]byte(f.castractl("status", "--json")), &st); err != nil {
			return err
		}
		now := ""
		for _, fault := range st.Broker.Faults {
			if fault.Part == part {
				now = fault.Cause
			}
		}
		if now != cause {
			return fmt.Errorf("it has %q; all is %+v", now, st.Broker)
		}
		return nil
	})
}

// The disk is full until somebody makes room.
func TestFaultFull(t *testing.T) {
	l := newLab(t)
	l.mountSmall(4096)
	f := l.faults("")
	var free syscall.Statfs_t
	if err := syscall.Statfs(l.path("log"), &free); err != nil {
		t.Fatal(err)
	}
	const left = 8 << 20 // more than is written while the ballast is loaded
	l.root("fallocate", "--length", fmt.Sprint(int64(free.Bavail)*free.Bsize-left), l.path("log/ballast"))
	f.untilState("degraded: disk full")
	f.advised("event-log", "disk full", "make room on the file system of "+f.path("log"))
	f.serves()
	f.replays()
	f.untilState("degraded: disk full") // still, and not now and then
	l.root("rm", l.path("log/ballast"))
	f.recovers("storage-full")
}

// After a power cut in the middle of a write, on a disk that is full: castrad starts,
// serves what is there, and goes on by itself when somebody has made room.
func TestFaultFullStart(t *testing.T) {
	l := newLab(t)
	l.mountSmall(4096)
	l.loadedConfig("")
	castrad := l.startCastrad("castrad")
	f := &faultLab{lab: l, castrad: castrad, beats: new(atomic.Int64), load: l.publishing()}
	f.load.goOn(1000)
	if err := castrad.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = castrad.Wait() // killed
	segs, err := filepath.Glob(l.path("log/bus/host/*.jsonl"))
	if err != nil || len(segs) == 0 {
		t.Fatal(segs, err)
	}
	const torn = `{"crc":"01234567","seq":`
	l.root("sh", "-c", `printf %s "$1" >>"$2"`, "sh", torn, segs[len(segs)-1])
	// What was still to be copied needs room, too.
	l.root("sh", "-c", `rm -r "$1"/bus/vm/* "$1"/state/ids/*`, "sh", l.path("log"))
	l.root("rm", "-f", l.path("state/vm-streams.json"))
	for range 3 { // what was removed is free when the journal says so
		l.root("sync", "--file-system", l.path("log"))
		l.root("sh", "-c", `! cat /dev/zero >>"$1" 2>"$2"`, "sh", l.path("log/ballast"), l.path("filled"))
	}

	f.castrad = l.startCastrad("castrad")
	l.answers()
	f.untilState("degraded: disk full")
	f.advised("event-log", "disk full", "make room on the file system of "+f.path("")) // the tail's, or the ids'
	f.heartbeats()
	f.serves()
	f.replays()
	f.untilState("degraded: disk full") // still, and not now and then
	if f.load.refusedWith("storage-full") == 0 {
		t.Error("nothing was refused")
	}
	l.root("rm", l.path("log/ballast"))
	f.load.goOn(1000)
	f.untilState("running")
	aside, err := os.ReadFile(segs[len(segs)-1] + ".cut-1")
	if err != nil || string(aside) != torn {
		t.Errorf("%q is kept aside, %v", aside, err)
	}
	f.untilFile("castrad.log", "an unfinished write was cut off")
	records := f.ends()
	t.Logf("%d records, %d acknowledged: none lost, none doubled", records, f.load.acked())
}

// There is room, and no inode is left for a file.
func TestFaultInodes(t *testing.T) {
	l := newLab(t)
	l.mountSmall(256)
	f := l.faults(`segment_size = "256KiB"`)
	ballast := f.path("log/ballast")
	f.root("mkdir", "--mode=0777", ballast)
	for n := 0; ; n++ {
		file, err := os.Create(filepath.Join(ballast, strconv.Itoa(n)))
		if errors.Is(err, syscall.ENOSPC) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		_ = file.Close()
	}
	f.untilState("degraded: disk full")
	f.advised("event-log", "disk full", "inodes are in use (df -i ")
	f.serves()
	f.root("rm", "-r", ballast)
	f.recovers("storage-full")
}

// readOnly makes a directory of the lab's read-only until the function that it
// gives is called. What is being written cannot be remounted: a read-only view of
// the directory, made elsewhere, is laid over it.
func (l *lab) readOnly(dir string) (end func()) {
	l.Helper()
	view := l.path("view." + filepath.Base(dir))
	l.root("mkdir", view)
	l.root("mount", "--bind", l.path(dir), view)
	l.Cleanup(func() { _ = command(sudo("umount", "--lazy", view)...).Run() })
	l.root("mount", "-o", "remount,bind,ro", view)
	l.mount(dir, "--bind", view)
	return func() {
		l.Helper()
		l.until(dir+" is writable again", func() error { // it is busy while castrad tries a file in it
			out, err := command(sudo("umount", l.path(dir))...).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
	}
}

// The disk is mounted read-only, and then writable again.
func TestFaultReadOnly(t *testing.T) {
	f := startFaultLab(t, `segment_size = "256KiB"`)
	end := f.readOnly("log")
	f.untilState("degraded: disk read-only")
	f.advised("event-log", "disk read-only", "mount -o remount,rw")
	f.serves()
	f.replays()
	end()
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

// stateSignals is castrad's state as D-Bus signals it.
type stateSignals struct {
	*lab
	signals chan *dbus.Signal
}

func (l *lab) states() *stateSignals {
	l.Helper()
	conn, err := dbus.Connect(l.hostBus)
	if err != nil {
		l.Fatal(err)
	}
	l.Cleanup(func() { _ = conn.Close() })
	s := &stateSignals{l, make(chan *dbus.Signal, 64)} // godbus queues what it has no room for
	conn.Signal(s.signals)
	if err := conn.AddMatchSignal(dbus.WithMatchObjectPath("/org/castra/Bus1"), dbus.WithMatchMember("PropertiesChanged")); err != nil {
		l.Fatal(err)
	}
	return s
}

// until waits until the state is signalled, with faults unless all is well.
func (s *stateSignals) until(want string) {
	s.Helper()
	last := "nothing"
	for end := time.After(hang); ; {
		select {
		case got := <-s.signals:
			if len(got.Body) != 3 || got.Body[0] != "org.castra.Bus1.Manager" {
				continue
			}
			changed := got.Body[1].(map[string]dbus.Variant)
			last = fmt.Sprint(changed)
			faults := changed["Faults"].Value()
			if changed["State"].Value() == want && faults != nil && (len(faults.([][]any)) > 0) == (want != "running") {
				return
			}
		case <-end:
			s.Fatalf("D-Bus never signals %q; the last was %s", want, last)
		}
	}
}

// The disk does not answer for longer than castrad lets its guests wait.
func TestFaultStalled(t *testing.T) {
	f := startFaultLab(t, "")
	end := f.inject("fdatasync", "delay_enter=8s")
	f.untilState("degraded: disk stalled")
	f.advised("event-log", "disk stalled", "keeps the disk under "+f.path("log"))
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

// traced tells whether strace has all of castrad's threads: before, a call passes by it.
func (f *faultLab) traced() bool {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", f.castrad.Process.Pid))
	for _, thread := range threads {
		b, err := os.ReadFile(thread)
		if err == nil && bytes.Contains(b, []byte("TracerPid:\t0\n")) { // else it has ended
			return false
		}
	}
	return len(threads) > 0
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
