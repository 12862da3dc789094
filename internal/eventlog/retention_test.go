package eventlog

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/castrabus/castra/internal/bubble"
)

// segmentsIn counts the segments in a directory of the disk.
func segmentsIn(t *testing.T, o Options, dir string) int {
	t.Helper()
	st := &stream{fs: o.FS, dir: dir}
	if err := st.load(); err != nil {
		t.Fatal(err)
	}
	return len(st.segs)
}

// sharedFS lets several goroutines have a simulated disk, which is made for one.
type sharedFS struct {
	FS
	mu sync.Mutex
}

func (s *sharedFS) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f, err := s.FS.OpenFile(name, flag, perm)
	return &sharedFile{f, s}, err
}

func (s *sharedFS) ReadDir(dir string) ([]fs.DirEntry, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.FS.ReadDir(dir)
}

func (s *sharedFS) do(f func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return f()
}

func (s *sharedFS) Mkdir(dir string, perm fs.FileMode) error {
	return s.do(func() error { return s.FS.Mkdir(dir, perm) })
}

func (s *sharedFS) Rename(from, to string) error {
	return s.do(func() error { return s.FS.Rename(from, to) })
}

func (s *sharedFS) Remove(name string) error { return s.do(func() error { return s.FS.Remove(name) }) }

func (s *sharedFS) SyncDir(dir string) error { return s.do(func() error { return s.FS.SyncDir(dir) }) }

type sharedFile struct {
	File
	fs *sharedFS
}

func (f *sharedFile) ReadAt(b []byte, off int64) (int, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	return f.File.ReadAt(b, off)
}

func (f *sharedFile) WriteAt(b []byte, off int64) (int, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	return f.File.WriteAt(b, off)
}

func (f *sharedFile) Size() (int64, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	return f.File.Size()
}

func (f *sharedFile) Truncate(size int64) error {
	return f.fs.do(func() error { return f.File.Truncate(size) })
}
func (f *sharedFile) Sync() error  { return f.fs.do(f.File.Sync) }
func (f *sharedFile) Close() error { return f.fs.do(f.File.Close) }
func (f *sharedFile) Preallocate(off, n int64) error {
	return f.fs.do(func() error { return f.File.Preallocate(off, n) })
}

// Records go for their age from the host stream and from the stream of a VM that
// publishes no more, before a restart or after it, and at most a quarter of that age, or
// ten minutes, too late; the newest segment stays.
func TestRetentionByAge(t *testing.T) {
	for _, c := range []struct {
		age, late time.Duration
		restart   bool
	}{
		{2 * time.Second, time.Second, false},
		{2 * time.Second, time.Second, true},
		{40 * time.Minute, 10 * time.Minute, false},
		{40 * time.Minute, 10 * time.Minute, true},
		{72 * time.Hour, 10 * time.Minute, false},
		{72 * time.Hour, 10 * time.Minute, true},
	} {
		bubble.Test(t, func(t *testing.T) {
			o := testOptions("/log")
			o.FS = &sharedFS{FS: newSimDisk(rand.New(rand.NewPCG(1, 1)))}
			o.SegmentSize, o.PerVM.SegmentSize = 4096, 4096
			o.MaxAge, o.PerVM.MaxAge = c.age, c.age
			vm := filepath.Join(o.PerVM.Dir, "web1")
			l := mustOpen(t, o)
			for range 40 {
				publish(t, l, "web1", "t", "", `"`+strings.Repeat("x", 500)+`"`)
			}
			if c.restart {
				mustClose(t, l)
				l = mustOpen(t, o)
			}
			defer func() { mustClose(t, l) }()
			time.Sleep(c.age - time.Millisecond)
			synctest.Wait()
			if host, own := segmentsIn(t, o, o.Dir), segmentsIn(t, o, vm); host < 5 || own < 5 {
				t.Errorf("%v: before that age %d and %d segments are left", c, host, own)
			}
			time.Sleep(c.late + time.Second + 2*time.Millisecond) // a sweep takes its time
			synctest.Wait()
			if host, own := segmentsIn(t, o, o.Dir), segmentsIn(t, o, vm); host != 1 || own != 1 {
				t.Errorf("%v: %d and %d segments are left", c, host, own)
			}
		})
	}
}

// Segments go for their age, oldest first, the newest never, and none that this
// process has not seen sealed for an hour, or for that age.
func TestExpireByAge(t *testing.T) {
	now := time.Now()
	old := now.Add(-48 * time.Hour)
	fresh := now.Add(-time.Minute)
	const day = 24 * time.Hour
	for _, c := range []struct {
		what     string
		age      time.Duration
		segs     []segment
		before   uint64
		keptFrom uint64
	}{
		{"two are too old", day, []segment{{first: 1, modified: old, sealed: old}, {first: 5, modified: old, sealed: old}, {first: 9, modified: fresh}}, 100, 9},
		{"the newest stays", day, []segment{{first: 1, modified: old, sealed: old}, {first: 5, modified: old}}, 100, 5},
		{"the clock has jumped", day, []segment{{first: 1, modified: old, sealed: fresh}, {first: 5, modified: fresh}}, 100, 1},
		{"it has, and nothing may grow as old as an hour", 2 * time.Minute, []segment{{first: 1, modified: old, sealed: fresh}, {first: 5, modified: fresh}}, 100, 1},
		{"nothing may grow as old as an hour", time.Minute, []segment{{first: 1, modified: old, sealed: fresh}, {first: 5, modified: fresh}}, 100, 5},
		{"one is young", day, []segment{{first: 1, modified: fresh, sealed: old}, {first: 5, modified: fresh}}, 100, 1},
		{"it is still to be copied", day, []segment{{first: 1, modified: old, sealed: old}, {first: 5, modified: old, sealed: old}, {first: 9, modified: fresh}}, 5, 5},
	} {
		t.Run(c.what, func(t *testing.T) {
			s := &stream{fs: OS, dir: t.TempDir(), segs: c.segs}
			for _, g := range c.segs {
				if err := os.WriteFile(s.path(g.first), nil, filePerm); err != nil {
					t.Fatal(err)
				}
			}
			if _, _, err := s.expire(retention{age: c.age, before: c.before}, now, false); err != nil {
				t.Fatal(err)
			}
			files, err := os.ReadDir(s.dir)
			if err != nil || s.oldest() != c.keptFrom || files[0].Name() != segmentName(c.keptFrom) {
				t.Error(fmt.Sprint(err), s.oldest(), files)
			}
		})
	}
}

// What expires from a VM's stream under its reader is told of as a gap.
func TestVMReaderExpired(t *testing.T) {
	o := testOptions("/log")
	o.FS = newSimDisk(rand.New(rand.NewPCG(1, 1)))
	o.SegmentSize, o.PerVM.SegmentSize, o.PerVM.Retention, o.Recent = 2048, 2048, 0, 1
	l, _, err := open(o)
	if err != nil {
		t.Fatal(err)
	}
	for range 60 {
		if err := commitOf(l, 302); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.perVM.copyNew(); err != nil {
		t.Fatal(err)
	}
	r, rec := readFirst(t, l, "web1")
	defer r.Close()
	if rec.Seq != 1 {
		t.Fatal(rec.Seq)
	}
	st := &l.perVM.known("web1").st
	if _, _, err := st.expire(retention{size: 8000, before: noNumber}, time.Now(), false); err != nil {
		t.Fatal(err)
	}
	next, gaps := uint64(2), 0
	for {
		ok, err := r.Next(&rec)
		var gap *Gap
		if errors.As(err, &gap) {
			if gap.From != next || gap.To != st.oldest()-1 {
				t.Errorf("a gap from %d to %d, want it from %d to %d", gap.From, gap.To, next, st.oldest()-1)
			}
			gaps++
			next = gap.To + 1
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			break
		}
		if rec.Seq != next {
			t.Fatalf("record %d, want %d", rec.Seq, next)
		}
		next++
	}
	if gaps != 1 || next != 61 {
		t.Errorf("%d gaps, and the end at %d", gaps, next)
	}
}

// unremovableFS keeps the files in one directory, as chattr +i does.
type unremovableFS struct {
	FS
	dir   string
	tries atomic.Int32
}

func (u *unremovableFS) Remove(name string) error {
	if filepath.Dir(name) == u.dir {
		u.tries.Add(1)
		return &fs.PathError{Op: "remove", Path: name, Err: syscall.EPERM}
	}
	return u.FS.Remove(name)
}

// A segment of a VM's that cannot be removed is told of, and keeps no copies back.
func TestExpireWhatCannotBeRemoved(t *testing.T) {
	o := testOptions(t.TempDir())
	o.FS = &unremovableFS{FS: OS, dir: filepath.Join(o.PerVM.Dir, "web1")}
	o.PerVM.Retention = 128 << 10
	told := make(chan error, 100)
	o.OnError = func(err error) { told <- err }
	o.PerVM.OnError = func(err error) { t.Errorf("copying: %v", err) }
	l := mustOpen(t, o)
	defer mustClose(t, l)
	for range 10 {
		publish(t, l, "web1", "t", "", `"`+strings.Repeat("x", 30_000)+`"`)
		publish(t, l, "web2", "t", "", "1")
	}
	copied(t, l)
	if err := <-told; !errors.Is(err, syscall.EPERM) {
		t.Errorf("told %v", err)
	}
}

// freeingFS is a file system on which it takes until freed is closed to give the blocks
// of removed files back.
type freeingFS struct {
	FS
	freed chan struct{}

	mu      sync.Mutex
	removed map[string]bool
	back    int // of how many the blocks are back
}

func (s *freeingFS) Remove(name string) error {
	s.mu.Lock()
	s.removed[name] = true
	s.mu.Unlock()
	return s.FS.Remove(name)
}

func (s *freeingFS) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	f, err := s.FS.OpenFile(name, flag, perm)
	if err != nil || flag != os.O_RDONLY {
		return f, err
	}
	return freeingFile{f, s, name}, nil
}

type freeingFile struct {
	File
	fs   *freeingFS
	name string
}

func (f freeingFile) Close() error {
	s := f.fs
	s.mu.Lock()
	removed := s.removed[f.name]
	s.mu.Unlock()
	if removed {
		<-s.freed
		s.mu.Lock()
		s.back++
		s.mu.Unlock()
	}
	return f.File.Close()
}

// No publisher waits until expired segments' blocks are given back, but where they are
// begun faster than that: as many as may wait for it bound what there is. The log's end
// waits for all.
func TestNoAckWaitsForFreeing(t *testing.T) {
	for _, end := range []bool{false, true} {
		bubble.Test(t, func(t *testing.T) {
			disk := &freeingFS{FS: &sharedFS{FS: newSimDisk(rand.New(rand.NewPCG(1, 1)))}, freed: make(chan struct{}), removed: make(map[string]bool)}
			o := testOptions("/log")
			o.FS, o.SegmentSize, o.Retention, o.PerVM = disk, 4096, 2*4096, nil
			free := sync.OnceFunc(func() { close(disk.freed) })
			defer free()
			l := mustOpen(t, o)
			payload := `"` + strings.Repeat("x", 500) + `"`
			for len(disk.removed) < maxFreeing+1 {
				publish(t, l, "web1", "t", "", payload)
				synctest.Wait()
			}
			if n := segmentsIn(t, o, o.Dir); disk.back != 0 || n > 3 {
				t.Fatalf("the blocks of %d are back, and %d segments are there", disk.back, n)
			}
			ended := make(chan error, 1) // what waits for the disk
			if end {
				go func() { ended <- l.Close() }()
			} else {
				go func() {
					for range 20 { // two segments
						publish(t, l, "web1", "t", "", payload)
					}
					ended <- nil
				}()
			}
			synctest.Wait()
			select {
			case err := <-ended:
				t.Fatalf("nobody waited for the disk, %v", err)
			default:
			}
			free()
			if err := <-ended; err != nil {
				t.Fatal(err)
			}
			if !end {
				mustClose(t, l)
			}
			if disk.back != len(disk.removed) {
				t.Errorf("%d of %d files are closed", disk.back, len(disk.removed))
			}
		})
	}
}

// Of many that expire at once none waits in the committer's turn: what has no room among
// those that are given back goes when there is.
func TestManyExpireAtOnce(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		disk := &freeingFS{FS: &sharedFS{FS: newSimDisk(rand.New(rand.NewPCG(1, 1)))}, freed: make(chan struct{}), removed: make(map[string]bool)}
		o := testOptions("/log")
		o.FS, o.SegmentSize, o.MaxAge, o.PerVM = disk, 4096, time.Hour, nil
		free := sync.OnceFunc(func() { close(disk.freed) })
		defer free()
		l := mustOpen(t, o)
		payload := `"` + strings.Repeat("x", 500) + `"`
		for range 300 {
			publish(t, l, "web1", "t", "", payload)
		}
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		publish(t, l, "web1", "t", "", "1")
		if n := len(disk.removed); n != maxFreeing+1 || disk.back != 0 {
			t.Errorf("%d segments are removed, and the blocks of %d are back", n, disk.back)
		}
		free()
		synctest.Wait()
		if n := segmentsIn(t, o, o.Dir); n != 1 {
			t.Errorf("%d segments are left", n)
		}
		mustClose(t, l)
	})
}

// A segment that cannot be removed is tried once for each Release, and not on and on.
func TestReleaseOfWhatStays(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		o := testOptions("/log")
		disk := &unremovableFS{FS: &sharedFS{FS: newSimDisk(rand.New(rand.NewPCG(1, 1)))}, dir: o.Dir}
		o.FS, o.SegmentSize, o.PerVM, o.OnError = disk, 4096, nil, func(error) {}
		l := mustOpen(t, o)
		for range 30 {
			publish(t, l, "web1", "t", "", `"`+strings.Repeat("x", 500)+`"`)
		}
		before := disk.tries.Load()
		l.Release(l.Committed())
		synctest.Wait()
		if n := disk.tries.Load() - before; n != 1 {
			t.Errorf("it is tried %d times", n)
		}
		mustClose(t, l)
	})
}

// A reader that wants no more than so many bytes of the log begins with a segment.
func TestNewestIn(t *testing.T) {
	s := &stream{segs: []segment{{first: 1, size: 100}, {first: 5, size: 100}, {first: 9, size: 100}, {first: 12, size: 30}}}
	for bytes, want := range map[int64]uint64{0: 12, 29: 12, 30: 12, 129: 12, 130: 9, 330: 1, 1000: 1} {
		if got := s.newestIn(bytes); got != want {
			t.Errorf("with %d bytes it begins with %d, want %d", bytes, got, want)
		}
	}
	if got := (&stream{}).newestIn(5); got != 1 {
		t.Errorf("of an empty log it begins with %d", got)
	}
}
