package eventlog

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/castrabus/castra/internal/bubble"
)

// gateFS lets no sync through while shut until the gate is open.
type gateFS struct {
	FS
	shut atomic.Bool
	gate chan struct{}
}

func (g *gateFS) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	f, err := g.FS.OpenFile(name, flag, perm)
	return gateFile{f, g}, err
}

type gateFile struct {
	File
	fs *gateFS
}

func (f gateFile) Sync() error {
	if f.fs.shut.Load() {
		<-f.fs.gate
	}
	return f.File.Sync()
}

// unreadableFS cannot read one file.
type unreadableFS struct {
	FS
	bad atomic.Pointer[string]
}

func (u *unreadableFS) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	if bad := u.bad.Load(); bad != nil && name == *bad {
		return nil, &fs.PathError{Op: "open", Path: name, Err: syscall.EIO}
	}
	return u.FS.OpenFile(name, flag, perm)
}

// heldReadFS holds a read of one file before and after it.
type heldReadFS struct {
	FS
	path string
	held chan chan struct{} // nil: nothing is held
}

func (h *heldReadFS) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	f, err := h.FS.OpenFile(name, flag, perm)
	if h.held == nil || name != h.path || flag != os.O_RDONLY {
		return f, err
	}
	return heldReadFile{f, h.held}, err
}

type heldReadFile struct {
	File
	held chan chan struct{}
}

func (f heldReadFile) hold() {
	goOn := make(chan struct{})
	f.held <- goOn
	<-goOn
}

func (f heldReadFile) ReadAt(b []byte, off int64) (int, error) {
	f.hold()
	defer f.hold()
	return f.File.ReadAt(b, off)
}

// Ids that are read while their file is cut back and written anew are not taken for
// all that there are, though both are over before the read is.
func TestIDsReadDuringReset(t *testing.T) {
	o := testOptions(t.TempDir())
	disk := &heldReadFS{FS: OS, path: filepath.Join(o.PerVM.IDDir, "web1"+idSuffix)}
	o.FS = disk
	l, _, err := open(o)
	if err != nil {
		t.Fatal(err)
	}
	p := l.perVM
	b := &Batch{done: make(chan struct{}, 1), Entries: []Entry{{VM: "web1", Topic: []byte("t"), ID: []byte("a")}}}
	err = p.ids.acquire(t.Context(), b)
	if err == nil {
		l.commit(b)
		err = p.copyNew()
	}
	if err != nil || b.Entries[0].Seq != 1 {
		t.Fatal(b.Entries[0], err)
	}
	p.ids.forget("web1")
	disk.held = make(chan chan struct{})
	type found struct {
		seq uint64
		err error
	}
	looked := make(chan found, 1) // for the one result
	go func() {
		seq, err := lookup(l, "web1", "a")
		looked <- found{seq, err}
	}()
	before := <-disk.held
	p.lost = true // a sync has failed
	p.forget()
	if _, err := p.stream([]byte("web1")); err != nil { // cuts the file
		t.Fatal(err)
	}
	close(before)
	after := <-disk.held
	if err := p.copyNew(); err != nil {
		t.Fatal(err)
	}
	close(after)
	if got := <-looked; got.err == nil && got.seq != 1 {
		t.Errorf("the id of record 1 is looked up as %d", got.seq)
	}
	disk.held = nil
	if seq, err := lookup(l, "web1", "a"); seq != 1 || err != nil {
		t.Errorf("looked up again, it is %d, %v", seq, err)
	}
	if err := l.finish(); err != nil {
		t.Error(err)
	}
}

// Ids that cannot be read refuse their own VM's records that have one, and
// nothing else; when they can be read again all is well.
func TestUnreadableIDs(t *testing.T) {
	sick := &unreadableFS{FS: OS}
	o := logBeyond(t)
	o.FS = sick
	writeIDs(t, o, "web1", 3)
	l := mustOpen(t, o)
	defer mustClose(t, l)
	path := filepath.Join(o.PerVM.IDDir, "web1"+idSuffix)
	sick.bad.Store(&path)
	b := &Batch{Entries: []Entry{
		{VM: "web1", Topic: []byte("t"), ID: []byte("web1-2")},
		{VM: "web2", Topic: []byte("t"), ID: []byte("web1-2")},
		{VM: "web1", Topic: []byte("t")},
	}}
	if err := l.Append(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	var we *WriteError
	if err := b.Entries[0].Err; !errors.As(err, &we) || !errors.Is(err, syscall.EIO) || we.Full {
		t.Errorf("without its ids: %v", err)
	}
	for _, e := range b.Entries[1:] {
		if e.Err != nil || e.Seq == 0 {
			t.Errorf("refused too: %+v", e)
		}
	}
	if s := l.State(); s.Degraded != "" {
		t.Errorf("the log is %s", s.Degraded)
	}
	sick.bad.Store(nil)
	if got := publish(t, l, "web1", "t", "web1-2", "1"); got != 2 {
		t.Errorf("a retry got %d, want 2", got)
	}
}

// Where nothing can be dropped from memory, a publisher waits for a while and
// is refused.
func TestNoRoomForIDs(t *testing.T) {
	dir := t.TempDir()
	bubble.Test(t, func(t *testing.T) {
		x := newIDIndex(OS, dir, time.Second, func() (uint64, bool) { return 0, true })
		x.budget = 1
		held, err := idsOf(t, x, "web1")
		if err != nil {
			t.Fatal(err)
		}
		b, err := idsOf(t, x, "web2")
		if err == nil {
			t.Error("there was room")
		}
		x.release(b)
		x.release(held)
		if x.bytes != 0 || len(x.tables) != 0 {
			t.Errorf("%d bytes in %d tables are left", x.bytes, len(x.tables))
		}
	})
}

// idsOf acquires the ids of a VM, and gives why they are not to be had.
func idsOf(t *testing.T, x *idIndex, vm string) (*Batch, error) {
	t.Helper()
	b := &Batch{Entries: []Entry{{VM: vm, ID: []byte("x")}}}
	if err := x.acquire(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	return b, b.tables[0].err
}

// hangFS does not answer who opens a file of ids.
type hangFS struct {
	FS
	hang chan struct{}
}

func (h *hangFS) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	if filepath.Ext(name) == idSuffix {
		<-h.hang
	}
	return h.FS.OpenFile(name, flag, perm)
}

// Where the disk does not answer who reads ids, publishers are told so after a while,
// and served when it does.
func TestIDsOnADiskThatHangs(t *testing.T) {
	dir := t.TempDir()
	bubble.Test(t, func(t *testing.T) {
		disk := &hangFS{FS: OS, hang: make(chan struct{})}
		x := newIDIndex(disk, dir, 5*time.Second, func() (uint64, bool) { return 0, true })
		for i := range 2 * idLoads {
			b, err := idsOf(t, x, fmt.Sprint("web", i))
			if !errors.Is(err, ErrNotQueued) {
				t.Errorf("told %v", err)
			}
			x.release(b)
		}
		close(disk.hang)
		synctest.Wait()
		b, err := idsOf(t, x, "web1")
		if err != nil {
			t.Error(err)
		}
		x.release(b)
	})
}
