package eventlog

import (
	"encoding/binary"
	"errors"
	"fmt"
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
