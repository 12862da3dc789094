package eventlog

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Whatever mix of senders, topics and ids a commit has, each VM's stream has just the
// lines that belong there, in segments that are named after their first record and
// begin no sooner than the next line needs.
func TestCopiesOfMixedCommits(t *testing.T) {
	const size = 3000 // small, so that runs end in the middle of a segment
	o := testOptions(t.TempDir())
	o.PerVM.SegmentSize, o.PerVM.Retention = size, 0
	l, _, err := open(o) // no goroutines: a test commits, and copies when it likes
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(3, 4))
	pick := func(from ...string) string { return from[rnd.IntN(len(from))] }
	for n := range 200 {
		b := &Batch{done: make(chan struct{}, 1)}
		var vm, topic string
		for i := range 1 + rnd.IntN(40) {
			if i == 0 || rnd.IntN(8) == 0 {
				vm, topic = pick("web1", "web2", "host"), pick("t", "u", "vm:web1", "vm:web2", "vm:web2/x")
			}
			id := ""
			if n%3 == 0 && rnd.IntN(10) == 0 {
				id = fmt.Sprint(n, "-", i)
			}
			payload := `"` + strings.Repeat("x", rnd.IntN(200)+rnd.IntN(2)*rnd.IntN(2)*rnd.IntN(2)*size) + `"`
			b.Entries = append(b.Entries, Entry{VM: vm, Topic: []byte(topic), ID: []byte(id), Payload: []byte(payload)})
		}
		if err := l.perVM.ids.acquire(t.Context(), b); err != nil {
			t.Fatal(err)
		}
		l.commit(b)
		if n%4 == 0 { // several commits at once, too
			if err := l.perVM.copyNew(); err != nil {
				t.Fatal(err)
			}
		}
	}
	want, wantIDs := map[string][]byte{}, map[string][]byte{}
	r := l.NewReader(1)
	for rec := (Record{}); ; {
		ok, err := r.Next(&rec)
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			break
		}
		if rec.ID != nil {
			key := hashID(bytes.Trim(rec.ID, `"`))
			wantIDs[string(rec.VM)] = binary.BigEndian.AppendUint64(append(wantIDs[string(rec.VM)], key[:]...), rec.Seq)
		}
		owner, _ := o.PerVM.Owner(rec.Topic)
		for _, vm := range []string{"web1", "web2"} {
			if string(rec.VM) == vm || string(owner) == vm {
				want[vm] = append(append(want[vm], rec.Line...), '\n')
			}
		}
	}
	if err := l.finish(); err != nil {
		t.Fatal(err)
	}
	for _, vm := range []string{"web1", "web2", "host"} {
		got, err := os.ReadFile(filepath.Join(o.PerVM.IDDir, vm+idSuffix))
		if err != nil || !bytes.Equal(got, wantIDs[vm]) || len(got) == 0 {
			t.Errorf("the ids of %s take %d bytes, %v; want the %d of its own", vm, len(got), err, len(wantIDs[vm]))
		}
	}
	for vm, want := range want {
		paths, err := filepath.Glob(filepath.Join(o.PerVM.Dir, vm, "*"+segmentSuffix))
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(paths)
		var got []byte
		before := size // what is in the segment before
		for _, path := range paths {
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, data...)
			line, _, _ := bytes.Cut(data, newline)
			var rec Record
			if err := parseRecord(line, &rec, true); err != nil || filepath.Base(path) != segmentName(rec.Seq) {
				t.Errorf("%s begins with record %d, %v", path, rec.Seq, err)
			}
			if len(data) > size && len(data) != len(line)+1 {
				t.Errorf("%s has %d bytes in more than one line, want at most %d", path, len(data), size)
			}
			if before+len(line)+1 <= size {
				t.Errorf("the segment before %s has %d bytes, room for %d more", path, before, len(line)+1)
			}
			before = len(data)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("the stream of %s has %d bytes, not the %d that belong there", vm, len(got), len(want))
		}
		if len(paths) < 50 {
			t.Errorf("%s has %d segments, too few to tell", vm, len(paths))
		}
	}
}

// A run is cut where its bytes would be more than asked for, and never empty.
func TestRunLimit(t *testing.T) {
	c := &chunk{data: []byte("aa\nbb\ncc\ndd\nee\n"), offsets: []uint32{0, 3, 6, 9, 12}, runs: []uint32{0, 4}}
	for _, tt := range []struct {
		i, limit int
		want     string
	}{
		{0, 100, "aa\nbb\ncc\ndd\n"},
		{1, 100, "bb\ncc\ndd\n"},
		{4, 100, "ee\n"},
		{0, 12, "aa\nbb\ncc\ndd\n"},
		{0, 11, "aa\nbb\n"},
		{0, 5, "aa\n"},
		{0, 1, "aa\n"},
		{3, 1, "dd\n"},
	} {
		lines, n := c.run(tt.i, tt.limit)
		if string(lines) != tt.want || n != strings.Count(tt.want, "\n") {
			t.Errorf("run(%d, %d) = %q, %d; want %q", tt.i, tt.limit, lines, n, tt.want)
		}
	}
}
