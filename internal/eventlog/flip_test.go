package eventlog

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// A bit flipped in any byte of a sealed segment is found, by whoever reads it
// and by Verify, which names the file and the line that it is in; everything
// but the records that it touches is served. CASTRA_FLIP_BYTES sets the
// segment's size.
func TestFlippedBitAnywhere(t *testing.T) {
	size := int64(64 << 10)
	if s := os.Getenv("CASTRA_FLIP_BYTES"); s != "" {
		var err error
		if size, err = strconv.ParseInt(s, 10, 64); err != nil {
			t.Fatalf("CASTRA_FLIP_BYTES: %v", err)
		}
	}
	o := testOptions("/log")
	owner := o.PerVM.Owner
	disk := newSimDisk(rand.New(rand.NewPCG(1, 1)))
	o.FS, o.PerVM, o.SegmentSize, o.Recent = disk, nil, size, 1
	l := mustOpen(t, o)
	defer mustClose(t, l)
	var told Damage
	l.opts.OnDamage = func(d Damage) { told = d } // each time, where a log tells of a place once
	next := uint64(0)                             // the first record of the segment behind the one under test
	for pad := 0; len(l.stream.snapshot()) < 2; pad++ {
		// Records of all lengths, the sealed segment as full as it gets.
		next = publish(t, l, "web1", "t", strconv.Itoa(pad), `"`+strings.Repeat("é", 100+pad%400)+`"`)
	}
	seg := l.stream.snapshot()[0]
	path := l.stream.path(seg.first)
	_, node, err := disk.find(path)
	if err != nil || int64(len(node.data)) < size-2000 {
		t.Fatalf("%d bytes are in the sealed segment, %v", len(node.data), err)
	}
	var ends []int // of the lines
	for i, b := range node.data {
		if b == '\n' {
			ends = append(ends, i+1)
		}
	}
	verifier := VerifyOptions{Dir: o.Dir, FS: disk, Sender: "host", Owner: owner}
	line, start := 0, 0
	for at := range node.data {
		if at == ends[line] {
			start = at
			line++
		}
		// Without its newline a line is one with the next.
		lost := 1
		if at == ends[line]-1 && line+1 < len(ends) {
			lost = 2
		}
		node.data[at] ^= 1 << (at % 8)

		// Near the damage, for to read all of it each time would take the square
		// of the size; what is farther away is served as ever.
		want := Damage{path, int64(start)}
		c := &cursor{st: &l.stream, next: uint64(line + 1)}
		if err := c.open(); err != nil {
			t.Fatal(err)
		}
		c.off = int64(start)
		var rec Record
		if err := c.read(&rec); err != nil || rec.Seq != uint64(line+lost+1) || !c.damaged || c.damagedAt != want {
			t.Fatalf("byte %d: record %d, %v, damage at %v; want it at %v", at, rec.Seq, err, c.damagedAt, want)
		}
		c.close()
		if at%97 == 0 || lost == 2 {
			told = Damage{}
			gap := readAround(t, l, uint64(max(1, line-1)), min(next, uint64(line+4)))
			if gap != (Gap{uint64(line + 1), uint64(line + lost)}) || told != want {
				t.Fatalf("byte %d: records %d to %d were told to be gone, and damage at %v, want it at %v", at, gap.From, gap.To, told, want)
			}
		}
		if at%1021 == 0 || lost == 2 || line == 0 || line == len(ends)-1 {
			found := false
			if _, err := Verify(verifier, func(f Finding) {
				found = found || f.Damage && f.File == path && f.Offset == int64(start) && f.Bytes >= int64(ends[line]-start)
			}); err != nil || !found {
				t.Fatalf("byte %d: not found by Verify (%v)", at, err)
			}
		}
		node.data[at] ^= 1 << (at % 8)
	}
	if gap := readAround(t, l, 1, next); gap != (Gap{}) {
		t.Errorf("with nothing flipped, records %d to %d are gone", gap.From, gap.To)
	}
	if path != filepath.Join(o.Dir, segmentName(1)) {
		t.Error(path)
	}
}

// readAround reads the records from one number to another, all of which must
// come but those of one gap, which it gives.
func readAround(t *testing.T, l *Log, from, to uint64) (gone Gap) {
	t.Helper()
	r := l.NewReader(from)
	defer r.Close()
	var rec Record
	for want := from; want <= to; {
		ok, err := r.Next(&rec)
		var gap *Gap
		switch {
		case errors.As(err, &gap) && gone == (Gap{}) && gap.From == want:
			gone, want = *gap, gap.To+1
		case err != nil || !ok || rec.Seq != want:
			t.Fatalf("reading from %d: record %d, %v, %v; want %d", from, rec.Seq, ok, err, want)
		default:
			want++
		}
	}
	return gone
}

// A bit flipped in the last write before castrad was stopped, behind which no mark says that
// it was durable, is damage as anywhere else: it stays, is told of and verified as such, and
// no number is given a second time.
func TestFlippedBitAtTheEnd(t *testing.T) {
	const n = 5
	o := testOptions(t.TempDir())
	l := mustOpen(t, o)
	for i := range n {
		publish(t, l, "web1", "t", fmt.Sprint(i), "1")
	}
	mustClose(t, l)
	path := filepath.Join(o.Dir, segmentName(1))
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	position, err := os.ReadFile(o.PerVM.PositionFile)
	if err != nil {
		t.Fatal(err)
	}
	next := filepath.Join(o.Dir, segmentName(n+1))
	for at := bytes.LastIndexByte(whole[:len(whole)-1], '\n') + 1; at < len(whole); at++ {
		bad := bytes.Clone(whole)
		bad[at] ^= 1 << (at % 8)
		if err := errors.Join(os.WriteFile(path, bad, 0o600), os.RemoveAll(next), os.WriteFile(o.PerVM.PositionFile, position, 0o600)); err != nil {
			t.Fatal(err)
		}
		l, rec, err := Open(o)
		if err != nil {
			t.Fatal(err)
		}
		if rec.Last != n || len(rec.Damaged) != 1 || rec.Damaged[0].File != path || rec.Cut != nil {
			t.Fatalf("byte %d: %+v", at, rec)
		}
		for _, more := range []uint64{0, 1} {
			if more == 1 {
				if seq := publish(t, l, "web2", "t", "", "1"); seq != n+1 {
					t.Fatalf("byte %d: the next is record %d", at, seq)
				}
			}
			r := l.NewReader(n - 1)
			got := readWithGaps(t, r)
			r.Close()
			if want := []string{"4", "gap 5-5", "6"}[:2+more]; !slices.Equal(got, want) {
				t.Fatalf("byte %d: it reads %q, want %q", at, got, want)
			}
		}
		mustClose(t, l)
		found := false
		if _, err := Verify(VerifyOptions{Dir: o.Dir, FS: OS, Sender: "host", Owner: o.PerVM.Owner}, func(f Finding) {
			found = found || f.Damage && f.File == path
		}); err != nil || !found {
			t.Fatalf("byte %d: not found by Verify (%v)", at, err)
		}
		if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, bad) {
			t.Fatalf("byte %d: the segment was changed, %v", at, err)
		}
	}
}

// A position that the tail cannot have come to is another log's, or damaged itself, and says
// nothing of it.
func TestPositionOfAnotherLog(t *testing.T) {
	for known, last := range map[uint64]uint64{0: 2, 2: 2, 3: 3, 4: 4, 1_000: 2, math.MaxUint64: 2} {
		data := append(seedRecord(1, 0), seedRecord(2, 1)...)
		whole := len(data)
		data = append(data, seedRecord(3, 2)[:minLine+20]...) // and a fourth, perhaps, of which nothing is left
		path := filepath.Join(t.TempDir(), "segment")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := OS.OpenFile(path, os.O_RDONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		got, err := scanTail(f, int64(len(data)), 1, known)
		if sealed := last > 2; err != nil || got.last != last || got.sealed != sealed || !sealed && got.end != int64(whole) {
			t.Errorf("with %d known: %+v, %v", known, got, err)
		}
		_ = f.Close()
	}
}
