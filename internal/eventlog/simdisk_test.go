package eventlog

import (
	"errors"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// simDisk is a file system that keeps exactly the promises that POSIX makes,
// and no more. What was not synced is lost or kept piece by piece when the power
// fails: a file's bytes by sectors and, at one place, by bytes; its sizes; and
// each name in a directory for itself. Its only source of chance is rng, and it
// is used by one goroutine, so a run can be had again from its seed.
type simDisk struct {
	rng  *rand.Rand
	root *simNode

	ops     int // that changed something, since the last crash
	crashAt int // the operation before which the crash comes; 0: none

	fault    func(op, path string) error // an error for an operation; nil: none ever
	rebooted bool
	// badSector tells whether n bytes at off cannot be read; nil: all can.
	badSector func(path string, off int64, n int) bool
	// noRoom: what is not reserved cannot be written.
	noRoom bool
	// ignored is a call of Sync or SyncDir, as syncSite gives it, that does
	// nothing: the log without that call. Calls are counted in sites if not nil.
	ignored string
	sites   map[string]int
}

// errPowerCut is what the disk panics with where the crash comes.
var errPowerCut = errors.New("the power is cut")

// simNode is a directory or a file.
type simNode struct {
	dir      bool
	modified time.Time

	// A file: what is seen, what is certain, and what was done since the last
	// sync in this order.
	data, durable []byte
	pending       []simWrite
	// Up to where there are blocks, and when it was changed last.
	reserved, durableReserved int64
	changed, durableChanged   int64

	// A directory, in the same way; a nil node is a removal.
	names, durableNames map[string]*simNode
	changes             []simName
}

type simWrite struct {
	off  int64
	data []byte // nil: the file was cut or grown to off
}

type simName struct {
	name string
	node *simNode
}

func newSimDisk(rng *rand.Rand) *simDisk {
	return &simDisk{rng: rng, root: newSimDir()}
}

func newSimDir() *simNode {
	return &simNode{dir: true, modified: time.Now(), names: map[string]*simNode{}, durableNames: map[string]*simNode{}}
}

// syncSite names the call in the log that is three frames up, file:line. What
// calls the log's own small wrappers counts, not what these do.
func syncSite() string {
	var pcs [5]uintptr
	frames := runtime.CallersFrames(pcs[:runtime.Callers(4, pcs[:])])
	for {
		f, more := frames.Next()
		if !more || !strings.HasSuffix(f.Function, ".(*stream).syncDir") && !strings.HasSuffix(f.Function, ".(*Log).sync") && !strings.HasSuffix(f.Function, ".(*committer).syncSegment") {
			return filepath.Base(f.File) + ":" + strconv.Itoa(f.Line)
		}
	}
}

// change is called before everything that changes the disk.
func (d *simDisk) change(op, path string) error {
	d.ops++
	if d.crashAt > 0 && d.ops >= d.crashAt {
		panic(errPowerCut)
	}
	if d.fault != nil {
		if err := d.fault(op, path); err != nil {
			return &fs.PathError{Op: op, Path: path, Err: err}
		}
	}
	return nil
}

// find gives path's node and its directory's.
func (d *simDisk) find(path string) (dir, node *simNode, err error) {
	dir = d.root
	node = d.root
	for part := range strings.SplitSeq(strings.Trim(filepath.Clean(path), "/"), "/") {
		if part == "" || part == "." {
			continue
		}
		if node == nil || !node.dir {
			return nil, nil, &fs.PathError{Op: "open", Path: path, Err: syscall.ENOENT}
		}
		dir, node = node, node.names[part]
	}
	return dir, node, nil
}

func (n *simNode) set(name string, node *simNode) {
	if node == nil {
		delete(n.names, name)
	} else {
		n.names[name] = node
	}
	n.changes = append(n.changes, simName{name, node})
}

func (d *simDisk) OpenFile(name string, flag int, _ fs.FileMode) (File, error) {
	dir, node, err := d.find(name)
	if err != nil {
		return nil, err
	}
	switch {
	case node == nil && flag&os.O_CREATE == 0:
		return nil, &fs.PathError{Op: "open", Path: name, Err: syscall.ENOENT}
	case node == nil:
		if err := d.change("create", name); err != nil {
			return nil, err
		}
		node = &simNode{modified: time.Now()}
		dir.set(filepath.Base(name), node)
	case flag&os.O_EXCL != 0:
		return nil, &fs.PathError{Op: "open", Path: name, Err: syscall.EEXIST}
	case flag&os.O_TRUNC != 0 && len(node.data) > 0:
		if err := d.change("truncate", name); err != nil {
			return nil, err
		}
		node.resize(0)
	}
	return &simFile{d: d, n: node, path: name, direct: flag&syscall.O_DIRECT != 0}, nil
}

func (d *simDisk) ReadDir(dir string) ([]fs.DirEntry, error) {
	_, node, err := d.find(dir)
	if err != nil {
		return nil, err
	}
	if node == nil {
		return nil, &fs.PathError{Op: "open", Path: dir, Err: syscall.ENOENT}
	}
	var entries []fs.DirEntry
	for _, name := range slices.Sorted(maps.Keys(node.names)) {
		entries = append(entries, simInfo{name, node.names[name]})
	}
	return entries, nil
}

func (d *simDisk) Mkdir(name string, _ fs.FileMode) error {
	dir, node, err := d.find(name)
	if err != nil {
		return err
	}
	if node != nil {
		return &fs.PathError{Op: "mkdir", Path: name, Err: syscall.EEXIST}
	}
	if dir == nil {
		return &fs.PathError{Op: "mkdir", Path: name, Err: syscall.ENOENT}
	}
	if err := d.change("mkdir", name); err != nil {
		return err
	}
	dir.set(filepath.Base(name), newSimDir())
	return nil
}

func (d *simDisk) Rename(from, to string) error {
	fromDir, node, err := d.find(from)
	if err != nil {
		return err
	}
	toDir, _, err := d.find(to)
	if err != nil {
		return err
	}
	if err := d.change("rename", to); err != nil {
		return err
	}
	toDir.set(filepath.Base(to), node)
	fromDir.set(filepath.Base(from), nil)
	return nil
}

func (d *simDisk) Remove(name string) error {
	dir, node, err := d.find(name)
	if err != nil {
		return err
	}
	if node == nil {
		return &fs.PathError{Op: "remove", Path: name, Err: syscall.ENOENT}
	}
	if err := d.change("remove", name); err != nil {
		return err
	}
	dir.set(filepath.Base(name), nil)
	return nil
}

// synced counts a call of Sync or SyncDir and tells whether it does nothing.
func (d *simDisk) synced() bool {
	if d.sites == nil && d.ignored == "" {
		return false
	}
	site := syncSite()
	if d.sites != nil {
		d.sites[site]++
	}
	return site == d.ignored
}

func (d *simDisk) SyncDir(dir string) error {
	ignored := d.synced()
	_, node, err := d.find(dir)
	if err != nil {
		return err
	}
	if node == nil {
		return &fs.PathError{Op: "syncdir", Path: dir, Err: syscall.ENOENT}
	}
	if err := d.change("syncdir", dir); err != nil || ignored {
		return err
	}
	node.sync()
	return nil
}

// sync makes what was done to a file, or to a directory's own names, durable.
func (n *simNode) sync() {
	for _, w := range n.pending {
		n.durable = w.apply(n.durable)
	}
	n.pending = n.pending[:0]
	n.durableReserved, n.durableChanged = n.reserved, n.changed
	for _, c := range n.changes {
		if c.node == nil {
			delete(n.durableNames, c.name)
		} else {
			n.durableNames[c.name] = c.node
		}
	}
	n.changes = n.changes[:0]
}

// fail is sync on a disk that fails: the kernel drops some of what it could not write
// and calls it clean. No later sync will write it, though it may be seen for a while
// yet. A cut is the journal's, which loses nothing and goes on: the next sync has it.
func (d *simDisk) fail(n *simNode) {
	n.durable = d.survive(n)
	n.pending = slices.DeleteFunc(n.pending, func(w simWrite) bool { return w.data != nil })
	if d.rng.IntN(2) == 0 {
		size := len(n.data)
		n.data = append(n.data[:0], n.durable...)
		n.data = grow(n.data, size)[:size]
	}
}

func (d *simDisk) OpenTree(dir string) (Tree, error) { return &simTree{d, dir}, nil }

// simTree promises no more than its directory, though syncfs(2) is of the whole disk.
type simTree struct {
	d   *simDisk
	dir string
}

func (t *simTree) Close() error { return nil }

func (t *simTree) Sync() error {
	ignored := t.d.synced()
	_, node, err := t.d.find(t.dir)
	if err != nil {
		return err
	}
	if err := t.d.change("synctree", t.dir); err != nil {
		t.d.syncSome(node)
		return err
	}
	if !ignored {
		node.syncAll()
	}
	return nil
}

// syncAll makes n and all below it durable.
func (n *simNode) syncAll() {
	n.sync()
	for _, below := range n.names {
		below.syncAll()
	}
}

// syncSome is syncAll on a disk that fails: each node may be durable, be as before, or
// have lost what was not.
func (d *simDisk) syncSome(n *simNode) {
	switch d.rng.IntN(3) {
	case 0:
		n.sync()
	case 1:
		if !n.dir {
			d.fail(n)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(n.names)) {
		d.syncSome(n.names[name])
	}
}
