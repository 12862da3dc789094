package eventlog

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
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
