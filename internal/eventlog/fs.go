package eventlog

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
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
}

// File is an open file of an [FS].
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Size() (int64, error)
	Truncate(size int64) error
	// Sync makes data and size durable (fdatasync). After an error nothing may
	// be assumed of anything written since the last success: the kernel may
	// have dropped the pages and call them clean (fsync(2), "ERRORS").
	Sync() error
	// Preallocate reserves blocks without changing the size, so that a reader
	// never sees NUL bytes (fallocate(2), FALLOC_FL_KEEP_SIZE).
	Preallocate(off, n int64) error
}

// OS is the machine's file system.
var OS FS = osFS{}

type osFS struct{}

func (osFS) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	f, err := os.OpenFile(name, flag, perm)
	if err != nil {
		return nil, err
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

func (f osFile) Sync() error {
	return f.control("fdatasync", syscall.Fdatasync)
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

// makeDir makes dir and those above it that are missing, durably: each one's
// name is synced before anything is made in it, so that of those that are there
// only the last one's may not be.
func makeDir(fsys FS, dir string) error {
	parent := filepath.Dir(dir)
	d, err := fsys.OpenFile(dir, os.O_RDONLY, 0)
	existed := err == nil
	if existed {
		err = d.Close()
	} else if errors.Is(err, fs.ErrNotExist) && parent != dir {
		if err = makeDir(fsys, parent); err == nil {
			err = fsys.Mkdir(dir, dirPerm)
		}
	}
	if err != nil {
		return err
	}
	// Also where it was there: whoever made it may have been killed before this.
	err = fsys.SyncDir(parent)
	if existed && errors.Is(err, fs.ErrPermission) {
		return nil // who made it may read its parent, so it was not us
	}
	return err
}

// MakeDir makes dir and those above it that are missing, durably.
func MakeDir(fsys FS, dir string) error { return makeDir(fsys, dir) }

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
