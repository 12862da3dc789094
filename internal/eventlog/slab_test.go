package eventlog

import (
	"bytes"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// What a reader was given stays as it is while newer records push it out of memory, until
// the reader goes on; and it goes on where it was.
func TestReaderHoldsItsRecord(t *testing.T) {
	o := testOptions(t.TempDir())
	o.Recent = 8 << 10
	l := mustOpen(t, o)
	defer mustClose(t, l)
	payload := func(n int) string { return fmt.Sprintf(`"%0100d"`, n) }
	publish(t, l, "web1", "t", "", payload(1))
	publish(t, l, "web1", "t", "", payload(2))
	for _, rests := range []bool{false, true} {
		r := l.NewReader(l.Committed() - 1)
		var rec Record
		if ok, err := r.Next(&rec); !ok || err != nil {
			t.Fatal(ok, err)
		}
		first, line := int(rec.Seq), bytes.Clone(rec.Line)
		if rests {
			if r.Rest(); r.mem != nil {
				t.Error("a reader that rests holds memory")
			}
		}
		for n := first + 2; n < first+200; n++ {
			publish(t, l, "web1", "t", "", payload(n))
		}
		if !rests && !bytes.Equal(rec.Line, line) {
			t.Errorf("record %d reads %q by now", first, rec.Line)
		}
		for n := first + 1; n < first+200; n++ {
			if ok, err := r.Next(&rec); !ok || err != nil || int(rec.Seq) != n || string(rec.Payload) != payload(n) {
				t.Fatalf("behind record %d: %v, %v, record %d with %s", n-1, ok, err, rec.Seq, rec.Payload)
			}
		}
		r.Close()
	}
}

// A commit that fills segment after segment is told of whole, though the first of it is
// out of memory by then.
func TestToldOfWhatIsOutOfMemory(t *testing.T) {
	o := testOptions(t.TempDir())
	o.Recent, o.SegmentSize = 16<<10, 512
	b := &Batch{}
	told := 0
	o.OnCommit = func(c Commit) {
		c.Runs(func(rec *Record) {
			if told++; string(rec.Topic) != fmt.Sprint("t", rec.Seq) || int(rec.Seq) != told {
				t.Errorf("run %d is of record %d on %s", told, rec.Seq, rec.Topic)
			}
		})
	}
	l := mustOpen(t, o)
	for i := range 300 {
		b.Entries = append(b.Entries, Entry{VM: "web1", Topic: fmt.Append(nil, "t", i+1)})
	}
	if err := l.Append(t.Context(), b); err != nil || b.Entries[299].Err != nil {
		t.Fatal(err, b.Entries[299].Err)
	}
	mustClose(t, l)
	if told != 300 {
		t.Errorf("told of %d of 300 runs", told)
	}
	if segs, err := filepath.Glob(filepath.Join(o.Dir, "*.jsonl")); err != nil || len(segs) < 50 {
		t.Errorf("%d segments, %v: it was to fill many", len(segs), err)
	}
}

// Commits are not garbage: what they were in is used again.
func TestCommitsLeaveLittleBehind(t *testing.T) {
	for _, c := range []struct {
		name                        string
		records, size, commits, mem int
	}{
		{"small ones share", 24, 1000, 1000, 1 << 20},
		{"each its own", 60, 8000, 100, 1 << 20},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := Options{Dir: t.TempDir(), SegmentSize: 32 << 20, Retention: 64 << 20, SyncEvery: -1, Recent: c.mem}
			l := mustOpen(t, o)
			defer mustClose(t, l)
			b := &Batch{Entries: make([]Entry, c.records)}
			for i := range b.Entries {
				b.Entries[i] = Entry{VM: "web1", Topic: []byte("t"), Payload: []byte(`"` + strings.Repeat("x", c.size) + `"`)}
			}
			r := l.NewReader(1)
			defer r.Close()
			written := 0
			turn := func() {
				if err := l.Append(t.Context(), b); err != nil {
					t.Fatal(err)
				}
				var rec Record
				for range b.Entries { // who reads holds nothing back
					if ok, err := r.Next(&rec); !ok || err != nil {
						t.Fatal(ok, err)
					}
					written += len(rec.Line)
				}
			}
			for range max(c.commits/10, 8) {
				turn() // until memory is full
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			written = 0
			for range c.commits {
				turn()
			}
			runtime.ReadMemStats(&after)
			limit := written / 4
			if poison { // the race detector has pools lose a quarter of what they are given, and a record was in two
				limit = written * 5 / 4
			}
			if got := int(after.TotalAlloc - before.TotalAlloc); got > limit {
				t.Errorf("%d bytes were allocated for %d of records", got, written)
			}
		})
	}
}

// A commit that outgrows its slab leaves the larger memory in it.
func TestSlabGrows(t *testing.T) {
	l, _, err := open(Options{Dir: t.TempDir(), SegmentSize: 32 << 20, SyncEvery: -1})
	if err != nil {
		t.Fatal(err)
	}
	b := &Batch{done: make(chan struct{}, 1)}
	for range 75 {
		b.Entries = append(b.Entries, Entry{VM: "web1", Topic: []byte("t"), Payload: bytes.Repeat([]byte("1"), 60_000)})
	}
	l.commit(b)
	c := l.recent.find(1)
	if len(c.data) < maxGroup || cap(c.slab.mem) != cap(c.data) {
		t.Errorf("%d bytes are in memory for %d, its slab's for %d", len(c.data), cap(c.data), cap(c.slab.mem))
	}
	if err := l.finish(); err != nil {
		t.Fatal(err)
	}
}
