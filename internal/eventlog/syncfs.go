package eventlog

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
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

// syncfs is the number of syncfs(2), which package syscall has not for every
// architecture (Linux: arch/x86/entry/syscalls/syscall_64.tbl,
// include/uapi/asm-generic/unistd.h); 0: not known here.
var syncfs = map[string]uintptr{"amd64": 306, "arm64": 267}[runtime.GOARCH]

// wholeTrees are the file systems, by their magic numbers (linux/magic.h), of which
// syncfs has been read to wait for the disk and to tell of errors. Others may only
// hand the bytes on (FUSE), or tell nobody.
var wholeTrees = []int64{
	0xef53,     // ext4
	0x58465342, // XFS
	0x9123683e, // btrfs
	0xf2f52010, // F2FS
	0x01021994, // tmpfs
}

// OpenTree gives the tree of dir, nil where its file system cannot be trusted with it.
func (osFS) OpenTree(dir string) (Tree, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	// Signed or not, and 32 or 64 bits, that field is the architecture's.
	if syncfs == 0 || !slices.Contains(wholeTrees, int64(st.Type)) || !syncfsTells() { //nolint:unconvert // see above
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
	var u syscall.Utsname
	if syscall.Uname(&u) != nil {
		return false
	}
	release := make([]byte, 0, len(u.Release))
	for _, c := range u.Release {
		release = append(release, byte(c))
	}
	var major, minor int
	if n, err := fmt.Sscanf(string(release), "%d.%d", &major, &minor); n < 2 || err != nil {
		return false
	}
	return major > 5 || major == 5 && minor >= 8
}

// osTree is a directory that stays open.
type osTree struct{ f osFile }

func (t osTree) Sync() error {
	return t.f.control("syncfs", func(fd int) error {
		if _, _, errno := syscall.Syscall(syncfs, uintptr(fd), 0, 0); errno != 0 {
			return errno
		}
		return nil
	})
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
