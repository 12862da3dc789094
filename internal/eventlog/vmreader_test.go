package eventlog

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A VM's stream is read on after a sync that failed, though the host stream has
// nothing of it any more.
func TestVMReaderAfterFailedSync(t *testing.T) {
	sick := &sickFS{FS: OS}
	o := testOptions(t.TempDir())
	o.FS, o.Retention = sick, 128<<10
	var failed atomic.Bool
	o.PerVM.OnError = func(err error) { failed.Store(err != nil) }
	l := mustOpen(t, o)
	defer mustClose(t, l)
	const own = 10
	for range own {
		publish(t, l, "web1", "t", "", "1")
	}
	big := `"` + strings.Repeat("x", 20_000) + `"`
	for range 20 {
		publish(t, l, "web2", "t", "", big)
	}
	waitFor(t, "web1's records expire from the host stream", func() bool {
		l.perVM.hurry()
		return l.Oldest() > own
	})
	r, rec := readFirst(t, l, "web1")
	defer r.Close()
	before := l.perVM.resets.Load()
	waitFor(t, "a checkpoint fails", func() bool {
		waitFor(t, "one goes well", func() bool { return !failed.Load() }) // it would sync what comes now, too
		publish(t, l, "web2", "t", "", "1")
		copied(t, l)
		sick.sync.Store(new(error(syscall.EIO)))
		l.perVM.hurry()
		time.Sleep(10 * time.Millisecond) // or one from before was first, and there was nothing to sync
		sick.sync.Store(nil)
		return l.perVM.resets.Load() > before
	})
	for want := uint64(2); want <= own; want++ {
		if ok, err := r.Next(&rec); !ok || err != nil || rec.Seq != want {
			t.Fatalf("record %d is read as %d, %v, %v", want, rec.Seq, ok, err)
		}
	}
}

// Who reads a VM's stream is told of what expires from it as ever, after copying to
// another VM's has failed.
func TestVMReaderAfterFailedCopy(t *testing.T) {
	sick := &unreadableFS{FS: OS}
	o := testOptions(t.TempDir())
	o.FS, o.PerVM.Retention = sick, 256<<10
	var failed atomic.Bool
	o.PerVM.OnError = func(err error) { failed.Store(err != nil) }
	l := mustOpen(t, o)
	defer mustClose(t, l)
	big := `"` + strings.Repeat("x", 20_000) + `"`
	for range 10 {
		publish(t, l, "web1", "t", "", big)
	}
	copied(t, l)
	r, rec := readFirst(t, l, "web1")
	defer r.Close()
	bad := filepath.Join(o.PerVM.Dir, "web2", segmentName(l.Committed()+1))
	sick.bad.Store(&bad)
	publish(t, l, "web2", "t", "", "1")
	waitFor(t, "copying fails", failed.Load)
	sick.bad.Store(nil)
	for range 30 {
		publish(t, l, "web1", "t", "", big)
	}
	copied(t, l)
	for next := rec.Seq + 1; next <= l.Committed(); {
		ok, err := r.Next(&rec)
		var gap *Gap
		switch {
		case errors.As(err, &gap):
			if gap.From != next {
				t.Fatalf("behind %d comes a gap from %d to %d", next-1, gap.From, gap.To)
			}
			next = gap.To + 1
		case err != nil || !ok:
			t.Fatalf("behind %d: %v, %v", next-1, ok, err)
		default:
			next = rec.Seq + 1
		}
	}
}

// halfFS has room for a half of whatever is written below dir, while full.
type halfFS struct {
	FS
	dir  string
	full atomic.Bool
}

func (d *halfFS) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	f, err := d.FS.OpenFile(name, flag, perm)
	if err == nil && strings.HasPrefix(name, d.dir) {
		f = halfFile{f, d}
	}
	return f, err
}

type halfFile struct {
	File
	fs *halfFS
}

func (f halfFile) WriteAt(b []byte, off int64) (int, error) {
	if !f.fs.full.Load() {
		return f.File.WriteAt(b, off)
	}
	n, _ := f.File.WriteAt(b[:len(b)/2], off)
	return n, syscall.ENOSPC
}

// A disk that is full in the middle of a line leaves whole lines in a VM's stream, for
// whoever reads the file.
func TestFullDiskLeavesWholeLines(t *testing.T) {
	o := testOptions(t.TempDir())
	disk := &halfFS{FS: OS, dir: o.PerVM.Dir}
	o.FS = disk
	told := make(chan error, 10)
	o.PerVM.OnError = func(err error) { told <- err }
	l := mustOpen(t, o)
	defer mustClose(t, l)
	publish(t, l, "web1", "t", "", "1")
	copied(t, l)
	disk.full.Store(true)
	publish(t, l, "web1", "t", "", "2")
	if err := <-told; !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(o.PerVM.Dir, "web1", segmentName(1)))
	if err != nil || strings.Count(string(data), "\n") != 1 || !strings.HasSuffix(string(data), "\n") {
		t.Errorf("%v: %q", err, data)
	}
	disk.full.Store(false)
	copied(t, l)
}

// A reader that is closed where a gap was told, and used again, gives what is behind
// the gap as it is on disk.
func TestVMReaderClosedAtGap(t *testing.T) {
	o := testOptions(t.TempDir())
	o.PerVM.Retention = 128 << 10
	l := mustOpen(t, o)
	defer mustClose(t, l)
	big := `"` + strings.Repeat("x", 20_000) + `"`
	publish(t, l, "web1", "t", "", big)
	copied(t, l)
	r, err := l.NewVMReader("web1", 1)
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		publish(t, l, "web1", "t", "", big)
	}
	copied(t, l)
	r.vm.until = l.Committed() // as if it had been made now, before the segment went
	var rec Record
	var gap *Gap
	if _, err := r.Next(&rec); !errors.As(err, &gap) {
		t.Fatal(err)
	}
	r.Close()
	for range 8 { // others use the buffer
		b := buffers.Get().(*[]byte)
		defer buffers.Put(b)
		clear(*b)
	}
	if ok, err := r.Next(&rec); !ok || err != nil || rec.Seq != gap.To+1 || string(rec.Payload) != big {
		t.Errorf("behind %+v: %v, %v, record %d with %.10q", gap, ok, err, rec.Seq, rec.Payload)
	}
	r.Close()
}

// What a failed sync has left behind the last record that is synced is not damage: it
// is written anew, and until then the host stream has it.
func TestVMReaderBesideLostTail(t *testing.T) {
	sick := &sickFS{FS: OS}
	o := testOptions(t.TempDir())
	o.FS = sick
	o.OnDamage = func(d Damage) { t.Errorf("damage at %d of %s", d.Offset, d.File) }
	l, _, err := open(o) // and nobody copies but the test
	if err != nil {
		t.Fatal(err)
	}
	commit := func() {
		if err := commitOf(l, 1); err != nil {
			t.Fatal(err)
		}
		if err := l.perVM.copyNew(); err != nil {
			t.Fatal(err)
		}
	}
	commit()
	if err := l.perVM.checkpoint(); err != nil {
		t.Fatal(err)
	}
	end := l.perVM.known("web1").size
	commit()
	sick.sync.Store(new(error(syscall.EIO)))
	if err := l.perVM.checkpoint(); err == nil {
		t.Fatal("the checkpoint did not fail")
	}
	sick.sync.Store(nil)
	f, err := os.OpenFile(filepath.Join(o.PerVM.Dir, "web1", segmentName(1)), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("lost"), end+20); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := l.NewVMReader("web1", 1)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var rec Record
	for want := uint64(1); want <= 2; want++ {
		if ok, err := r.Next(&rec); !ok || err != nil || rec.Seq != want {
			t.Fatalf("record %d is read as %d, %v, %v", want, rec.Seq, ok, err)
		}
	}
	if err := errors.Join(l.perVM.finish(), l.c.closeFile()); err != nil {
		t.Error(err)
	}
}

// Damage before what is synced is told of after a failed sync, too, and what is behind it
// is read, though the host stream has nothing of it any more.
func TestVMReaderDamageBeforeLostTail(t *testing.T) {
	sick := &sickFS{FS: OS}
	o := testOptions(t.TempDir())
	o.FS, o.SegmentSize = sick, 1
	damage := 0
	o.OnDamage = func(Damage) { damage++ }
	l, _, err := open(o) // and nobody copies but the test
	if err != nil {
		t.Fatal(err)
	}
	commit := func() {
		if err := errors.Join(commitOf(l, 1), l.perVM.copyNew()); err != nil {
			t.Fatal(err)
		}
	}
	var ends []int64
	for range 4 {
		commit()
		ends = append(ends, l.perVM.known("web1").size)
	}
	if err := l.perVM.checkpoint(); err != nil {
		t.Fatal(err)
	}
	commit()
	sick.sync.Store(new(error(syscall.EIO)))
	if err := l.perVM.checkpoint(); err == nil {
		t.Fatal("the checkpoint did not fail")
	}
	sick.sync.Store(nil)
	path := filepath.Join(o.PerVM.Dir, "web1", segmentName(1))
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	copy(data[ends[0]+20:], "lost")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := l.stream.expire(retention{size: 1, before: 4}, time.Now(), false); err != nil || l.Oldest() != 4 {
		t.Fatalf("the host stream begins at %d, %v", l.Oldest(), err)
	}
	r, err := l.NewVMReader("web1", 1)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	got := readWithGaps(t, r)
	if want := []string{"1", "gap 2-2", "3", "4", "5"}; !slices.Equal(got, want) || damage == 0 {
		t.Errorf("it reads %q, want %q; told of %d damages", got, want, damage)
	}
	if err := errors.Join(l.perVM.finish(), l.c.closeFile()); err != nil {
		t.Error(err)
	}
}

// Who asks for what neither stream has any more is given all that the host's still has,
// not only what the VM's has, which keeps less.
func TestVMReaderFromHostStream(t *testing.T) {
	o := testOptions(t.TempDir())
	o.Retention, o.PerVM.Retention = 1<<20, 128<<10
	l := mustOpen(t, o)
	defer mustClose(t, l)
	for range 100 {
		publish(t, l, "web1", "t", "", `"`+strings.Repeat("x", 20_000)+`"`)
	}
	copied(t, l)
	waitFor(t, "records expire from the host stream", func() bool {
		l.perVM.hurry()
		return l.Oldest() > 1
	})
	own, err := l.OldestOf("web1")
	oldest := l.Oldest()
	if err != nil || own <= oldest {
		t.Fatalf("web1's stream begins at %d, the host's at %d, %v", own, oldest, err)
	}
	for _, from := range []uint64{1, oldest - 1, oldest, own - 1, own} {
		r, err := l.NewVMReader("web1", from)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		var rec Record
		if from < oldest {
			var gap *Gap
			if _, err := r.Next(&rec); !errors.As(err, &gap) || *gap != (Gap{From: from, To: oldest - 1}) {
				t.Errorf("from %d: %v, and the host stream begins at %d", from, err, oldest)
			}
		}
		if ok, err := r.Next(&rec); !ok || err != nil || rec.Seq != max(from, oldest) {
			t.Errorf("from %d: record %d, %v, %v", from, rec.Seq, ok, err)
		}
	}
}
