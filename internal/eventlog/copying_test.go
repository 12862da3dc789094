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
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/castrabus/castra/internal/bubble"
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

// A copy that has failed is tried again at the retry interval, however much is committed
// meanwhile; what else the goroutine does goes on, and what it notes does not grow.
func TestFailedCopy(t *testing.T) { bubble.Test(t, testFailedCopy) }

func testFailedCopy(t *testing.T) {
	disk := newSimDisk(rand.New(rand.NewPCG(1, 1)))
	o := testOptions("/log")
	o.FS = &sharedFS{FS: disk}
	var sick atomic.Bool
	tries := 0
	disk.fault = func(op, path string) error {
		if op == "write" && sick.Load() && filepath.Dir(path) == filepath.Join(o.PerVM.Dir, "web1") {
			tries++
			return syscall.EIO
		}
		return nil
	}
	l := mustOpen(t, o)
	publish(t, l, "web3", "t", "", "1")
	time.Sleep(time.Second)
	sick.Store(true)
	// web2's is written each time before web1's fails, and cut off again.
	b := &Batch{Entries: []Entry{
		{VM: "web2", Topic: []byte("t"), Payload: []byte("1")}, {VM: "web1", Topic: []byte("t"), Payload: []byte("1")},
	}}
	if err := l.Append(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	resets := l.perVM.resets.Load()
	const seconds = 5
	for range seconds * 100 {
		publish(t, l, "web1", "t", "", "1")
		time.Sleep(retryInterval / 100)
	}
	synctest.Wait()
	if resets = l.perVM.resets.Load() - resets; tries < seconds || tries > seconds+1 || resets != uint64(tries) {
		t.Errorf("in %d s there are %d tries, and %d times all is forgotten", seconds, tries, resets)
	}
	if n := len(l.perVM.unsynced); n > 3 {
		t.Errorf("3 VMs' files were written, and %d are to be synced", n)
	}
	began := time.Now()
	if err := l.ForgetVM(t.Context(), "web3"); err != nil || time.Since(began) > 0 {
		t.Errorf("forgetting another VM: %v, after %v", err, time.Since(began))
	}
	sick.Store(false)
	time.Sleep(2 * retryInterval)
	if position := l.perVM.position.Load(); position != l.Committed() {
		t.Errorf("%d of %d are copied", position, l.Committed())
	}
	publish(t, l, "web1", "t", "", "1")
	time.Sleep(2 * gatherTime)
	if position := l.perVM.position.Load(); position != l.Committed() {
		t.Errorf("%d of %d are copied", position, l.Committed())
	}
	sick.Store(true)
	publish(t, l, "web1", "t", "", "1")
	time.Sleep(retryInterval / 2)
	sick.Store(false)
	began = time.Now()
	if mustClose(t, l); time.Since(began) > 0 {
		t.Errorf("it closes after %v", time.Since(began))
	}
}
