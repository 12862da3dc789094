package eventlog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/castrabus/castra/internal/bubble"
)

// writeIDs writes the file of a VM whose ids are "<vm>-<n>", n from 1 to count,
// each under the number n.
func writeIDs(t testing.TB, o Options, vm string, count int) {
	t.Helper()
	data := make([]byte, 0, count*idEntry)
	for n := 1; n <= count; n++ {
		key := hashID(fmt.Appendf(nil, "%s-%d", vm, n))
		data = binary.BigEndian.AppendUint64(append(data, key[:]...), uint64(n))
	}
	if err := os.WriteFile(filepath.Join(o.PerVM.IDDir, vm+idSuffix), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// logBeyond makes a log whose first record is number 1,000,001, so that ids of
// older ones are files that no start touches.
func logBeyond(t testing.TB) Options {
	t.Helper()
	o := testOptions(t.TempDir())
	for _, dir := range []string{o.Dir, o.PerVM.IDDir} {
		if err := os.MkdirAll(dir, 0o750); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(o.Dir, segmentName(1_000_001)), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return o
}

// However many VMs publish, the ids in memory stay within the budget, and no id
// of the newest 65,536 is forgotten.
func TestIDsInMemory(t *testing.T) {
	const budget = 8 << 20
	o := logBeyond(t)
	o.SyncEvery = -1
	for i := range 8 {
		writeIDs(t, o, fmt.Sprint("full", i), 2*idWindow)
	}
	for i := range 1000 {
		writeIDs(t, o, fmt.Sprint("few", i), 3)
	}
	l := mustOpen(t, o)
	defer mustClose(t, l)
	l.perVM.ids.budget = budget
	var work sync.WaitGroup
	for p := range 4 {
		work.Go(func() {
			for i := p; i < 1000; i += 4 {
				vm, oldest := fmt.Sprint("few", i), 1
				if i%50 < 4 {
					vm, oldest = fmt.Sprint("full", i/50%8), idWindow+500
				}
				if got := publish(t, l, vm, "t", fmt.Sprintf("%s-%d", vm, oldest), "1"); got != uint64(oldest) {
					t.Errorf("%s: a retry got %d, want %d", vm, got, oldest)
				}
				if got := publish(t, l, vm, "t", fmt.Sprint("new", i), "1"); got <= 1_000_000 {
					t.Errorf("%s: a new id got %d", vm, got)
				}
				if got := publish(t, l, vm, "t", fmt.Sprint("new", i), "1"); got <= 1_000_000 {
					t.Errorf("%s: its retry got %d", vm, got)
				}
				x := l.perVM.ids
				x.mu.Lock()
				bytes, sum := x.bytes, 0
				for _, table := range x.tables {
					sum += table.counted
				}
				x.mu.Unlock()
				// Each publisher may hold one table, and read another.
				if limit := budget + 8*(3<<20); bytes > limit || bytes != sum {
					t.Errorf("%d bytes of ids are in memory (%d counted), want at most %d", sum, bytes, limit)
				}
			}
		})
	}
	work.Wait()
	if size := (&idTable{}).size(); size*10000 > idBudget/8 {
		t.Errorf("an empty table takes %d bytes", size)
	}
	l.perVM.ids.mu.Lock()
	full := l.perVM.ids.bytes
	l.perVM.ids.mu.Unlock()
	if full > budget {
		t.Errorf("%d bytes of ids are in memory when all is done", full)
	}
}

// What a table takes is what it is counted as: about 32 bytes an id.
func TestIDTable(t *testing.T) {
	table := &idTable{vm: "web1"}
	table.fill(nil)
	for n := 1; n <= 3*idWindow; n++ {
		key := hashID(fmt.Append(nil, n))
		if got := table.find(key); got != 0 {
			t.Fatalf("id %d is known as %d", n, got)
		}
		table.add(key, uint64(n), idWindow)
		if n%9973 != 0 {
			continue
		}
		for m := max(1, n-idWindow+1); m <= n; m += 97 {
			if got := table.find(hashID(fmt.Append(nil, m))); got != uint64(m) {
				t.Fatalf("after %d, id %d is known as %d", n, m, got)
			}
		}
	}
	if size := table.size(); size > 40*idWindow {
		t.Errorf("a full table takes %d bytes", size)
	}
}

// A retry while the first is still being committed gets the same number.
func TestRetryWhileCommitting(t *testing.T) {
	slow := &gateFS{FS: OS, gate: make(chan struct{})}
	o := testOptions(t.TempDir())
	o.FS = slow
	l := mustOpen(t, o)
	defer mustClose(t, l)
	publish(t, l, "web1", "t", "", "1")
	slow.shut.Store(true)
	seqs := make(chan uint64, 10)
	var work sync.WaitGroup
	for range cap(seqs) {
		work.Go(func() { seqs <- publish(t, l, "web1", "t", "x", "1") })
	}
	for l.Writing() == 0 { // until the first is in its sync; the others queue behind it
		runtime.Gosched()
	}
	close(slow.gate)
	work.Wait()
	close(seqs)
	for seq := range seqs {
		if seq != 2 {
			t.Errorf("stored as %d", seq)
		}
	}
	if l.Committed() != 2 {
		t.Errorf("%d records are stored", l.Committed())
	}
}

// gateFS lets no sync through while shut until the gate is open.
type gateFS struct {
	FS
	shut atomic.Bool
	gate chan struct{}
}

func (g *gateFS) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	f, err := g.FS.OpenFile(name, flag, perm)
	return gateFile{f, g}, err
}

type gateFile struct {
	File
	fs *gateFS
}

func (f gateFile) Sync() error {
	if f.fs.shut.Load() {
		<-f.fs.gate
	}
	return f.File.Sync()
}

// unreadableFS cannot read one file.
type unreadableFS struct {
	FS
	bad atomic.Pointer[string]
}

func (u *unreadableFS) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	if bad := u.bad.Load(); bad != nil && name == *bad {
		return nil, &fs.PathError{Op: "open", Path: name, Err: syscall.EIO}
	}
	return u.FS.OpenFile(name, flag, perm)
}

// heldReadFS holds a read of one file before and after it.
type heldReadFS struct {
	FS
	path string
	held chan chan struct{} // nil: nothing is held
}

func (h *heldReadFS) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	f, err := h.FS.OpenFile(name, flag, perm)
	if h.held == nil || name != h.path || flag != os.O_RDONLY {
		return f, err
	}
	return heldReadFile{f, h.held}, err
}

type heldReadFile struct {
	File
	held chan chan struct{}
}

func (f heldReadFile) hold() {
	goOn := make(chan struct{})
	f.held <- goOn
	<-goOn
}

func (f heldReadFile) ReadAt(b []byte, off int64) (int, error) {
	f.hold()
	defer f.hold()
	return f.File.ReadAt(b, off)
}

// Ids that are read while their file is cut back and written anew are not taken for
// all that there are, though both are over before the read is.
func TestIDsReadDuringReset(t *testing.T) {
	o := testOptions(t.TempDir())
	disk := &heldReadFS{FS: OS, path: filepath.Join(o.PerVM.IDDir, "web1"+idSuffix)}
	o.FS = disk
	l, _, err := open(o)
	if err != nil {
		t.Fatal(err)
	}
	p := l.perVM
	b := &Batch{done: make(chan struct{}, 1), Entries: []Entry{{VM: "web1", Topic: []byte("t"), ID: []byte("a")}}}
	err = p.ids.acquire(t.Context(), b)
	if err == nil {
		l.commit(b)
		err = p.copyNew()
	}
	if err != nil || b.Entries[0].Seq != 1 {
		t.Fatal(b.Entries[0], err)
	}
	p.ids.forget("web1")
	disk.held = make(chan chan struct{})
	type found struct {
		seq uint64
		err error
	}
	looked := make(chan found, 1) // for the one result
	go func() {
		seq, err := lookup(l, "web1", "a")
		looked <- found{seq, err}
	}()
	before := <-disk.held
	p.lost = true // a sync has failed
	p.forget()
	if _, err := p.stream([]byte("web1")); err != nil { // cuts the file
		t.Fatal(err)
	}
	close(before)
	after := <-disk.held
	if err := p.copyNew(); err != nil {
		t.Fatal(err)
	}
	close(after)
	if got := <-looked; got.err == nil && got.seq != 1 {
		t.Errorf("the id of record 1 is looked up as %d", got.seq)
	}
	disk.held = nil
	if seq, err := lookup(l, "web1", "a"); seq != 1 || err != nil {
		t.Errorf("looked up again, it is %d, %v", seq, err)
	}
	if err := l.finish(); err != nil {
		t.Error(err)
	}
}

// Ids that cannot be read refuse their own VM's records that have one, and
// nothing else; when they can be read again all is well.
func TestUnreadableIDs(t *testing.T) {
	sick := &unreadableFS{FS: OS}
	o := logBeyond(t)
	o.FS = sick
	writeIDs(t, o, "web1", 3)
	l := mustOpen(t, o)
	defer mustClose(t, l)
	path := filepath.Join(o.PerVM.IDDir, "web1"+idSuffix)
	sick.bad.Store(&path)
	b := &Batch{Entries: []Entry{
		{VM: "web1", Topic: []byte("t"), ID: []byte("web1-2")},
		{VM: "web2", Topic: []byte("t"), ID: []byte("web1-2")},
		{VM: "web1", Topic: []byte("t")},
	}}
	if err := l.Append(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	var we *WriteError
	if err := b.Entries[0].Err; !errors.As(err, &we) || !errors.Is(err, syscall.EIO) || we.Full {
		t.Errorf("without its ids: %v", err)
	}
	for _, e := range b.Entries[1:] {
		if e.Err != nil || e.Seq == 0 {
			t.Errorf("refused too: %+v", e)
		}
	}
	if s := l.State(); s.Degraded != "" {
		t.Errorf("the log is %s", s.Degraded)
	}
	sick.bad.Store(nil)
	if got := publish(t, l, "web1", "t", "web1-2", "1"); got != 2 {
		t.Errorf("a retry got %d, want 2", got)
	}
}

// Where nothing can be dropped from memory, a publisher waits for a while and
// is refused.
func TestNoRoomForIDs(t *testing.T) {
	dir := t.TempDir()
	bubble.Test(t, func(t *testing.T) {
		x := newIDIndex(OS, dir, time.Second, func() (uint64, bool) { return 0, true })
		x.budget = 1
		held, err := idsOf(t, x, "web1")
		if err != nil {
			t.Fatal(err)
		}
		b, err := idsOf(t, x, "web2")
		if err == nil {
			t.Error("there was room")
		}
		x.release(b)
		x.release(held)
		if x.bytes != 0 || len(x.tables) != 0 {
			t.Errorf("%d bytes in %d tables are left", x.bytes, len(x.tables))
		}
	})
}

// idsOf acquires the ids of a VM, and gives why they are not to be had.
func idsOf(t *testing.T, x *idIndex, vm string) (*Batch, error) {
	t.Helper()
	b := &Batch{Entries: []Entry{{VM: vm, ID: []byte("x")}}}
	if err := x.acquire(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	return b, b.tables[0].err
}

// hangFS does not answer who opens a file of ids.
type hangFS struct {
	FS
	hang chan struct{}
}

func (h *hangFS) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	if filepath.Ext(name) == idSuffix {
		<-h.hang
	}
	return h.FS.OpenFile(name, flag, perm)
}

// Where the disk does not answer who reads ids, publishers are told so after a while,
// and served when it does.
func TestIDsOnADiskThatHangs(t *testing.T) {
	dir := t.TempDir()
	bubble.Test(t, func(t *testing.T) {
		disk := &hangFS{FS: OS, hang: make(chan struct{})}
		x := newIDIndex(disk, dir, 5*time.Second, func() (uint64, bool) { return 0, true })
		for i := range 2 * idLoads {
			b, err := idsOf(t, x, fmt.Sprint("web", i))
			if !errors.Is(err, ErrNotQueued) {
				t.Errorf("told %v", err)
			}
			x.release(b)
		}
		close(disk.hang)
		synctest.Wait()
		b, err := idsOf(t, x, "web1")
		if err != nil {
			t.Error(err)
		}
		x.release(b)
	})
}

// Room that one table takes is not given to all who wait for it.
func TestIDsReadAtOnce(t *testing.T) {
	dir := t.TempDir()
	bubble.Test(t, func(t *testing.T) {
		disk := &hangFS{FS: OS, hang: make(chan struct{})}
		x := newIDIndex(disk, dir, 5*time.Second, func() (uint64, bool) { return 0, true })
		x.budget = 1
		var work sync.WaitGroup
		var loaded atomic.Int32
		for i := range 10 * idLoads {
			work.Go(func() {
				if _, err := idsOf(t, x, fmt.Sprint("web", i)); err == nil {
					loaded.Add(1)
				}
			})
		}
		synctest.Wait()
		close(disk.hang)
		work.Wait()
		if n := loaded.Load(); n < 1 || n > idLoads {
			t.Errorf("%d tables were read where there is room for one", n)
		}
	})
}

// However much there is to copy, a file of ids gets no longer than a start takes it for
// its own: the host has ids, and no stream that is written as often.
func TestManyHostIDs(t *testing.T) {
	o := testOptions(t.TempDir())
	o.SyncEvery, o.SegmentSize = -1, 64<<20
	l := mustOpen(t, o)
	const count = 180_000
	for n := 0; n < count; {
		b := &Batch{}
		for range 1000 {
			n++
			b.Entries = append(b.Entries, Entry{VM: "host", Topic: []byte("t"), ID: fmt.Append(nil, n)})
		}
		if err := l.Append(t.Context(), b); err != nil || b.Entries[999].Err != nil {
			t.Fatal(err, b.Entries[999].Err)
		}
	}
	mustClose(t, l)
	if err := os.Remove(o.PerVM.PositionFile); err != nil { // all is copied anew
		t.Fatal(err)
	}
	mustClose(t, mustOpen(t, o))
	l = mustOpen(t, o)
	publish(t, l, "host", "t", "new", "1") // the file is looked at
	mustClose(t, l)
	l = mustOpen(t, o)
	defer mustClose(t, l)
	if got := publish(t, l, "host", "t", fmt.Sprint(count), "1"); got != count {
		t.Errorf("a retry of %d got %d", count, got)
	}
}

// Where more publish without a pause than there is room for, each has its turn.
func TestIDsTakeTurns(t *testing.T) {
	o := logBeyond(t)
	const vms, turns = 5, 50
	for i := range vms {
		writeIDs(t, o, fmt.Sprint("web", i), 1000)
	}
	bubble.Test(t, func(t *testing.T) {
		x := newIDIndex(OS, o.PerVM.IDDir, 50*time.Millisecond, func() (uint64, bool) { return 1000, true })
		x.budget = 2 * 40 * 1000
		var work sync.WaitGroup
		for i := range 2 * vms { // two a VM, so that its ids are always in use
			work.Go(func() {
				time.Sleep(time.Duration(i) * time.Millisecond)
				for range turns {
					b, err := idsOf(t, x, fmt.Sprint("web", i/2))
					if err != nil {
						t.Error(err)
					}
					time.Sleep(2 * time.Millisecond) // until it is committed
					x.release(b)
				}
			})
		}
		work.Wait()
		if x.leaving != 0 || x.waiting != 0 {
			t.Errorf("%d are to make room, %d wait for it", x.leaving, x.waiting)
		}
	})
}

// Ids that could not be read are read again, also while somebody who was refused for
// it has not gone yet.
func TestIDsReadAgain(t *testing.T) {
	sick := &unreadableFS{FS: OS}
	x := newIDIndex(sick, t.TempDir(), time.Minute, func() (uint64, bool) { return 0, true })
	path := x.path("web1")
	sick.bad.Store(&path)
	refused, err := idsOf(t, x, "web1")
	if !errors.Is(err, syscall.EIO) {
		t.Errorf("told %v", err)
	}
	sick.bad.Store(nil)
	b, err := idsOf(t, x, "web1")
	if err != nil {
		t.Error(err)
	}
	x.release(refused)
	x.release(b)
	if len(x.tables) != 1 || x.tables["web1"].pins != 0 {
		t.Errorf("%d tables, used by %d", len(x.tables), x.tables["web1"].pins)
	}
}

// A write that fails forgets its own ids and none of those that are promised, also
// where the oldest have just made room.
func TestFailedWriteForgetsNoIDs(t *testing.T) {
	const window = 16
	dir := t.TempDir()
	for stored := 1; stored < 3*window; stored++ {
		for failing := 1; failing < 2*window; failing++ {
			x := newIDIndex(OS, dir, time.Minute, func() (uint64, bool) { return 0, true })
			x.window = window
			e := &Entry{VM: "web1", ID: []byte("x")}
			b := &Batch{Entries: []Entry{*e}}
			if err := x.acquire(t.Context(), b); err != nil {
				t.Fatal(err)
			}
			find := func(n int) uint64 {
				e.ID = fmt.Append(nil, n)
				seq, err := x.lookup(b, e)
				if err != nil {
					t.Fatal(err)
				}
				return seq
			}
			for n := 1; n <= stored+failing; n++ {
				if seq := find(n); seq != 0 {
					t.Fatalf("id %d is known as %d", n, seq)
				}
				if x.add(uint64(n)); n <= stored {
					x.commit()
				}
			}
			x.rollback()
			for n := max(1, stored-window+1); n <= stored+failing; n++ {
				want := uint64(n)
				if n > stored {
					want = 0
				}
				if seq := find(n); seq != want {
					t.Fatalf("of %d ids %d were undone, and id %d is known as %d", stored+failing, failing, n, seq)
				}
			}
			x.release(b)
			if table := x.tables["web1"]; x.bytes != table.size() {
				t.Fatalf("%d bytes are counted, %d are in use", x.bytes, table.size())
			}
		}
	}
}
