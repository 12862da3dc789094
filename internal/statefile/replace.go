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

// Files are the files of a [Replacer] while it has their directories open. In those a
// name is found sooner than by a path. Somebody may put other directories in their place,
// so nobody keeps them open for long.
type Files struct {
	r          *Replacer
	dir, spare int
}

// Open opens the directories. Close must follow.
func (r *Replacer) Open() (*Files, error) {
	dir, err := openDir(r.Dir)
	if errors.Is(err, fs.ErrNotExist) { // somebody has removed it, with the files in it
		if err = os.Mkdir(r.Dir, 0o750); err == nil {
			dir, err = openDir(r.Dir)
		}
	}
	if err != nil {
		return nil, err
	}
	spare, err := openDir(r.spares())
	if errors.Is(err, fs.ErrNotExist) { // the first time, or somebody has tidied up
		if err = r.makeSpares(); err == nil {
			spare, err = openDir(r.spares())
		}
	}
	if err != nil {
		return nil, errors.Join(err, unix.Close(dir))
	}
	return &Files{r: r, dir: dir, spare: spare}, nil
}

func openDir(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

// Close closes the directories.
func (f *Files) Close() error { return errors.Join(unix.Close(f.dir), unix.Close(f.spare)) }

// exchange is a variable for the test of file systems that cannot.
var exchange = func(spare int, name string, dir int) error {
	return unix.Renameat2(spare, name, dir, name, unix.RENAME_EXCHANGE)
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

// Replace gives the file called name the contents data. A directory in its place is set
// aside, at the next time. One goroutine at a time calls it for a name.
func (f *Files) Replace(name string, data []byte) error {
	if err := f.fill(name, data); err != nil {
		return fmt.Errorf("writing %s/%s: %w", f.r.own, name, err)
	}
	err := exchange(f.spare, name, f.dir)
	if err == nil {
		return nil
	}
	first := errors.Is(err, fs.ErrNotExist) // else the file system cannot, and a spare is made each time
	err = unix.Renameat(f.spare, name, f.dir, name)
	if errors.Is(err, unix.EISDIR) {
		if _, err = SetAside(f.r.Dir + "/" + name); err == nil {
			err = unix.Renameat(f.spare, name, f.dir, name)
		}
	}
	if err != nil {
		return fmt.Errorf("renaming %s/%s to %s: %w", f.r.own, name, f.r.Dir, err)
	}
	if first {
		// The next spare, which costs less while the file's own inode is at hand. Where it
		// cannot be made, the next Replace says so.
		if fd, err := unix.Openat(f.spare, name, fillFlags|unix.O_EXCL, uint32(f.r.Perm.Perm())); err == nil {
			_ = unix.Close(fd)
		}
	}
	return nil
}

// Remove removes the file called name, if there is one.
func (f *Files) Remove(name string) error {
	var errs []error
	for _, dir := range []string{f.r.own, f.r.Dir} {
		if err := os.Remove(dir + "/" + name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

const fillFlags = unix.O_WRONLY | unix.O_CREAT | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC

// fill makes the spare called name a file that holds data: the one that is there, if
// that harms nobody.
func (f *Files) fill(name string, data []byte) error {
	for created := 0; ; created = unix.O_EXCL {
		// Straight system calls: an os.File takes six more, to see whether one could wait
		// for it.
		fd, err := unix.Openat(f.spare, name, fillFlags|created, uint32(f.r.Perm.Perm()))
		switch {
		case err == nil && (created != 0 || reusable(fd, len(data))):
			return writeAndClose(fd, data)
		case err == nil:
			_ = unix.Close(fd)
		case created != 0:
			return err
		}
		if err := unix.Unlinkat(f.spare, name, 0); errors.Is(err, unix.EISDIR) {
			// A directory that was in the place of the file: they have changed places.
			if _, err := setAside(f.r.own+"/"+name, f.r.Dir+"/"+name); err != nil {
				return err
			}
		}
	}
}

// reusable tells whether the open file may be written over by size bytes: it is as
// long, so that a power cut leaves no half of one, or empty, as a new one is; it has no
// other name, as a snapshot made of hard links gives it; and nobody has it open, who read
// it under its other name when it was the newest. A lease is granted only then
// (F_SETLEASE, fcntl(2)).
func reusable(fd, size int) bool {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1 || st.Size != int64(size) && st.Size != 0 {
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
