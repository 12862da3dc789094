package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/castrabus/castra/internal/bus"
)

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
	const size = 2 << 20 // eventlog's
	if st, err := os.Stat(l.path("log/bus/journal")); err != nil || st.Size() != size {
		t.Errorf("the journal: %v, %v", st, err)
	}
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
