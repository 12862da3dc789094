package guest

import (
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
)

// badFS is the machine's file system over a disk that can fail, block, and lose what
// was not synced.
type badFS struct {
	eventlog.FS
	write, sync, create atomic.Pointer[error]
	blocked             atomic.Pointer[chan struct{}] // syncs wait for it
	syncs               atomic.Int64

	mu     sync.Mutex
	synced map[string]int64 // by path: the size that a power cut leaves
	cut    bool             // nothing is done any more
}

func newBadFS() *badFS { return &badFS{FS: eventlog.OS, synced: make(map[string]int64)} }

var errPowerCut = errors.New("the power is off")

func (b *badFS) off() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.cut
}

func (b *badFS) OpenFile(name string, flag int, perm fs.FileMode) (eventlog.File, error) {
	if b.off() {
		return nil, errPowerCut
	}
	if err := b.create.Load(); err != nil && flag&os.O_CREATE != 0 {
		return nil, *err
	}
	f, err := b.FS.OpenFile(name, flag, perm)
	if err != nil {
		return nil, err
	}
	return &badFile{f, b, name}, nil
}

// SyncDir takes no time: which names a power cut takes away is for eventlog's tests.
func (b *badFS) SyncDir(string) error {
	if b.off() {
		return errPowerCut
	}
	return nil
}

func (b *badFS) Rename(from, to string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cut {
		return errPowerCut
	}
	b.synced[to] = b.synced[from]
	delete(b.synced, from)
	return b.FS.Rename(from, to)
}

func (b *badFS) Remove(name string) error {
	if b.off() {
		return errPowerCut
	}
	return b.FS.Remove(name)
}

type badFile struct {
	eventlog.File
	fs   *badFS
	name string
}

func (f *badFile) WriteAt(p []byte, off int64) (int, error) {
	if f.fs.off() {
		return 0, errPowerCut
	}
	if err := f.fs.write.Load(); err != nil {
		n, _ := f.File.WriteAt(p[:len(p)/2], off)
		return n, *err
	}
	return f.File.WriteAt(p, off)
}

func (f *badFile) Truncate(size int64) error {
	if f.fs.off() {
		return errPowerCut
	}
	return f.File.Truncate(size)
}

func (f *badFile) Preallocate(off, n int64) error {
	if err := f.fs.write.Load(); err != nil {
		return *err
	}
	return f.File.Preallocate(off, n)
}

func (f *badFile) Sync() error {
	if ch := f.fs.blocked.Load(); ch != nil {
		<-*ch
	}
	if err := f.fs.sync.Load(); err != nil {
		return *err
	}
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.fs.cut {
		return errPowerCut
	}
	size, err := f.Size()
	if err == nil {
		f.fs.synced[f.name] = size
		f.fs.syncs.Add(1)
	}
	return err
}

// powerCut stops the disk and takes from every file what was not synced, or some
// of it.
func (b *badFS) powerCut(t *testing.T, dir string, rng *rand.Rand) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.cut = true
	files, err := filepath.Glob(filepath.Join(dir, "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range files {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		safe := b.synced[path]
		if info.Size() > safe {
			if err := os.Truncate(path, safe+rng.Int64N(info.Size()-safe+1)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// diskBox is a box whose spool is on disk, its keeper and its loader at work.
type diskBox struct {
	*box
	fs   *badFS
	logs *logs
	dir  string
	stop func()
}

func openBox(t *testing.T, dir string, limit int64) *diskBox {
	t.Helper()
	b := &diskBox{fs: newBadFS(), logs: &logs{}, dir: dir}
	files, _ := filepath.Glob(filepath.Join(dir, "*", "*"))
	for _, path := range files {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		b.fs.synced[path] = info.Size() // what a power cut left is on the disk
	}
	d, err := openDisk(diskOptions{dir: dir, vm: "web1", size: limit, fs: b.fs, log: b.logs.entry()})
	if err != nil {
		t.Fatal(err)
	}
	b.box = &box{outbox: newOutbox(limit, d), t: t, told: make(map[string]result)}
	b.wake, b.note = func() {}, func() {}
	b.lost = func(r *Record, _ *bus.Error) { b.given = append(b.given, r.ID) }
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	work.Go(func() { b.keeper(ctx) })
	work.Go(func() { b.loader(ctx) })
	b.stop = sync.OnceFunc(func() {
		b.outbox.close()
		cancel()
		work.Wait()
		d.close(time.Hour)
	})
	t.Cleanup(b.stop)
	return b
}

// try publishes without anything that fails the test, and notes what is told.
func (b *diskBox) try(id string) error {
	return b.put(Record{Topic: "t", ID: id, Payload: []byte(`"` + strings.Repeat("x", 50) + `"`)}, func(r result) {
		b.tells.Lock()
		defer b.tells.Unlock()
		b.told[id] = r
	})
}

// heard gives what the publisher of a record was told, the zero result if nothing.
func (b *diskBox) heard(id string) result {
	b.tells.Lock()
	defer b.tells.Unlock()
	return b.told[id]
}

// host is the other side of all that a spool does.
type host struct {
	seqs map[string]uint64
	ids  []string // in order, each once
}

// take answers what b sends, as long as it sends something.
func (h *host) take(b *diskBox, most int) {
	for most > 0 {
		synctest.Wait()
		ids, _ := b.send()
		if len(ids) == 0 {
			return
		}
		for _, id := range ids {
			if h.seqs[id] == 0 {
				h.ids = append(h.ids, id)
				h.seqs[id] = uint64(len(h.ids))
			}
		}
		for _, id := range ids {
			if most--; most < 0 {
				b.end() // stored, and the answer is lost
				return
			}
			b.ok(id, h.seqs[id])
		}
	}
}
