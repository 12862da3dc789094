package eventlog

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/castrabus/castra/internal/bubble"
)

// ownedFS has one directory or file that another user has taken over: it can be renamed,
// and nothing can be written in it.
type ownedFS struct {
	FS
	path  string
	owned atomic.Bool

	unreadable bool
}

func (o *ownedFS) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	if o.owned.Load() && (flag&os.O_RDWR != 0 || o.unreadable) && (name == o.path || strings.HasPrefix(name, o.path+"/")) {
		return nil, &fs.PathError{Op: "open", Path: name, Err: syscall.EACCES}
	}
	return o.FS.OpenFile(name, flag, perm)
}

func (o *ownedFS) Rename(from, to string) error {
	if from == o.path || to == o.path {
		o.owned.Store(false)
	}
	return o.FS.Rename(from, to)
}

// What one VM has on disk and cannot be written is set aside at last, so that others get
// their copies, and a start its records; nothing of it is lost, nor is a retry stored twice.
func TestOneVMsFilesAreSetAside(t *testing.T) {
	for _, when := range []string{"running", "starting"} {
		for _, what := range []string{"vm/web1", "ids/web1.ids", "ids/web1.ids unreadable"} {
			t.Run(when+" "+what, func(t *testing.T) {
				bubble.Test(t, func(t *testing.T) { testSetAside(t, when, what) })
			})
		}
	}
}

func testSetAside(t *testing.T, when, what string) {
	dir := t.TempDir()
	o := testOptions(dir)
	what, unreadable := strings.CutSuffix(what, " unreadable")
	path := filepath.Join(dir, what)
	disk := &ownedFS{FS: OS, path: path, unreadable: unreadable}
	o.FS = disk
	told, asides := make(chan error, 10), make(chan string, 10)
	o.PerVM.OnError = func(err error) { told <- err }
	o.PerVM.OnAside = func(_, name string) { asides <- name }
	l := mustOpen(t, o)
	publish(t, l, "web1", "t", "a", "1")
	publish(t, l, "web2", "t", "", "1")
	time.Sleep(time.Second)
	synctest.Wait()
	if when == "starting" {
		mustClose(t, l)
		if err := os.Remove(o.PerVM.PositionFile); err != nil { // all is to be copied again
			t.Fatal(err)
		}
		disk.owned.Store(true)
		l = mustOpen(t, o)
		if _, refused := offer(t, l, "web2", "t", "", "2"); refused == nil {
			t.Error("a record is taken before what there is was copied")
		}
	} else {
		if err := l.perVM.checkpoint(); err != nil {
			t.Fatal(err)
		}
		l.perVM.forget() // what is open stays usable
		disk.owned.Store(true)
		publish(t, l, "web1", "t", "b", "2")
	}
	time.Sleep(asideAfter - 5*time.Second)
	l.perVM.hurry() // a checkpoint that goes well is no news
	time.Sleep(time.Second)
	synctest.Wait()
	if len(asides) > 0 || len(told) != 1 {
		t.Errorf("set aside: %d, told of %d", len(asides), len(told))
	}
	time.Sleep(10 * time.Second)
	synctest.Wait()
	renamed := 1
	if what == "ids/web1.ids" && !unreadable {
		renamed = 0
	}
	if len(asides) != renamed || len(told) != 2 || l.State().Degraded != "" {
		t.Fatalf("set aside: %d, told of %d, the log is %+v", len(asides), len(told), l.State())
	}
	if err, end := <-told, <-told; !errors.Is(err, syscall.EACCES) || end != nil {
		t.Errorf("told of %v, %v", err, end)
	}
	if renamed > 0 {
		if name := <-asides; name != path+"~1" {
			t.Errorf("set aside: %s", name)
		}
	}
	publish(t, l, "web2", "t", "", "3")
	if seq := publish(t, l, "web1", "t", "a", "1"); seq != 1 {
		t.Errorf("a retry is record %d", seq)
	}
	time.Sleep(time.Second)
	synctest.Wait()
	if l.perVM.position.Load() != l.Committed() {
		t.Error("not all was copied")
	}
	r, first := readFirst(t, l, "web1")
	r.Close()
	if first.Seq != 1 {
		t.Errorf("the first record to be read is %d", first.Seq)
	}
	mustClose(t, l)
	if _, err := Verify(VerifyOptions{Dir: o.Dir, VMDir: o.PerVM.Dir, Sender: "host", Owner: o.PerVM.Owner}, func(f Finding) {
		if f.Damage {
			t.Errorf("%+v", f)
		}
	}); err != nil {
		t.Error(err)
	}
	disk.path = path + "~1" // and it is still not to be written to
	disk.owned.Store(true)
	o.SyncEvery = time.Hour // so that a start looks at all there is
	l = mustOpen(t, o)
	defer mustClose(t, l)
	publish(t, l, "web1", "t", "", "4")
	if vms, err := l.ListVMs(func(string) bool { return true }); err != nil || len(vms) != 2 {
		t.Errorf("%v, %v", vms, err)
	}
}
