package eventlog

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// waitFor waits for what another goroutine does.
func waitFor(t testing.TB, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// copied waits until the VMs' streams have everything.
func copied(t testing.TB, l *Log) {
	t.Helper()
	waitFor(t, "the VMs' streams are written", func() bool { return l.perVM.position.Load() == l.Committed() })
}

// A file in the place of a VM's stream is kept, and stands in nobody's way.
func TestFileForStream(t *testing.T) {
	o := testOptions(t.TempDir())
	place := filepath.Join(o.PerVM.Dir, "web1")
	aside := make(chan string, 1)
	o.PerVM.OnAside = func(file, name string) {
		if file == place {
			aside <- name
		}
	}
	l := mustOpen(t, o)
	defer mustClose(t, l)
	if err := os.WriteFile(place, []byte("a note"), 0o600); err != nil {
		t.Fatal(err)
	}
	publish(t, l, "web1", "t", "", "1")
	publish(t, l, "web2", "t", "", "1")
	copied(t, l)
	if got, err := os.ReadFile(<-aside); string(got) != "a note" {
		t.Errorf("%q, %v", got, err)
	}
	for _, vm := range []string{"web1", "web2"} {
		if segs, err := os.ReadDir(filepath.Join(o.PerVM.Dir, vm)); len(segs) != 1 {
			t.Errorf("%s: %v, %v", vm, segs, err)
		}
	}
	if _, err := Verify(VerifyOptions{Dir: o.Dir, VMDir: o.PerVM.Dir, Sender: "host", Owner: o.PerVM.Owner}, func(f Finding) {
		if f.Damage {
			t.Errorf("%+v", f)
		}
	}); err != nil {
		t.Error(err)
	}
}

// A VM that is forgotten leaves nothing on disk; others keep all, a reader that was
// reading its stream is told of a gap, and what comes later begins anew.
func TestForgetVM(t *testing.T) {
	for _, restarted := range []bool{false, true} { // where its stream is not known, a reader has a list of its own
		for _, early := range []bool{false, true} {
			t.Run(fmt.Sprintf("restarted %v, read early %v", restarted, early), func(t *testing.T) { testForgetVM(t, restarted, early) })
		}
	}
}

func testForgetVM(t *testing.T, restarted, early bool) {
	o := testOptions(t.TempDir())
	l := mustOpen(t, o)
	defer func() { mustClose(t, l) }()
	big := `"` + strings.Repeat("x", 20_000) + `"`
	for i := range 20 { // several segments
		publish(t, l, "gone", "t", fmt.Sprint("g", i), big)
		publish(t, l, "stays", "t", fmt.Sprint("s", i), "1")
	}
	copied(t, l)
	if restarted {
		mustClose(t, l)
		l = mustOpen(t, o)
	}
	reader, rec := readFirst(t, l, "gone")
	defer reader.Close()
	files, err := l.ListVMs(func(vm string) bool { return vm != "other" })
	if err != nil || len(files) != 2 || files[0].Written.IsZero() {
		t.Fatalf("%+v, %v", files, err)
	}
	if err := l.ForgetVM(t.Context(), "gone"); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{filepath.Join(o.PerVM.Dir, "gone"), filepath.Join(o.PerVM.IDDir, "gone.ids")} {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there: %v", path, err)
		}
	}
	// The open segment is read to its end; of what was behind it a gap tells, whether or
	// not there is a new stream by then.
	gaps, next := 0, rec.Seq
	read := func(last uint64) {
		for next < last {
			ok, err := reader.Next(&rec)
			var gap *Gap
			switch {
			case errors.As(err, &gap):
				if gap.From <= next || gap.To < gap.From {
					t.Fatalf("behind %d comes a gap from %d to %d", next, gap.From, gap.To)
				}
				gaps++
				next = gap.To
			case err != nil || !ok:
				t.Fatalf("behind %d: %v, %v", next, ok, err)
			default:
				next = rec.Seq
			}
		}
	}
	if early {
		read(l.Committed())
	}
	last := publish(t, l, "gone", "t", "anew", "2")
	copied(t, l)
	read(last)
	if gaps != 1 {
		t.Errorf("the reader was told of %d gaps", gaps)
	}
	own, err := l.NewVMReader("gone", 1)
	if err != nil {
		t.Fatal(err)
	}
	all := readAll(t, own) // what the host stream has, and then its own
	if want := fmt.Sprintf("%d gone t \"anew\" 2", last); all[len(all)-1] != want {
		t.Errorf("the last record is %s", all[len(all)-1])
	}
	if segs, err := os.ReadDir(filepath.Join(o.PerVM.Dir, "gone")); err != nil || len(segs) != 1 || segs[0].Name() != segmentName(last) {
		t.Errorf("the new stream is %v, %v", segs, err)
	}
	if found := verify(t, verifyOptions(o)); len(found) > 0 {
		t.Errorf("Verify finds %q", found)
	}
	// A checkpoint, which syncs what was written, knows of nothing that has gone.
	if err := l.ForgetVM(t.Context(), "gone"); err != nil {
		t.Fatal(err)
	}
	l.perVM.hurry()
	publish(t, l, "stays", "t", "", "3")
	copied(t, l)
	waitFor(t, "a checkpoint", func() bool { return l.perVM.saved.Load() >= last })
	if l.perVM.known("gone") != nil {
		t.Error("it is still known")
	}
}

// The ids of a VM that is forgotten are forgotten in memory too: what comes under
// them is stored.
func TestForgetVMForgetsIDs(t *testing.T) {
	l := mustOpen(t, testOptions(t.TempDir()))
	defer mustClose(t, l)
	publish(t, l, "gone", "t", "x", "1")
	copied(t, l)
	if err := l.ForgetVM(t.Context(), "gone"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if got := publish(t, l, "gone", "t", "x", "2"); got != 2 {
			t.Errorf("the id of one that was forgotten is known as %d", got)
		}
	}
}

// What stands in a VM's directory and is not the log's stays.
func TestForgetVMKeepsForeignFiles(t *testing.T) {
	o := testOptions(t.TempDir())
	l := mustOpen(t, o)
	defer mustClose(t, l)
	publish(t, l, "web1", "t", "", "1")
	copied(t, l)
	notes := filepath.Join(o.PerVM.Dir, "web1", "notes.txt")
	if err := os.WriteFile(notes, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.ForgetVM(t.Context(), "web1"); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(filepath.Dir(notes)); err != nil || len(entries) != 1 {
		t.Errorf("%v, %v", entries, err)
	}
	if files, err := l.ListVMs(func(string) bool { return true }); err != nil || len(files) > 0 {
		t.Errorf("%+v, %v", files, err)
	}
}

// A VM with a share has fewer bytes on disk, in smaller segments; and when its share
// becomes less, so does what is there already.
func TestShare(t *testing.T) {
	o := testOptions(t.TempDir())
	o.PerVM.SegmentSize, o.PerVM.Retention = 512<<10, 4<<20
	o.PerVM.Share = func(vm string) int64 {
		if vm == "small" {
			return 1 << 20
		}
		return 0
	}
	l := mustOpen(t, o)
	big := `"` + strings.Repeat("x", 60_000) + `"`
	for range 60 {
		publish(t, l, "small", "t", "", big)
		publish(t, l, "full", "t", "", big)
	}
	copied(t, l)
	sizes := func(vm string) (sizes []int64, total int64) {
		st := &stream{fs: OS, dir: filepath.Join(o.PerVM.Dir, vm)}
		if err := st.load(); err != nil {
			t.Fatal(err)
		}
		for _, g := range st.segs {
			sizes, total = append(sizes, g.size), total+g.size
		}
		return sizes, total
	}
	if s, total := sizes("small"); total > 1<<20+128<<10 || slices.Max(s) > 128<<10 {
		t.Errorf("small has %d", s)
	}
	if s, total := sizes("full"); total < 3<<20 || slices.Max(s) < 400<<10 {
		t.Errorf("full has %d", s)
	}
	mustClose(t, l)
	o.PerVM.Share = func(string) int64 { return 600 << 10 }
	l = mustOpen(t, o) // nobody publishes: it is the sweep that looks
	defer mustClose(t, l)
	waitFor(t, "full has no more than its new share", func() bool {
		_, total := sizes("full")
		return total <= 600<<10
	})
}

// unlistableFS cannot list one directory.
type unlistableFS struct {
	FS
	bad string
}

func (u *unlistableFS) ReadDir(dir string) ([]fs.DirEntry, error) {
	if dir == u.bad {
		return nil, &fs.PathError{Op: "open", Path: dir, Err: syscall.EIO}
	}
	return u.FS.ReadDir(dir)
}

// A VM whose stream cannot be looked at is told of, and keeps nothing of others'.
func TestSweepPassesOver(t *testing.T) {
	o := testOptions(t.TempDir())
	l := mustOpen(t, o)
	big := `"` + strings.Repeat("x", 60_000) + `"`
	publish(t, l, "bad", "t", "", big)
	for range 10 {
		publish(t, l, "good", "t", "", big)
	}
	copied(t, l)
	mustClose(t, l)
	o.FS = &unlistableFS{OS, filepath.Join(o.PerVM.Dir, "bad")}
	o.PerVM.Share = func(string) int64 { return 128 << 10 }
	told := make(chan error, 1)
	o.OnError = func(err error) { told <- err }
	l = mustOpen(t, o)
	defer mustClose(t, l)
	if err := <-told; !errors.Is(err, syscall.EIO) {
		t.Errorf("told %v", err)
	}
	if segs, err := os.ReadDir(filepath.Join(o.PerVM.Dir, "good")); err != nil || len(segs) > 2 {
		t.Errorf("%d segments are left, %v", len(segs), err)
	}
}
