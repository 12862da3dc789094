package statefile

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// Replacer writes small files again and again. Whoever reads one gets all of what was
// written last, or of what was there before; nothing is synced.
//
// What a file was before stays among the spares, and holds what it is next: the two
// change places. A new file each time costs several times as much. After a power cut a
// file may be an older one, or empty if it was new.
//
// New files are made where ext4 puts the inodes of a directory without relatives, and
// under a made-up name: without a journal it does not use an inode again for a minute or
// more, and looks for each new one by going through those that were removed nearby
// (recently_deleted in the kernel's fs/ext4/ialloc.c). That can take ten times as long
// as all the rest.
type Replacer struct {
	Dir    string // where the files are
	Spares string // another directory on the same file system, for nobody else
	Perm   os.FileMode

	once sync.Once
	own  string // the directory within Spares that is used
}

// Replace gives the file called name the contents data. What is no file there, and can
// not be replaced by one, is set aside. One goroutine at a time calls it for a name.
func (r *Replacer) Replace(name string, data []byte) error {
	spare, path := r.spares()+"/"+name, r.Dir+"/"+name
	err := r.fill(spare, data)
	if errors.Is(err, fs.ErrNotExist) { // the first time, or somebody has tidied up
		if err = r.makeSpares(); err == nil {
			err = r.fill(spare, data)
		}
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", spare, err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err == nil {
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			if unix.Renameat2(unix.AT_FDCWD, spare, unix.AT_FDCWD, path, unix.RENAME_EXCHANGE) == nil {
				return nil
			} // else the file system cannot, and a spare is made each time
		case unix.S_IFDIR:
			if _, err := SetAside(path); err != nil {
				return err
			}
		}
	}
	if err := unix.Rename(spare, path); err != nil {
		return fmt.Errorf("renaming %s to %s: %w", spare, path, err)
	}
	return nil
}

// spares gives the directory of the spares: that of an earlier run, or one to be made.
func (r *Replacer) spares() string {
	r.once.Do(func() {
		r.own = filepath.Join(r.Spares, rand.Text())
		entries, _ := os.ReadDir(r.Spares) // where it is not there, or cannot be read, is seen when a file is to be made
		for _, e := range entries {
			if e.IsDir() {
				r.own = filepath.Join(r.Spares, e.Name())
			}
		}
	})
	return r.own
}

// topDir is FS_TOPDIR_FL of linux/fs.h.
const topDir = 0x20000

// makeSpares makes that directory.
func (r *Replacer) makeSpares() error {
	if err := os.MkdirAll(r.Spares, 0o750); err != nil {
		return err
	}
	if f, err := os.Open(r.Spares); err == nil {
		// chattr(1), +T: what is in it has nothing to do with each other. Other file
		// systems do not know the word, and need not.
		if flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS); err == nil {
			_ = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags|topDir)
		}
		_ = f.Close() // nothing was written to it
	}
	return os.MkdirAll(r.own, 0o750)
}

// Remove removes the file called name, if there is one.
func (r *Replacer) Remove(name string) error {
	var errs []error
	for _, dir := range []string{r.spares(), r.Dir} {
		if err := os.Remove(dir + "/" + name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// fill makes path a file that holds data: the one that is there, if that harms nobody.
func (r *Replacer) fill(path string, data []byte) error {
	// Straight system calls: an os.File takes six more, to see whether one could wait
	// for it.
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err == nil {
		if reusable(fd, len(data)) {
			return writeAndClose(fd, data)
		}
		_ = unix.Close(fd)
	}
	if !errors.Is(err, unix.ENOENT) {
		if err := unix.Unlink(path); errors.Is(err, unix.EISDIR) {
			if _, err := SetAside(path); err != nil {
				return err
			}
		}
	}
	fd, err = unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, uint32(r.Perm.Perm()))
	if err != nil {
		return err
	}
	return writeAndClose(fd, data)
}

// reusable tells whether the open file may be written over by size bytes: it is as
// long, so that a power cut leaves no half of one; it has no other name, as a snapshot
// made of hard links gives it; and nobody has it open, who read it under its other name
// when it was the newest. A lease is granted only then (F_SETLEASE, fcntl(2)).
func reusable(fd, size int) bool {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1 || st.Size != int64(size) {
		return false
	}
	_, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_WRLCK)
	return err == nil
}

// writeAndClose writes data to fd and closes it, which ends a lease, too.
func writeAndClose(fd int, data []byte) (err error) {
	for len(data) > 0 && err == nil {
		var n int
		n, err = unix.Write(fd, data)
		data = data[max(0, n):]
		if errors.Is(err, unix.EINTR) {
			err = nil
		}
	}
	return errors.Join(err, unix.Close(fd))
}
