package eventlog

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/castrabus/castra/internal/bubble"
)

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
