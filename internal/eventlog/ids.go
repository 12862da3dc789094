package eventlog

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"
)

const (
	// idWindow is how many of a VM's newest ids are remembered at least
	// (contract: a retry among at least the last 65,536 is stored once).
	idWindow = 65536

	// idBudget bounds the bytes of ids in memory over all VMs: some 50 whose
	// windows are full, or two hundred thousand that have few ids. Beyond it the
	// VMs that published longest ago are read again when needed, which takes
	// about a millisecond: where more than that publish in turn it is so nearly each time.
	idBudget = 128 << 20

	// idLoads is how many tables are read at once; each may exceed the budget.
	idLoads = 4

	idSuffix = ".ids"
)

// idIndex finds the first record of a VM and an id. On disk it is a file a VM,
// written by the goroutine that follows the log. A table is read by a publisher
// before its batch is queued, so that no other waits for that, and stays while
// the batch is under way; what is in it is the committer's. It may be dropped
// only when the file has all of it.
type idIndex struct {
	fs     FS
	dir    string
	window int
	budget int
	wait   time.Duration // how long a publisher waits for room, and for the disk
	// written tells how far the files go, and whether they hold all that has
	// ever been in them: after a failed sync they are written anew.
	written func() (upTo uint64, whole bool)
	resets  func() uint64           // how often that has begun
	aside   func(file, name string) // see PerVMOptions.OnAside

	loads chan struct{} // has room for idLoads
	first chan struct{} // has room for the one of them whose turn it is to find room

	mu     sync.Mutex
	tables map[string]*idTable
	used   list.List // of *idTable, most recently used first
	bytes  int       // of all tables
	room   chan struct{}
	// waiting is how many are at it to load one, leaving how many are to make room.
	waiting, leaving int

	// The committer's.
	looked  *idTable // of the last lookup
	key     idKey
	pending []*idTable // with ids added since the last commit
}

func newIDIndex(fsys FS, dir string, wait time.Duration, written func() (uint64, bool)) *idIndex {
	return &idIndex{
		fs: fsys, dir: dir, window: idWindow, budget: idBudget, wait: wait, written: written, resets: func() uint64 { return 0 },
		loads: make(chan struct{}, idLoads), first: make(chan struct{}, 1),
		tables: make(map[string]*idTable), room: make(chan struct{}),
	}
}

func (x *idIndex) path(vm string) string { return filepath.Join(x.dir, vm+idSuffix) }

// acquire makes the tables that b needs ready and keeps them until release. A
// table that cannot be read refuses its own VM's records only. The error is
// ctx's.
func (x *idIndex) acquire(ctx context.Context, b *Batch) error {
	for i := range b.Entries {
		e := &b.Entries[i]
		if len(e.ID) == 0 || b.table(e.VM) != nil {
			continue
		}
		t, err := x.table(ctx, e.VM, len(b.tables) > 0)
		if err != nil {
			x.release(b)
			return err
		}
		b.tables = append(b.tables, t)
	}
	return nil
}

// table gives b's table of a VM; nil if it has none.
func (b *Batch) table(vm string) *idTable {
	for _, t := range b.tables {
		if t.vm == vm {
			return t
		}
	}
	return nil
}

// table gives a VM's table, pinned and loaded. If holding, the caller has
// others pinned and does not wait for room, which it might itself be keeping.
func (x *idIndex) table(ctx context.Context, vm string, holding bool) (*idTable, error) {
	x.mu.Lock()
	t := x.tables[vm]
	if t != nil && t.gone != nil && !holding {
		gone := t.gone
		x.mu.Unlock()
		select {
		case <-gone:
		case <-time.After(x.wait): // its ids are long in coming to the disk; it goes later
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		x.mu.Lock()
		t = x.tables[vm]
	}
	mine := t == nil
	if mine {
		t = &idTable{vm: vm, ready: make(chan struct{})}
		x.tables[vm] = t
		t.elem = x.used.PushFront(t)
	}
	t.pins++
	x.used.MoveToFront(t.elem)
	x.mu.Unlock()
	if mine {
		err := x.load(t, holding)
		x.mu.Lock()
		if t.err = err; err != nil {
			x.drop(t) // the next one tries again
		}
		x.mu.Unlock()
		close(t.ready)
	}
	select {
	case <-t.ready:
		return t, nil
	case <-ctx.Done():
		x.unpin(t)
		return nil, ctx.Err()
	}
}

// load fills t from its file once there is room. It waits for a disk that does
// not answer no longer than for room.
func (x *idIndex) load(t *idTable, holding bool) error {
	if err := x.turn(holding); err != nil {
		return err
	}
	type result struct {
		data []byte
		err  error
	}
	resets := x.resets()
	_, before := x.written()
	read := make(chan result, 1) // for the one result
	go func() {
		data, err := x.read(t.vm, x.window)
		read <- result{data, err}
	}()
	var got result
	select {
	case got = <-read:
		defer func() { <-x.loads }()
	case <-time.After(x.wait):
		go func() { // or every retry would leave one more read behind
			<-read
			<-x.loads
		}()
		return ErrNotQueued
	}
	_, after := x.written()
	switch {
	case got.err != nil:
		return fmt.Errorf("loading the ids of %s: %w", t.vm, got.err)
	case !before || !after || x.resets() != resets: // it may have begun and ended during the read
		return fmt.Errorf("the ids of %s are being written anew after a failure of the disk; try again", t.vm)
	}
	t.fill(got.data)
	x.mu.Lock()
	x.account(t)
	x.evict()
	x.mu.Unlock()
	return nil
}

// turn waits until a table may be read, and takes one of the loads.
func (x *idIndex) turn(holding bool) error {
	late := time.After(x.wait)
	select {
	case x.loads <- struct{}{}:
	case <-late:
		return ErrNotQueued
	}
	if !holding && !x.findRoom(late) { // what is in the commit or not on disk yet cannot be dropped
		<-x.loads
		return errors.New("the ids of other VMs take all the memory until they are on disk; try again")
	}
	return nil
}

// findRoom waits for room for a table, in the order in which it was asked for: who came
// later would else take what was made for one who waits, time and again.
func (x *idIndex) findRoom(late <-chan time.Time) bool {
	x.wants(1)
	defer x.wants(-1)
	select {
	case x.first <- struct{}{}:
		defer func() { <-x.first }()
	case <-late:
		return false
	}
	for {
		x.mu.Lock()
		x.evict()
		full, room := x.bytes > x.budget, x.room
		x.mu.Unlock()
		if !full {
			return true
		}
		select {
		case <-room:
		case <-late:
			return false
		}
	}
}

// wants counts who waits for room, for whom others are to leave.
func (x *idIndex) wants(n int) {
	x.mu.Lock()
	x.waiting += n
	x.evict()
	x.mu.Unlock()
}

// release lets go of what acquire has kept for b. The log is done with it.
func (x *idIndex) release(b *Batch) {
	for i, t := range b.tables {
		x.unpin(t)
		b.tables[i] = nil
	}
	b.tables = b.tables[:0]
}

func (x *idIndex) unpin(t *idTable) {
	x.mu.Lock()
	defer x.mu.Unlock()
	t.pins--
	x.evict()
	x.roomMade()
}

// account brings the count of bytes up to date with t, whose size nobody changes
// meanwhile. Call with mu held.
func (x *idIndex) account(t *idTable) {
	x.bytes += t.size() - t.counted
	t.counted = t.size()
}

func (x *idIndex) drop(t *idTable) {
	x.used.Remove(t.elem)
	delete(x.tables, t.vm)
	x.bytes -= t.counted
	if t.gone != nil {
		close(t.gone)
		x.leaving--
	}
}

// forget drops a VM's table, unless somebody publishes under that name just now.
func (x *idIndex) forget(vm string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if t := x.tables[vm]; t != nil && t.pins == 0 {
		x.drop(t)
		x.roomMade()
	}
}

// evict drops the tables used longest ago that nobody uses and that are whole on
// disk, while there are too many. While others wait for room, as many let nobody in
// any more until they are dropped: those who publish without a pause would keep
// theirs for ever, and the others none. Call with mu held.
func (x *idIndex) evict() {
	upTo, whole := x.written()
	for e := x.used.Back(); e != nil && (x.bytes > x.budget || x.leaving > 0); {
		t, prev := e.Value.(*idTable), e.Prev()
		switch {
		case x.bytes <= x.budget && t.gone == nil:
		case whole && t.pins == 0 && t.last <= upTo:
			x.drop(t)
		case x.leaving < x.waiting && t.gone == nil && t.counted > 0: // else it takes no room yet
			t.gone = make(chan struct{})
			x.leaving++
		}
		e = prev
	}
}

// roomMade wakes those who wait for room. Call with mu held.
func (x *idIndex) roomMade() {
	if x.bytes <= x.budget {
		close(x.room)
		x.room = make(chan struct{})
	}
}

// advanced is called when the files hold more than before.
func (x *idIndex) advanced() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.bytes > x.budget || x.leaving > 0 {
		x.evict()
		x.roomMade()
	}
}

// lookup gives the number of the first record of b's VM and id, 0 if there is
// none. The committer calls it.
func (x *idIndex) lookup(b *Batch, e *Entry) (uint64, error) {
	t := b.table(e.VM)
	if t.err != nil {
		return 0, t.err
	}
	x.looked, x.key = t, hashID(e.ID)
	return t.find(x.key), nil
}

// add remembers the id of the last lookup under seq until rollback or commit.
func (x *idIndex) add(seq uint64) idSeq {
	t := x.looked
	t.add(x.key, seq, x.window)
	if t.fresh++; t.fresh == 1 {
		x.pending = append(x.pending, t)
	}
	return idSeq{x.key, seq}
}

func (x *idIndex) commit() {
	if len(x.pending) == 0 {
		return
	}
	x.mu.Lock()
	for i, t := range x.pending {
		t.fresh = 0
		x.account(t)
		x.pending[i] = nil
	}
	x.mu.Unlock()
	x.pending = x.pending[:0]
}

// rollback forgets what was added since the last commit.
func (x *idIndex) rollback() {
	for _, t := range x.pending {
		t.undo()
	}
	x.commit()
}
