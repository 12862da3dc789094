package eventlog

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// FS is the part of a file system that the log depends on, so that crash tests
// can put a disk under it that loses what was not synced. Paths are as for
// package os.
type FS interface {
	OpenFile(name string, flag int, perm fs.FileMode) (File, error)
	ReadDir(dir string) ([]fs.DirEntry, error)
	Mkdir(dir string, perm fs.FileMode) error
	Rename(from, to string) error
	Remove(name string) error
	// SyncDir makes the creations, renames and removals in dir durable.
	SyncDir(dir string) error
	// OpenTree gives what syncs all that is in dir at once, nil where nothing can.
	OpenTree(dir string) (Tree, error)
}

// File is an open file of an [FS].
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Size() (int64, error)
	Truncate(size int64) error
	// Changed gives when the file, or what is known of it, was changed last, in ns
	// since 1970: its ctime, which nobody can set.
	Changed() (int64, error)
	// Removed tells whether the file is not there any more under the name by which it was
	// opened.
	Removed() (bool, error)
	// Sync makes data and size durable (fdatasync). After an error nothing may
	// be assumed of anything written since the last success: the kernel may
	// have dropped the pages and call them clean (fsync(2), "ERRORS").
	Sync() error
	// WriteBack has the disk begin to write what is in the page cache, and waits for
	// nothing: a Sync to come has less to do, and tells of what went wrong.
	WriteBack(off, n int64)
	// Preallocate reserves blocks without changing the size, so that a reader
	// never sees NUL bytes (fallocate(2), FALLOC_FL_KEEP_SIZE).
	Preallocate(off, n int64) error
}

// OS is the machine's file system.
var OS FS = osFS{}

type osFS struct{}

var errNotRegular = errors.New("it is no regular file")

// misplaced tells whether err says that something else is where a file should be.
func misplaced(err error) bool {
	return errors.Is(err, errNotRegular) || errors.Is(err, syscall.ELOOP) || errors.Is(err, syscall.EISDIR)
}

// setAside renames what is at path, so that there is room for a file and nothing is
// lost, and gives its new name, path with mark and a number behind it.
func setAside(fsys FS, path, mark string) (string, error) {
	for i := 1; ; i++ {
		name := fmt.Sprintf("%s%s%d", path, mark, i)
		f, err := fsys.OpenFile(name, os.O_RDONLY, 0)
		if err == nil {
			_ = f.Close()
			continue
		}
		if misplaced(err) {
			continue
		}
		switch err := fsys.Rename(path, name); {
		case err == nil, errors.Is(err, fs.ErrNotExist):
			return name, nil
		case !errors.Is(err, fs.ErrExist): // else it is a directory that cannot be opened
			return "", err
		}
	}
}

// openOwn opens a file that nobody but castrad makes. What stands in its place and
// is none is set aside, of which told is told if it is not nil; there is no file then.
func openOwn(fsys FS, path string, flag int, told func(file, name string)) (File, error) {
	f, err := fsys.OpenFile(path, flag, filePerm)
	if !misplaced(err) {
		return f, err
	}
	name, err := setAside(fsys, path, ".aside-")
	if err != nil {
		return nil, err
	}
	if told != nil {
		told(path, name)
	}
	return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
}

func (osFS) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	// Somebody who edits the directories may leave a pipe, whose other end nobody
	// opens, or a link that leads to a file of somebody else's.
	f, err := os.OpenFile(name, flag|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, perm)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = &fs.PathError{Op: "open", Path: name, Err: errNotRegular}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return osFile{f}, nil
}

func (osFS) ReadDir(dir string) ([]fs.DirEntry, error) { return os.ReadDir(dir) }
func (osFS) Mkdir(dir string, perm fs.FileMode) error  { return os.Mkdir(dir, perm) }
func (osFS) Rename(from, to string) error              { return os.Rename(from, to) }
func (osFS) Remove(name string) error                  { return os.Remove(name) }

func (osFS) SyncDir(dir string) error {
	d, err := os.Open(filepath.Clean(dir))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

type osFile struct{ *os.File }

func (f osFile) Size() (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

func (f osFile) Changed() (int64, error) {
	st, err := f.fstat()
	return st.Ctim.Nano(), err
}

func (f osFile) Removed() (bool, error) {
	st, err := f.fstat()
	if err != nil {
		return false, err
	}
	var there syscall.Stat_t
	err = syscall.Lstat(f.Name(), &there)
	// Another error tells nothing of the file, which can be written to as it was.
	return errors.Is(err, fs.ErrNotExist) || err == nil && (there.Dev != st.Dev || there.Ino != st.Ino), nil
}

func (f osFile) fstat() (st syscall.Stat_t, err error) {
	err = f.control("fstat", func(fd int) error { return syscall.Fstat(fd, &st) })
	return st, err
}

func (f osFile) Sync() error {
	return f.control("fdatasync", syscall.Fdatasync)
}

func (f osFile) WriteBack(off, n int64) {
	_ = f.control("sync_file_range", func(fd int) error {
		return unix.SyncFileRange(fd, off, n, unix.SYNC_FILE_RANGE_WRITE)
	})
}

func (f osFile) Preallocate(off, n int64) error {
	return f.control("fallocate", func(fd int) error {
		const keepSize = 0x1 // FALLOC_FL_KEEP_SIZE, linux/falloc.h
		return syscall.Fallocate(fd, keepSize, off, n)
	})
}

// control runs call on the descriptor, again while a signal interrupts it.
func (f osFile) control(op string, call func(fd int) error) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var callErr error
	err = rc.Control(func(fd uintptr) {
		for {
			if callErr = call(int(fd)); !errors.Is(callErr, syscall.EINTR) {
				return
			}
		}
	})
	if callErr != nil {
		return &fs.PathError{Op: op, Path: f.Name(), Err: callErr}
	}
	return err
}

// MakeDir makes dir and those above it that are missing, durably: each one's name is
// synced before anything is made in it, so that a crash never leaves a directory whose
// parent's name may be lost.
func MakeDir(fsys FS, dir string) error {
	parent := filepath.Dir(dir)
	d, err := fsys.OpenFile(dir, os.O_RDONLY, 0)
	if err == nil {
		err = d.Close()
	}
	existed := err == nil || misplaced(err)
	if errors.Is(err, fs.ErrNotExist) && parent != dir {
		if err = MakeDir(fsys, parent); err == nil {
			err = fsys.Mkdir(dir, dirPerm)
		}
	}
	if err != nil && !existed {
		return err
	}
	// Also where it was there: whoever made it may have been killed before this.
	err = fsys.SyncDir(parent)
	if existed && errors.Is(err, fs.ErrPermission) {
		return nil // who made it may read its parent, so it was not us
	}
	return err
}

// Replace gives the small file at path the contents data, whole or not at all,
// and such that a power cut does not take it back.
func Replace(fsys FS, path string, data []byte) error {
	if err := replaceFile(fsys, path, data); err != nil {
		return err
	}
	return fsys.SyncDir(filepath.Dir(path))
}

// replaceFile gives path the contents data, whole or not at all. Until its
// directory is synced a power cut may bring the old contents back.
func replaceFile(fsys FS, path string, data []byte) error {
	tmp := path + ".tmp"
	// A power cut may have left half a rename: then it is path's file under another name.
	if err := fsys.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := fsys.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, filePerm)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, 0)
	if err == nil {
		err = f.Sync() // or the new name may come to stand for an empty file
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return fsys.Rename(tmp, path)
}
