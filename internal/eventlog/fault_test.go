package eventlog

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/castrabus/castra/internal/bubble"
)

// sickFS is the machine's file system with a fault that a test turns on.
type sickFS struct {
	FS
	write, sync, create atomic.Pointer[error]
}

func (s *sickFS) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	if err := s.create.Load(); err != nil && flag&os.O_EXCL != 0 {
		return nil, *err
	}
	f, err := s.FS.OpenFile(name, flag, perm)
	return sickFile{f, s}, err
}

type sickFile struct {
	File
	fs *sickFS
}

func (f sickFile) WriteAt(b []byte, off int64) (int, error) {
	if err := f.fs.write.Load(); err != nil {
		n, _ := f.File.WriteAt(b[:len(b)/2], off)
		return n, *err
	}
	return f.File.WriteAt(b, off)
}

func (f sickFile) Sync() error {
	if err := f.fs.sync.Load(); err != nil {
		return *err
	}
	return f.File.Sync()
}

// A write, a sync or a rotation that fails refuses its records and nothing
// else; the log goes on by itself, without a hole and without the refused.
func TestDiskFaults(t *testing.T) {
	for _, c := range []struct {
		name string
		at   func(*sickFS) *atomic.Pointer[error]
		err  error
		full bool
	}{
		{"write ENOSPC", func(s *sickFS) *atomic.Pointer[error] { return &s.write }, syscall.ENOSPC, true},
		{"write EIO", func(s *sickFS) *atomic.Pointer[error] { return &s.write }, syscall.EIO, false},
		{"sync EIO", func(s *sickFS) *atomic.Pointer[error] { return &s.sync }, syscall.EIO, false},
		{"rotation EROFS", func(s *sickFS) *atomic.Pointer[error] { return &s.create }, syscall.EROFS, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			sick := &sickFS{FS: OS}
			o := testOptions(t.TempDir())
			o.FS, o.PerVM = sick, nil
			states := make(chan State, 100)
			o.OnState = func(s State) { states <- s }
			l := mustOpen(t, o)
			big := `"` + strings.Repeat("x", 9000) + `"`
			want := map[string]bool{}
			next := uint64(1)
			try := func(id string) error {
				seq, refused := offer(t, l, "web1", "t", id, big)
				if refused == nil {
					if seq != next {
						t.Fatalf("%s is %d, want %d", id, seq, next)
					}
					next++
					want[id] = true
				}
				return refused
			}
			for i := range 5 {
				if err := try(fmt.Sprint("before", i)); err != nil {
					t.Fatal(err)
				}
			}
			c.at(sick).Store(&c.err)
			failed := 0
			for i := range 20 { // enough for the rotation to come up
				var we *WriteError
				if err := try(fmt.Sprint("during", i)); errors.As(err, &we) {
					failed++
					if we.Full != c.full || !errors.Is(err, c.err) {
						t.Fatalf("refused with %v", err)
					}
				}
			}
			if failed == 0 {
				t.Fatal("nothing was refused")
			}
			if s := <-states; s.Degraded == "" {
				t.Errorf("told %+v", s)
			}
			c.at(sick).Store(nil)
			for s := range states { // it recovers with nobody publishing
				if s.Degraded == "" {
					break
				}
			}
			for i := range 5 {
				if err := try(fmt.Sprint("after", i)); err != nil {
					t.Fatal(err)
				}
			}
			mustClose(t, l)
			o.FS = nil
			l = mustOpen(t, o)
			defer mustClose(t, l)
			got := readAll(t, l.NewReader(1))
			for i, line := range got {
				id := strings.Fields(line)[3]
				if !want[strings.Trim(id, `"`)] || !strings.HasPrefix(line, fmt.Sprint(i+1, " ")) {
					t.Errorf("%.40s was not acknowledged under this number", line)
				}
			}
			if len(got) != len(want) {
				t.Errorf("%d records, %d were acknowledged", len(got), len(want))
			}
		})
	}
}

// A log that syncs every so often goes on doing so after a disk that was full, or that
// failed where a segment ended.
func TestLazySyncAfterFault(t *testing.T) {
	for _, at := range []string{"write", "rotation"} {
		t.Run(at, func(t *testing.T) { bubble.Test(t, func(t *testing.T) { testLazySyncAfterFault(t, at) }) })
	}
}

func testLazySyncAfterFault(t *testing.T, at string) {
	sick := &sickFS{FS: &sharedFS{FS: newSimDisk(rand.New(rand.NewPCG(1, 1)))}}
	o := testOptions("/log")
	o.FS, o.PerVM, o.SyncEvery = sick, nil, 100*time.Millisecond
	l := mustOpen(t, o)
	publish(t, l, "web1", "t", "", `"`+strings.Repeat("x", 40_000)+`"`)
	err, payload := error(syscall.ENOSPC), "1"
	if at == "write" {
		sick.write.Store(&err)
	} else {
		payload = `"` + strings.Repeat("x", 40_000) + `"`
		sick.sync.Store(&err)
	}
	if _, refused := offer(t, l, "web1", "t", "", payload); refused == nil {
		t.Fatal("nothing was refused")
	}
	time.Sleep(2 * o.SyncEvery)
	sick.write.Store(nil)
	sick.sync.Store(nil)
	for range 3 {
		publish(t, l, "web1", "t", "", "1")
		time.Sleep(2 * o.SyncEvery)
		synctest.Wait()
		if durable, committed := l.durable.Load(), l.Committed(); durable != committed {
			t.Errorf("synced up to %d of %d", durable, committed)
		}
	}
	mustClose(t, l)
}

// The timer of a fault may fire, and a publisher who has his turn first find that it is
// over. The log does not call itself full then, for room that nobody asked for.
func TestRetryOfALogThatIsWell(t *testing.T) {
	disk := newSimDisk(rand.New(rand.NewPCG(1, 1)))
	o := testOptions("/log")
	o.FS, o.PerVM, o.SegmentSize = disk, nil, 16<<10
	l, _, err := open(o)
	if err != nil {
		t.Fatal(err)
	}
	disk.noRoom = true
	if commitOf(l, 1) == nil || l.State().Degraded == "" {
		t.Fatal("a full disk takes a record")
	}
	disk.noRoom = false
	if err := commitOf(l, 1); err != nil {
		t.Fatal(err)
	}
	disk.noRoom = true
	if l.retry(); l.State().Degraded != "" {
		t.Errorf("it is %+v", l.State())
	}
	if err := commitOf(l, 1); err != nil {
		t.Error(err)
	}
}

// A fault that is over before anybody could be told of it is told all the same.
func TestShortFaultIsTold(t *testing.T) {
	sick := &sickFS{FS: OS}
	o := testOptions(t.TempDir())
	o.FS, o.PerVM = sick, nil
	states, goOn := make(chan string), make(chan struct{})
	o.OnState = func(s State) { states <- s.Degraded; <-goOn }
	l := mustOpen(t, o)
	fault := func() {
		sick.sync.Store(new(error(syscall.EIO)))
		if _, refused := offer(t, l, "web1", "t", "", "1"); !errors.Is(refused, syscall.EIO) {
			t.Fatalf("refused with %v", refused)
		}
		sick.sync.Store(nil)
		publish(t, l, "web1", "t", "", "1")
	}
	fault()
	for round := range 3 {
		for _, want := range []string{CauseDiskError, ""} {
			if got := <-states; got != want {
				t.Fatalf("told %q, want %q", got, want)
			}
			if want == "" && round < 2 {
				fault() // begins and ends while OnState is still at the one before
			}
			goOn <- struct{}{}
		}
	}
	mustClose(t, l)
}

// So is a disk that did not answer in time, and then did.
func TestShortStallIsTold(t *testing.T) { bubble.Test(t, testShortStallIsTold) }

func testShortStallIsTold(t *testing.T) {
	slow := &gateFS{FS: &sharedFS{FS: newSimDisk(rand.New(rand.NewPCG(1, 1)))}}
	o := testOptions("/log")
	o.FS, o.PerVM = slow, nil
	states, goOn := make(chan string), make(chan struct{})
	o.OnState = func(s State) { states <- s.Degraded; <-goOn }
	l := mustOpen(t, o)
	stall := func() {
		b := &Batch{Entries: []Entry{{VM: "web1", Topic: []byte("t"), Payload: []byte("1")}}}
		slow.gate = make(chan struct{})
		slow.shut.Store(true)
		began := time.Now()
		if err := l.Append(t.Context(), b); !errors.Is(err, ErrStalled) {
			t.Fatal(err)
		}
		if took := time.Since(began); took != 5*time.Second {
			t.Errorf("noticed after %v", took)
		}
		slow.shut.Store(false)
		close(slow.gate)
		<-b.Done()
		waitFor(t, "the stall is over", func() bool { return l.State().Degraded == "" })
	}
	time.Sleep(time.Second) // a round that began with the log's own clock at 0 counts one tick less
	for range 100 {         // rounds that are over in time, and one timer that has seen most of them
		publish(t, l, "web1", "t", "", "1")
		time.Sleep(70 * time.Millisecond)
	}
	stall()
	for round := range 3 {
		for _, want := range []string{CauseStalled, ""} {
			select {
			case got := <-states:
				if got != want {
					t.Fatalf("told %q, want %q", got, want)
				}
			case <-time.After(time.Hour):
				t.Fatalf("never told %q", want)
			}
			if want == "" && round < 2 {
				stall() // begins and ends while OnState is still at the one before
			}
			goOn <- struct{}{}
		}
	}
	mustClose(t, l)
}

// The last fault is told, though the log ends at once.
func TestFaultAtTheEndIsTold(t *testing.T) {
	for range 20 {
		sick := &sickFS{FS: OS}
		o := testOptions(t.TempDir())
		o.FS, o.PerVM = sick, nil
		states, goOn := make(chan string, 10), make(chan struct{})
		o.OnState = func(s State) {
			states <- s.Degraded
			if s.Degraded == "" {
				<-goOn
			}
		}
		l := mustOpen(t, o)
		for _, err := range []error{syscall.EIO, nil, syscall.ENOSPC} {
			sick.sync.Store(nil)
			if err != nil {
				sick.sync.Store(&err)
			}
			if _, refused := offer(t, l, "web1", "t", "", "1"); !errors.Is(refused, err) {
				t.Fatal(refused)
			}
			for err == nil && <-states != "" { // it is told of when the log is well
			}
		}
		l.quitOnce.Do(func() { close(l.quit) })
		<-l.done
		close(goOn)
		mustClose(t, l)
		last := ""
		for len(states) > 0 {
			last = <-states
		}
		if last != CauseFull {
			t.Fatalf("the last told was %q", last)
		}
	}
}
