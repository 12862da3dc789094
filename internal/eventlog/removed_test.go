package eventlog

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/castrabus/castra/internal/bubble"
)

// Somebody removes segments, to make room, or renames them, as logrotate does, and the
// newest one with them: what is acknowledged afterwards is there after a restart, under
// numbers not given before.
func TestRemovedWhileOpen(t *testing.T) {
	for _, what := range []string{"newest", "newest renamed", "all", "directory"} {
		t.Run(what, func(t *testing.T) {
			bubble.Test(t, func(t *testing.T) {
				o := testOptions(t.TempDir())
				o.SegmentSize, o.Recent = 4096, 1 // readers read the files
				l := mustOpen(t, o)
				for range 20 {
					publish(t, l, "web1", "t", "", `"`+strings.Repeat("x", 500)+`"`)
				}
				synctest.Wait() // the VM's stream has them
				segments, err := filepath.Glob(filepath.Join(o.Dir, "*.jsonl"))
				if err != nil || len(segments) < 3 {
					t.Fatal(segments, err)
				}
				take := os.Remove
				if strings.HasPrefix(what, "newest") {
					segments = segments[len(segments)-1:]
				}
				if what == "newest renamed" {
					take = func(name string) error { return os.Rename(name, name+".1") }
				}
				for _, name := range segments {
					if err := take(name); err != nil {
						t.Fatal(err)
					}
				}
				if what == "directory" {
					if err := os.RemoveAll(o.Dir); err != nil {
						t.Fatal(err)
					}
				}
				time.Sleep(lookInterval)
				_, refused := offer(t, l, "web1", "t", "", `1`)
				if Cause(refused) != CauseRemoved {
					t.Fatalf("a segment that is gone: %v", refused)
				}
				if what == "directory" {
					if _, refused := offer(t, l, "web1", "t", "", `1`); refused == nil {
						t.Fatal("a record was taken with no directory for it")
					}
					if err := os.Mkdir(o.Dir, 0o750); err != nil {
						t.Fatal(err)
					}
					time.Sleep(2 * retryInterval)
				}
				if seq := publish(t, l, "web1", "t", "", `2`); seq != 21 {
					t.Errorf("the next record is %d", seq)
				}
				if got := l.State().Degraded; got != "" {
					t.Errorf("the log is %s", got)
				}
				if got := newestRead(t, l); got != 21 {
					t.Errorf("the newest record to be read is %d", got)
				}
				mustClose(t, l)
				l = mustOpen(t, o)
				defer func() { mustClose(t, l) }()
				if got := newestRead(t, l); got != 21 {
					t.Errorf("after a restart the newest record is %d", got)
				}
			})
		})
	}
}

// newestRead reads all that there is, gaps or not, and gives the last number.
func newestRead(t *testing.T, l *Log) (last uint64) {
	t.Helper()
	r := l.NewReader(1)
	defer r.Close()
	for {
		var rec Record
		ok, err := r.Next(&rec)
		if _, gap := errors.AsType[*Gap](err); gap {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			return last
		}
		last = rec.Seq
	}
}

// toldFS tells of each file that is synced.
type toldFS struct {
	FS
	synced chan string
}

func (f *toldFS) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	file, err := f.FS.OpenFile(name, flag, perm)
	return toldFile{file, f, name}, err
}

type toldFile struct {
	File
	fs   *toldFS
	name string
}

func (f toldFile) Sync() error {
	select {
	case f.fs.synced <- f.name:
	default:
	}
	return f.File.Sync()
}

// A journal that somebody has removed, renamed or cut short is written no more, or a power
// cut would take what only it has; the next segment has another one.
func TestJournalRemovedWhileOpen(t *testing.T) {
	for name, take := range map[string]func(path string) error{
		"removed":   os.Remove,
		"renamed":   func(path string) error { return os.Rename(path, path+".1") },
		"cut short": func(path string) error { return os.Truncate(path, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble.Test(t, func(t *testing.T) {
				o := testOptions(t.TempDir())
				o.Journal, o.SegmentSize, o.PerVM = filepath.Join(filepath.Dir(o.Dir), "journal"), 4096, nil
				disk := &toldFS{OS, make(chan string, 100)}
				o.FS = disk
				l := mustOpen(t, o)
				defer mustClose(t, l)
				commit := func(payload string) (synced string) {
					disk.synced = make(chan string, 100)
					publish(t, l, "web1", "t", "", payload)
					return <-disk.synced
				}
				commit("1") // the first syncs the room that it takes
				if got := commit("1"); got != o.Journal {
					t.Fatalf("a commit syncs %s", got)
				}
				if err := take(o.Journal); err != nil {
					t.Fatal(err)
				}
				time.Sleep(lookInterval)
				for range 2 {
					if got := commit("1"); filepath.Dir(got) != o.Dir {
						t.Errorf("a commit syncs %s", got)
					}
				}
				commit(`"` + strings.Repeat("x", 4000) + `"`)
				commit("1")
				if got := commit("1"); got != o.Journal {
					t.Errorf("in the next segment a commit syncs %s", got)
				}
				b, err := os.ReadFile(o.Journal)
				if j, ok := parseJournal(b); err != nil || !ok || bytes.Count(j.data, newline) != 1 || len(b) != smallJournal.size {
					t.Errorf("%d bytes, %v, beginning with %.200q", len(b), err, b)
				}
				if err := take(o.Journal); err != nil { // and so it can be closed
					t.Fatal(err)
				}
			})
		})
	}
}

// Somebody removes some old segments, of the host's or of a VM's. Their readers are told
// of a gap and go on behind it, as they do after a restart.
func TestOldSegmentsRemovedWhileOpen(t *testing.T) {
	for _, which := range []string{"host", "vm/web1"} {
		for _, what := range []string{"oldest", "middle", "newest sealed"} {
			t.Run(which+" "+what, func(t *testing.T) {
				bubble.Test(t, func(t *testing.T) { testOldSegmentsRemoved(t, which, what) })
			})
		}
	}
}

func testOldSegmentsRemoved(t *testing.T, which, what string) {
	dir := t.TempDir()
	o := testOptions(dir)
	o.SegmentSize, o.PerVM.SegmentSize, o.Recent = 4096, 4096, 1 // readers read the files
	l := mustOpen(t, o)
	defer func() { mustClose(t, l) }()
	for range 40 {
		publish(t, l, "web1", "t", "", `"`+strings.Repeat("x", 500)+`"`)
	}
	time.Sleep(time.Second)
	segments, err := filepath.Glob(filepath.Join(dir, which, "*.jsonl"))
	if err != nil || len(segments) < 5 {
		t.Fatal(segments, err)
	}
	at := map[string]int{"oldest": 0, "middle": 2, "newest sealed": len(segments) - 2}[what]
	if err := os.Remove(segments[at]); err != nil {
		t.Fatal(err)
	}
	from, _ := segmentFirst(filepath.Base(segments[at]))
	next, _ := segmentFirst(filepath.Base(segments[at+1]))
	for _, when := range []string{"running", "restarted"} {
		r := l.NewReader(1)
		if which != "host" {
			if r, err = l.NewVMReader("web1", 1); err != nil {
				t.Fatal(err)
			}
		}
		var gaps []Gap
		records := uint64(0)
		for r.Position() <= l.Committed() {
			var rec Record
			_, err := r.Next(&rec)
			if gap, ok := errors.AsType[*Gap](err); ok {
				gaps = append(gaps, *gap)
				continue
			}
			if err != nil {
				t.Fatalf("%s, at %d: %v", when, r.Position(), err)
			}
			records++
		}
		r.Close()
		// What a VM's stream lacks the host's has, or nobody knows of.
		if want := (Gap{from, next - 1}); (which == "host" || when == "running") && (records != 40-(next-from) || len(gaps) != 1 || gaps[0] != want) {
			t.Errorf("%s: %d records, gaps %v and not %v", when, records, gaps, want)
		}
		mustClose(t, l)
		l = mustOpen(t, o)
	}
}

// Somebody removes a VM's stream, or its newest segment. Its readers get from the host
// stream what that has, and what is published from then on is in a stream again.
func TestVMStreamRemovedWhileOpen(t *testing.T) {
	for _, what := range []string{"all", "newest"} {
		for _, together := range []int{1, 100} {
			t.Run(fmt.Sprint(what, together), func(t *testing.T) {
				bubble.Test(t, func(t *testing.T) { testVMStreamRemoved(t, what, together) })
			})
		}
	}
}

func testVMStreamRemoved(t *testing.T, what string, together int) {
	o := testOptions(t.TempDir())
	o.SegmentSize, o.PerVM.SegmentSize, o.Recent, o.PerVM.together = 4096, 4096, 1, together
	l := mustOpen(t, o)
	defer func() { mustClose(t, l) }()
	publishSome := func() {
		for range 20 {
			publish(t, l, "web1", "t", "", `"`+strings.Repeat("x", 500)+`"`)
		}
		time.Sleep(time.Second)
	}
	publishSome()
	own := filepath.Join(o.PerVM.Dir, "web1")
	if what == "all" {
		if err := os.RemoveAll(own); err != nil {
			t.Fatal(err)
		}
	} else {
		segments, err := filepath.Glob(filepath.Join(own, "*.jsonl"))
		if err != nil || os.Remove(segments[len(segments)-1]) != nil {
			t.Fatal(segments, err)
		}
	}
	publish(t, l, "web1", "t", "", "1")
	time.Sleep(time.Second)
	read := func() {
		t.Helper()
		r, err := l.NewVMReader("web1", 1)
		if err != nil {
			t.Fatal(err)
		}
		if got := readAll(t, r); uint64(len(got)) != l.Committed() {
			t.Errorf("%d records are read", len(got))
		}
	}
	read()
	time.Sleep(2 * checkpointInterval)
	synctest.Wait()
	read()
	publishSome()
	read()
	mustClose(t, l)
	l = mustOpen(t, o)
	read()
	if last, err := LastIn(OS, own); last != l.Committed() {
		t.Errorf("the stream ends with record %d, %v", last, err)
	}
}

// Somebody removes a VM's ids. Those that it gives from then on are known after a restart.
func TestIDsRemovedWhileOpen(t *testing.T) {
	o := testOptions(t.TempDir())
	l := mustOpen(t, o)
	publish(t, l, "web1", "t", "a", "1")
	copied(t, l)
	if err := os.Remove(filepath.Join(o.PerVM.IDDir, "web1.ids")); err != nil {
		t.Fatal(err)
	}
	publish(t, l, "web1", "t", "b", "1")
	mustClose(t, l)
	l = mustOpen(t, o)
	defer mustClose(t, l)
	if seq := publish(t, l, "web1", "t", "b", "1"); seq != 2 {
		t.Errorf("a retry is record %d", seq)
	}
}
