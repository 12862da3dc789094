package eventlog

import (
	"container/list"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

const (
	// idWindow is how many of a VM's newest ids are remembered at least
	// (contract: a retry among at least the last 65,536 is stored once).
	idWindow = 65536

	// idBudget bounds the ids in memory over all VMs, about 64 bytes each.
	// Beyond it the VMs that published longest ago are read again when needed.
	idBudget = 4 << 20

	idHash  = 16         // bytes of an id's SHA-256 that stand for it
	idEntry = idHash + 8 // of the file: the hash, then seq, big-endian
	idFile  = 2 * idWindow * idEntry
)

type idKey [idHash]byte

// idIndex finds the first record of a VM and an id. It belongs to the
// committer. On disk it is a file a VM, appended to by the goroutine that
// follows the log; a table may be dropped only when that file has all of it.
type idIndex struct {
	fs      FS
	dir     string
	written func() uint64 // records up to here are in the files
	aside   func(file, name string)

	tables map[string]*idTable
	used   list.List // of *idTable, most recently used first
	count  int       // ids in all tables

	looked  *idTable // of the last lookup
	key     idKey
	pending []idAdded // added since the last commit
}

type idTable struct {
	vm    string
	seqs  map[idKey]uint64
	order []idKey // oldest first from start on, a ring once full
	start int
	last  uint64 // the newest number in it
	elem  *list.Element
}

type idAdded struct {
	t   *idTable
	key idKey
}

func newIDIndex(fsys FS, dir string, written func() uint64) *idIndex {
	return &idIndex{fs: fsys, dir: dir, written: written, aside: func(string, string) {}, tables: make(map[string]*idTable)}
}

func hashID(id []byte) idKey {
	sum := sha256.Sum256(id)
	return idKey(sum[:idHash])
}

// lookup gives the number of the first record with this VM and id, 0 if there
// is none.
func (x *idIndex) lookup(vm string, id []byte) (uint64, error) {
	t := x.tables[vm]
	if t == nil {
		var err error
		if t, err = x.load(vm); err != nil {
			return 0, fmt.Errorf("loading the ids of %s: %w", vm, err)
		}
		x.tables[vm] = t
		t.elem = x.used.PushFront(t)
		x.count += len(t.seqs)
		x.evict()
	} else if x.used.Front() != t.elem {
		x.used.MoveToFront(t.elem)
	}
	x.looked, x.key = t, hashID(id)
	return t.seqs[x.key], nil
}

// add remembers the id of the last lookup under seq until rollback or commit.
func (x *idIndex) add(seq uint64) {
	x.count += x.looked.add(x.key, seq)
	x.pending = append(x.pending, idAdded{x.looked, x.key})
}

func (x *idIndex) commit() { x.pending = x.pending[:0] }

// rollback forgets what was added since the last commit. What those pushed out
// of a full window is not brought back: the window is twice what is promised.
func (x *idIndex) rollback() {
	for _, a := range x.pending {
		delete(a.t.seqs, a.key)
		x.count--
	}
	x.pending = x.pending[:0]
}

// add remembers key and gives by how much the table grew.
func (t *idTable) add(key idKey, seq uint64) int {
	t.last = max(t.last, seq)
	t.seqs[key] = seq
	if len(t.order) < 2*idWindow {
		t.order = append(t.order, key)
		return 1
	}
	before := len(t.seqs)
	delete(t.seqs, t.order[t.start])
	t.order[t.start] = key
	t.start = (t.start + 1) % len(t.order)
	return 1 + len(t.seqs) - before
}

// evict drops the tables used longest ago that are whole on disk.
func (x *idIndex) evict() {
	for e := x.used.Back(); e != nil && x.count > idBudget; {
		t, prev := e.Value.(*idTable), e.Prev()
		if e != x.used.Front() && t.last <= x.written() {
			x.used.Remove(e)
			delete(x.tables, t.vm)
			x.count -= len(t.seqs)
		}
		e = prev
	}
}

func (x *idIndex) path(vm string) string { return filepath.Join(x.dir, vm+".ids") }

// load reads a VM's file; none is an empty table.
func (x *idIndex) load(vm string) (*idTable, error) {
	t := &idTable{vm: vm, seqs: make(map[idKey]uint64)}
	data, err := x.read(vm)
	for ; len(data) > 0; data = data[idEntry:] {
		t.add(idKey(data), binary.BigEndian.Uint64(data[idHash:]))
	}
	return t, err
}

// read gives what is in a VM's file. What is in its place and is none is set aside.
func (x *idIndex) read(vm string) ([]byte, error) {
	path := x.path(vm)
	data, err := readIDs(x.fs, path)
	if !misplaced(err) {
		return data, err
	}
	name, err := setAside(x.fs, path)
	if err == nil {
		x.aside(path, name)
	}
	return nil, err
}

// readIDs gives the whole entries of an id file whose numbers rise: a power
// cut may leave anything behind the last one that was synced.
func readIDs(fsys FS, path string) ([]byte, error) {
	f, err := fsys.OpenFile(path, os.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // opened for reading
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	// Longer than that we do not make it.
	size = min(size, idFile+maxBuffered)
	data := make([]byte, size-size%idEntry)
	if n, err := f.ReadAt(data, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	} else if n < len(data) {
		data = data[:n-n%idEntry]
	}
	last := uint64(0)
	for off := 0; off < len(data); off += idEntry {
		seq := binary.BigEndian.Uint64(data[off+idHash:])
		if seq <= last {
			return data[:off], nil
		}
		last = seq
	}
	return data, nil
}
