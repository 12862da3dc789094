package eventlog

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/castrabus/castra/internal/bubble"
)

// The record shown in docs/EVENTLOG.md is one.
func TestDocumentedRecord(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join("..", "..", "docs", "EVENTLOG.md"))
	if err != nil {
		t.Fatal(err)
	}
	var rec Record
	line := regexp.MustCompile(`(?m)^\{"crc".*$`).Find(doc)
	if err := parseRecord(line, &rec, true); err != nil {
		var right [crcDigits]byte
		sum := appendRecord(nil, &Entry{VM: "web1", Topic: []byte("t"), ID: []byte("x"), Reply: []byte("r"), Payload: []byte(`{"a":1}`)}, 42, 41, "2026-11-23T21:03:00.123456Z")
		copy(right[:], sum[len(crcPrefix):])
		t.Fatalf("%s: %v; its crc would be %s", line, err, right[:])
	}
	if rec.Seq != 42 || rec.Synced != 41 || string(rec.ID) != `"x"` || string(rec.Reply) != "r" || string(rec.Payload) != `{"a":1}` {
		t.Errorf("%+v", rec)
	}
}

// logOf makes a log of n records and gives its options and its segment's bytes.
func logOf(t *testing.T, n int) (Options, string, []byte) {
	t.Helper()
	o := testOptions(t.TempDir())
	o.PerVM = nil
	l := mustOpen(t, o)
	for i := range n {
		publish(t, l, "web1", "t", fmt.Sprint(i), `{"s":"a\"}\nb"}`)
	}
	mustClose(t, l)
	path := filepath.Join(o.Dir, segmentName(1))
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return o, path, data
}

// A tail torn at any byte gives back exactly the whole records before it, keeps
// the cut bytes aside, and takes new records.
func TestTornTail(t *testing.T) {
	o, path, data := logOf(t, 5)
	lines := bytes.SplitAfter(data, []byte("\n"))
	from := len(data) - len(lines[3]) - len(lines[4])
	for end := from; end <= len(data); end++ {
		if err := os.WriteFile(path, data[:end], 0o600); err != nil {
			t.Fatal(err)
		}
		whole := bytes.Count(data[:end], []byte("\n"))
		l, rec, err := Open(o)
		if err != nil {
			t.Fatal(err)
		}
		if rec.Last != uint64(whole) || len(rec.Damaged) > 0 {
			t.Fatalf("cut at %d: %+v, want %d records", end, rec, whole)
		}
		torn := data[bytes.LastIndexByte(data[:end], '\n')+1 : end]
		if (rec.Cut != nil) != (len(torn) > 0) {
			t.Fatalf("cut at %d: %+v", end, rec.Cut)
		}
		if rec.Cut != nil {
			aside, err := os.ReadFile(rec.Cut.Aside)
			if err != nil || !bytes.Equal(aside, torn) {
				t.Fatalf("cut at %d: %q is kept aside, %v; want %q", end, aside, err, torn)
			}
			if err := os.Remove(rec.Cut.Aside); err != nil {
				t.Fatal(err)
			}
		}
		if got := publish(t, l, "web1", "t", "", "1"); got != uint64(whole)+1 {
			t.Fatalf("cut at %d: the next record is %d", end, got)
		}
		mustClose(t, l)
	}
}

// sickVMFS has one VM's directory that nothing can be made in while sick.
type sickVMFS struct {
	FS
	dir  string
	sick atomic.Bool
}

func (s *sickVMFS) Mkdir(name string, perm fs.FileMode) error {
	if s.sick.Load() && name == s.dir {
		return &fs.PathError{Op: "mkdir", Path: name, Err: syscall.EIO}
	}
	return s.FS.Mkdir(name, perm)
}

// A start that cannot write one VM's stream serves the others what is there, and goes
// on by itself when it can.
func TestStartWithoutOneVM(t *testing.T) { bubble.Test(t, testStartWithoutOneVM) }

func testStartWithoutOneVM(t *testing.T) {
	o := testOptions("/log")
	disk := &sickVMFS{FS: &sharedFS{FS: newSimDisk(rand.New(rand.NewPCG(1, 1)))}, dir: filepath.Join(o.PerVM.Dir, "web2")}
	o.FS = disk
	var told []error
	o.PerVM.OnError = func(err error) { told = append(told, err) }
	l := mustOpen(t, o)
	publish(t, l, "web1", "t", "a", "1")
	mustClose(t, l)
	disk.sick.Store(true)
	l = mustOpen(t, o)
	publish(t, l, "web2", "t", "b", "1") // and castrad is killed before it is copied
	closed := l.Close()
	if !errors.Is(closed, syscall.EIO) {
		t.Fatal(closed)
	}
	told = nil
	l = mustOpen(t, o)
	defer mustClose(t, l)
	time.Sleep(10 * retryInterval)
	synctest.Wait()
	if s := l.State(); s.Degraded != CauseDiskError || len(told) != 1 || !strings.Contains(told[0].Error(), "web2") {
		t.Errorf("it is %+v, and told of %v", s, told)
	}
	for _, vm := range []string{"web1", "web2"} {
		r, _ := readFirst(t, l, vm)
		r.Close()
	}
	if _, refused := offer(t, l, "web1", "t", "", "1"); !errors.Is(refused, syscall.EIO) {
		t.Errorf("refused with %v", refused)
	}
	disk.sick.Store(false)
	time.Sleep(10 * retryInterval)
	synctest.Wait()
	if s := l.State(); s.Degraded != "" || len(told) != 2 || told[1] != nil {
		t.Fatalf("it can be written, and it is %+v, told of %v", s, told)
	}
	if seq := publish(t, l, "web2", "t", "b", "1"); seq != 2 {
		t.Errorf("a retry is stored as record %d", seq)
	}
}

func appendTo(t testing.TB, fsys FS, path, text string) {
	t.Helper()
	f, err := fsys.OpenFile(path, os.O_RDWR|os.O_CREATE, filePerm)
	if err != nil {
		t.Fatal(err)
	}
	size, err := f.Size()
	if err == nil {
		_, err = f.WriteAt([]byte(text), size)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

func contentsOf(t testing.TB, fsys FS, path string) string {
	t.Helper()
	f, err := fsys.OpenFile(path, os.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	size, err := f.Size()
	b := make([]byte, size)
	if err == nil && size > 0 {
		_, err = f.ReadAt(b, 0)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// However many readers come upon a damaged place, and however often, it is told of
// once: a guest that replays again and again must not fill the journal.
func TestDamageIsToldOnce(t *testing.T) {
	o, path, data := logOf(t, 5)
	lines := bytes.SplitAfter(data, []byte("\n"))
	for _, at := range []int{len(lines[0]), len(lines[0]) + len(lines[1]) + len(lines[2])} {
		data[at+len(crcPrefix)] ^= 1
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	told := make(map[int64]int)
	o.OnDamage = func(d Damage) { told[d.Offset]++ }
	l := mustOpen(t, o)
	defer mustClose(t, l)
	for range 3 {
		r := l.NewReader(1)
		for r.Position() <= 5 {
			var gap *Gap
			if _, err := r.Next(new(Record)); err != nil && !errors.As(err, &gap) {
				t.Fatal(err)
			}
		}
		r.Close()
	}
	if len(told) != 2 || told[int64(len(lines[0]))] != 1 {
		t.Errorf("told how often, by offset: %v; want two places, once each", told)
	}
	for i := range 2 * maxDamages { // nor does what is remembered grow with what is damaged
		l.opts.OnDamage(Damage{File: path, Offset: int64(1e6 + i)})
	}
	if len(told) != maxDamages {
		t.Errorf("%d places were told of, want %d", len(told), maxDamages)
	}
}

// A flipped bit anywhere in a sealed record is found, told of, and served as a
// gap; the rest is served.
func TestFlippedBits(t *testing.T) {
	o, path, data := logOf(t, 5)
	lines := bytes.SplitAfter(data, []byte("\n"))
	start := len(lines[0])
	for at := start; at < start+len(lines[1])+len(lines[2]); at++ {
		bad := bytes.Clone(data)
		bad[at] ^= 1 << (at % 8)
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		o.OnDamage = nil
		var told atomic.Int32
		o.OnDamage = func(d Damage) {
			if d.File == path {
				told.Add(1)
			}
		}
		l, rec, err := Open(o)
		if err != nil {
			t.Fatal(err)
		}
		if rec.Last != 5 || len(rec.Damaged) == 0 {
			t.Fatalf("byte %d: %+v", at, rec)
		}
		lost, seen := 0, 0
		r := l.NewReader(1)
		for {
			var rec Record
			ok, err := r.Next(&rec)
			var gap *Gap
			if errors.As(err, &gap) {
				lost += int(gap.To - gap.From + 1)
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if !ok {
				break
			}
			seen++
		}
		r.Close()
		if lost+seen != 5 || lost == 0 || lost > 2 || told.Load() == 0 {
			t.Fatalf("byte %d: %d served, %d lost, damage told %d times", at, seen, lost, told.Load())
		}
		mustClose(t, l)
	}
}

// Where the only segment is an empty one that could not be written, the log makes it anew;
// if the power fails then it does not count from 1 again.
func TestOnlySegmentIsThereAlways(t *testing.T) {
	const first = 200
	for crashAt := 1; ; crashAt++ {
		done := false
		for seed := range uint64(8) {
			disk := newSimDisk(rand.New(rand.NewPCG(seed, uint64(crashAt))))
			o := testOptions("/log")
			o.FS, o.PerVM = disk, nil
			if err := MakeDir(disk, o.Dir); err != nil {
				t.Fatal(err)
			}
			st := stream{fs: disk, dir: o.Dir}
			if _, err := st.create(first); err != nil {
				t.Fatal(err)
			}
			if err := st.syncDir(); err != nil {
				t.Fatal(err)
			}
			l, _, err := open(o)
			if err != nil {
				t.Fatal(err)
			}
			failed := false
			disk.fault = func(op, _ string) error {
				if op != "write" || failed {
					return nil
				}
				failed = true
				return syscall.EIO
			}
			disk.crashAt = disk.ops + crashAt
			done = func() (done bool) {
				defer func() { done = recover() == nil }()
				_ = commitOf(l, 1)
				_ = commitOf(l, 1)
				return true
			}()
			disk.fault = nil
			disk.crash(true, true)
			if l, _, err = open(o); err != nil || l.Committed() < first-1 {
				t.Fatalf("a crash at %d: the newest record is %d, %v", crashAt, l.Committed(), err)
			}
		}
		if done {
			return
		}
	}
}

// A file that is replaced keeps its contents until the new ones are whole, also where a
// power cut has left the last one's temporary name for it.
func TestReplaceAfterHalfARename(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := Replace(OS, path, []byte("old")); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(path, path+".tmp"); err != nil {
		t.Fatal(err)
	}
	sick := &sickFS{FS: OS}
	sick.write.Store(new(error(syscall.ENOSPC)))
	if err := Replace(sick, path, []byte("new")); !errors.Is(err, syscall.ENOSPC) {
		t.Error(err)
	}
	if data, err := os.ReadFile(path); err != nil || string(data) != "old" {
		t.Errorf("%q, %v", data, err)
	}
	sick.write.Store(nil)
	if err := Replace(sick, path, []byte("new")); err != nil {
		t.Error(err)
	}
	if data, err := os.ReadFile(path); err != nil || string(data) != "new" {
		t.Errorf("%q, %v", data, err)
	}
}
