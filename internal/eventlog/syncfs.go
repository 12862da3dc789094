package eventlog

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// Tree is a directory with all that is in it, which is made durable at once: one call
// in place of thousands, where thousands of files were written.
type Tree interface {
	// Sync makes durable what was done in the tree, names too. An error is of anything
	// that went wrong since the Tree was opened or since the last error, and means what
	// [File.Sync]'s does for every file in it.
	Sync() error
	Close() error
}

// wholeTrees are the file systems, by their magic numbers, in whose sources syncfs waits
// for the disk and returns its errors. Others may only hand the bytes on (FUSE), or tell
// nobody.
var wholeTrees = []int64{
	unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.F2FS_SUPER_MAGIC, unix.TMPFS_MAGIC,
}

// OpenTree gives the tree of dir, nil where its file system cannot be trusted with it.
func (osFS) OpenTree(dir string) (Tree, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	// Signed or not, and 32 or 64 bits, that field is the architecture's.
	if !slices.Contains(wholeTrees, int64(st.Type)) || !syncfsTells() { //nolint:unconvert // see above
		return nil, nil
	}
	// Errors count from here on, so it stays open.
	f, err := os.Open(filepath.Clean(dir))
	if err != nil {
		return nil, err
	}
	return osTree{osFile{f}}, nil
}

// syncfsTells says whether this kernel's syncfs returns errors at all, which it does
// since Linux 5.8 (syncfs(2)).
func syncfsTells() bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	var major, minor int
	if n, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor); n < 2 || err != nil {
		return false
	}
	return major > 5 || major == 5 && minor >= 8
}

// osTree is a directory that stays open.
type osTree struct{ f osFile }

func (t osTree) Sync() error {
	return t.f.control("syncfs", unix.Syncfs)
}

func (t osTree) Close() error { return t.f.Close() }

// closeTrees gives up those that are open.
func closeTrees(trees ...Tree) (err error) {
	for _, t := range trees {
		if t != nil {
			err = errors.Join(err, t.Close())
		}
	}
	return err
}
