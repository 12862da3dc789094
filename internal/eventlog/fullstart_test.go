package eventlog

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bubble"
)

// fullFS is a file system that has no room while it is full: what is there may be
// written over, and cut.
type fullFS struct {
	FS
	full, inodes atomic.Bool // of bytes; of files, too
	spare        string      // a directory on another disk, that has room
}

func (s *fullFS) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	other := s.spare != "" && strings.HasPrefix(name, s.spare)
	none := s.inodes.Load() && flag&os.O_CREATE != 0 && !other
	if none {
		flag &^= os.O_CREATE
	}
	f, err := s.FS.OpenFile(name, flag, perm)
	if none && errors.Is(err, fs.ErrNotExist) {
		err = &fs.PathError{Op: "open", Path: name, Err: syscall.ENOSPC}
	}
	if other {
		return f, err
	}
	return fullFile{f, s}, err
}

func (s *fullFS) Mkdir(name string, perm fs.FileMode) error {
	if s.full.Load() { // nothing makes one in spare
		return &fs.PathError{Op: "mkdir", Path: name, Err: syscall.ENOSPC}
	}
	return s.FS.Mkdir(name, perm)
}

type fullFile struct {
	File
	fs *fullFS
}

func (f fullFile) WriteAt(b []byte, off int64) (int, error) {
	size, err := f.Size()
	if err == nil && f.fs.full.Load() && off+int64(len(b)) > size {
		return 0, syscall.ENOSPC
	}
	return f.File.WriteAt(b, off)
}

func (f fullFile) Preallocate(off, n int64) error {
	if f.fs.full.Load() {
		return syscall.ENOSPC
	}
	return f.File.Preallocate(off, n)
}

// A start on a full disk serves what is there, takes nothing, and goes on by itself
// when there is room; whatever a crash left to be done, and however often it starts.
func TestStartOnFullDisk(t *testing.T) {
	for _, left := range []string{"a torn tail", "a torn first record", "copies", "copies on another disk", "copies of a lazy log", "all of it"} {
		for _, inodes := range []bool{false, true} {
			t.Run(fmt.Sprint(left, ", inodes ", inodes), func(t *testing.T) {
				bubble.Test(t, func(t *testing.T) { testStartOnFullDisk(t, left, inodes) })
			})
		}
	}
}

func testStartOnFullDisk(t *testing.T, left string, inodes bool) {
	disk := newSimDisk(rand.New(rand.NewPCG(1, 1)))
	full := &fullFS{FS: &sharedFS{FS: disk}}
	o := testOptions("/log")
	o.FS = full
	var cuts []Cut
	o.OnCut = func(c Cut) { cuts = append(cuts, c) }
	if strings.Contains(left, "another") {
		full.spare = o.Dir
	}
	if strings.Contains(left, "lazy") {
		o.SyncEvery = time.Hour
	}
	l := mustOpen(t, o)
	const records = 3
	for i := range records {
		publish(t, l, "web1", "t", fmt.Sprint(i), "1")
	}
	mustClose(t, l)
	segment, torn := filepath.Join(o.Dir, segmentName(1)), `{"crc":"0123`
	if strings.Contains(left, "first") {
		segment = filepath.Join(o.Dir, segmentName(records+1))
	}
	if strings.Contains(left, "torn") || strings.Contains(left, "all") {
		appendTo(t, o.FS, segment, torn)
	} else {
		torn = ""
	}
	if strings.Contains(left, "cop") || strings.Contains(left, "all") {
		err := errors.Join(o.FS.Remove(o.PerVM.PositionFile), o.FS.Remove(filepath.Join(o.PerVM.IDDir, "web1"+idSuffix)),
			o.FS.Remove(filepath.Join(o.PerVM.Dir, "web1", segmentName(1))), o.FS.Remove(filepath.Join(o.PerVM.Dir, "web1")))
		if err != nil {
			t.Fatal(err)
		}
	}
	full.full.Store(true)
	full.inodes.Store(inodes)
	for start := range 3 {
		var rec *Recovery
		var err error
		if l, rec, err = Open(o); err != nil || rec.Last != records || rec.Cut != nil {
			t.Fatal(rec, err)
		}
		time.Sleep(10 * retryInterval)
		if _, refused := offer(t, l, "web1", "t", "", "1"); !isFull(refused) || l.State().Degraded != CauseFull {
			t.Errorf("refused with %v, and it is %+v", refused, l.State())
		}
		if _, refused := offer(t, l, "web1", "t", "0", "1"); !isFull(refused) {
			t.Errorf("a retry: %v", refused)
		}
		r, first := readFirst(t, l, "web1")
		r.Close()
		if n := len(readAll(t, l.NewReader(1))); n != records || first.Seq != 1 {
			t.Errorf("%d records are read; of the VM's the first is %d", n, first.Seq)
		}
		if start == 2 {
			break
		}
		if closed := l.Close(); closed != nil && !isFull(closed) {
			t.Fatal(closed)
		}
	}
	defer mustClose(t, l)
	if got := contentsOf(t, o.FS, segment); !strings.HasSuffix(got, torn) {
		t.Errorf("the segment has %q", got)
	}
	full.full.Store(false)
	full.inodes.Store(false)
	time.Sleep(10 * retryInterval)
	if s := l.State(); s.Degraded != "" {
		t.Fatalf("there is room, and it is %+v", s)
	}
	asides := 0
	if torn != "" {
		asides = 1
	}
	if len(cuts) != asides {
		t.Fatalf("told of %+v", cuts)
	}
	for _, c := range cuts {
		if got := contentsOf(t, o.FS, c.Aside); got != torn {
			t.Errorf("%q is kept aside", got)
		}
	}
	if entries, err := o.FS.ReadDir(o.Dir); err != nil || strings.Count(fmt.Sprint(entries), ".cut-") > 0 && asides == 0 {
		t.Error(entries, err)
	}
	if seq := publish(t, l, "web1", "t", "0", "1"); seq != 1 {
		t.Errorf("a retry is stored as record %d", seq)
	}
	if seq := publish(t, l, "web1", "t", "", "1"); seq != records+1 {
		t.Errorf("the next record is %d", seq)
	}
	if n := len(readAll(t, l.NewReader(1))); n != records+1 {
		t.Errorf("%d records are read", n)
	}
}
