package eventlog

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
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
