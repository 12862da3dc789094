package eventlog

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/castrabus/castra/internal/bubble"
)

// countingFS is the machine's, and counts what is synced of the VMs' files.
type countingFS struct {
	FS
	trees, files atomic.Int64
	none         bool // no file system can be synced at once
}

func (c *countingFS) OpenTree(dir string) (Tree, error) {
	t, err := c.FS.OpenTree(dir)
	if t == nil || c.none {
		return nil, err
	}
	return &countingTree{t, c}, err
}

func (c *countingFS) SyncDir(dir string) error {
	if strings.Contains(dir, "/vm") {
		c.files.Add(1)
	}
	return c.FS.SyncDir(dir)
}

type countingTree struct {
	Tree
	c *countingFS
}

func (t *countingTree) Sync() error {
	t.c.trees.Add(1)
	return t.Tree.Sync()
}

// A checkpoint of many VMs is two calls, wherever their file system can do that.
func TestCheckpointTogether(t *testing.T) {
	for _, tt := range []struct {
		vms         int
		none        bool
		trees       int64
		filesAtMost int64
	}{
		{vms: syncTogether - 1, filesAtMost: 1 << 20},
		{vms: syncTogether, trees: 2},
		{vms: syncTogether, none: true, filesAtMost: 1 << 20},
	} {
		disk := &countingFS{FS: OS, none: tt.none}
		switch tree, err := OS.OpenTree(t.TempDir()); {
		case err != nil:
			t.Fatal(err)
		case tree == nil: // an overlay, say: every file by itself
			tt.trees, tt.filesAtMost = 0, 1<<20
		default:
			_ = tree.Close()
		}
		opts := testOptions(t.TempDir())
		opts.FS = disk
		l, _, err := open(opts)
		if err != nil {
			t.Fatal(err)
		}
		for round := range 2 { // the second with every name known
			b := &Batch{done: make(chan struct{}, 1)}
			for i := range tt.vms {
				b.Entries = append(b.Entries, Entry{VM: fmt.Sprint("web", i), Topic: []byte("t"), ID: fmt.Append(nil, round)})
			}
			if err := l.perVM.ids.acquire(t.Context(), b); err != nil {
				t.Fatal(err)
			}
			l.commit(b)
			if err := l.perVM.copyNew(); err != nil {
				t.Fatal(err)
			}
			disk.trees.Store(0)
			disk.files.Store(0)
			if err := l.perVM.checkpoint(); err != nil {
				t.Fatal(err)
			}
			files := disk.files.Load()
			if trees := disk.trees.Load(); trees != tt.trees || files > tt.filesAtMost {
				t.Errorf("%d VMs: %d trees and %d directories were synced, want %d and at most %d", tt.vms, trees, files, tt.trees, tt.filesAtMost)
			}
			if saved := l.perVM.saved.Load(); saved != l.Committed() {
				t.Errorf("the position saved is %d of %d", saved, l.Committed())
			}
		}
		if err := l.finish(); err != nil {
			t.Error(err)
		}
	}
}

// A start that cannot read how far the streams are fails, and tells why.
func TestUnreadablePosition(t *testing.T) {
	o := testOptions(t.TempDir())
	o.FS = badFileFS{OS, o.PerVM.PositionFile}
	if _, _, err := Open(o); !errors.Is(err, syscall.EIO) {
		t.Errorf("opening gives %v", err)
	}
}

// badFileFS has one file that cannot be opened.
type badFileFS struct {
	FS
	path string
}

func (b badFileFS) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	if name == b.path {
		return nil, &fs.PathError{Op: "open", Path: name, Err: syscall.EIO}
	}
	return b.FS.OpenFile(name, flag, perm)
}

// Where a checkpoint has failed nothing is well before one succeeds, whatever the page
// cache takes meanwhile. It is tried at the retry interval, what fails of one VM's is set
// aside at last, and until then everybody's retries are known.
func TestFailedCheckpoint(t *testing.T) {
	o := testOptions("/log")
	segments, ids := filepath.Join(o.PerVM.Dir, "web1"), filepath.Join(o.PerVM.IDDir, "web1"+idSuffix)
	for _, c := range []struct {
		name, bad string
		mended    string // whose becoming a name mends it
		asides    int
		oldest    uint64 // of web1's stream then
	}{
		{"segment", segments, segments + "~1", 1, 3},
		{"ids", ids, ids, 0, 1}, // written anew
		{"position", o.PerVM.PositionFile + ".tmp", "", 0, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble.Test(t, func(t *testing.T) {
				disk := newSimDisk(rand.New(rand.NewPCG(1, 1)))
				var sick atomic.Bool
				var tries atomic.Int32
				disk.fault = func(op, path string) error {
					switch {
					case op == "rename" && path == c.mended:
						sick.Store(false)
					case op == "sync" && sick.Load() && (path == c.bad || filepath.Dir(path) == c.bad):
						tries.Add(1)
						return syscall.EIO
					}
					return nil
				}
				o := testOptions("/log")
				o.FS = &sharedFS{FS: disk}
				told, asides := make(chan error, 100), make(chan string, 10)
				o.PerVM.OnError = func(err error) { told <- err }
				o.PerVM.OnAside = func(_, name string) { asides <- name }
				l := mustOpen(t, o)
				publish(t, l, "web1", "t", "a", "1")
				publish(t, l, "web2", "t", "a", "1")
				l.perVM.hurry()
				time.Sleep(time.Second)
				sick.Store(true)
				publish(t, l, "web1", "t", "b", "1")
				l.perVM.hurry()
				time.Sleep(asideAfter / 2)
				l.perVM.ids.forget("web2")
				if seq := publish(t, l, "web2", "t", "a", "1"); seq != 2 {
					t.Errorf("a retry is record %d", seq)
				}
				time.Sleep(asideAfter/2 - 5*time.Second)
				synctest.Wait()
				if err := <-told; !errors.Is(err, syscall.EIO) || len(told) > 0 || len(asides) > 0 {
					t.Errorf("told of %v and %d more, %d set aside", err, len(told), len(asides))
				}
				if n, most := tries.Load(), int32((asideAfter-5*time.Second)/retryInterval); n < most-5 || n > most {
					t.Errorf("%d tries", n)
				}
				time.Sleep(10 * time.Second)
				if c.mended == "" {
					sick.Store(false)
					time.Sleep(2 * time.Second)
				}
				synctest.Wait()
				if len(told) != 1 || <-told != nil || len(asides) != c.asides {
					t.Errorf("told of %d more, %d set aside", len(told), len(asides))
				}
				if saved := l.perVM.saved.Load(); saved != l.Committed() {
					t.Errorf("the position saved is %d of %d", saved, l.Committed())
				}
				if oldest, err := l.OldestOf("web1"); oldest != c.oldest || err != nil {
					t.Errorf("the VM's stream begins with %d, %v", oldest, err)
				}
				mustClose(t, l)
			})
		})
	}
}

// Where what a checkpoint has lost cannot be copied again either, one that has nothing to
// sync, made before that can be, does not count.
func TestFailedCheckpointOfNothing(t *testing.T) { bubble.Test(t, testFailedCheckpointOfNothing) }

func testFailedCheckpointOfNothing(t *testing.T) {
	disk := newSimDisk(rand.New(rand.NewPCG(1, 1)))
	o := testOptions("/log")
	var sick, broken atomic.Bool
	disk.fault = func(op, path string) error {
		if !sick.Load() || filepath.Dir(path) != filepath.Join(o.PerVM.Dir, "web1") {
			return nil
		}
		if op == "sync" {
			broken.Store(true)
		}
		if broken.Load() {
			return syscall.EIO
		}
		return nil
	}
	o.FS = &sharedFS{FS: disk}
	told := make(chan error, 10)
	o.PerVM.OnError = func(err error) { told <- err }
	l := mustOpen(t, o)
	publish(t, l, "web1", "t", "", "1") // and a checkpoint is due checkpointInterval later
	time.Sleep(checkpointInterval - retryInterval/2)
	sick.Store(true)
	publish(t, l, "web1", "t", "", "1")
	l.perVM.hurry()
	time.Sleep(3 * retryInterval / 4)
	broken.Store(false) // until the next sync
	time.Sleep(3 * retryInterval / 4)
	synctest.Wait()
	if err := <-told; !errors.Is(err, syscall.EIO) || len(told) > 0 {
		t.Errorf("told of %v and %d more", err, len(told))
	}
	sick.Store(false)
	time.Sleep(2 * retryInterval)
	synctest.Wait()
	if len(told) != 1 || l.perVM.saved.Load() != l.Committed() {
		t.Errorf("told of %d more, the position saved is %d", len(told), l.perVM.saved.Load())
	}
	mustClose(t, l)
}
