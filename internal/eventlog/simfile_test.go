package eventlog

import (
	"io"
	"io/fs"
	"slices"
	"syscall"
	"time"
	"unsafe"
)

// simInfo is both what a directory says of a file and what Stat does.
type simInfo struct {
	name string
	n    *simNode
}

func (i simInfo) Name() string { return i.name }

func (i simInfo) IsDir() bool { return i.n.dir }

func (i simInfo) Type() fs.FileMode { return i.Mode().Type() }

func (i simInfo) Info() (fs.FileInfo, error) { return i, nil }

func (i simInfo) Size() int64 { return int64(len(i.n.data)) }

func (i simInfo) ModTime() time.Time { return i.n.modified }

func (i simInfo) Sys() any { return nil }

func (i simInfo) Mode() fs.FileMode {
	if i.n.dir {
		return fs.ModeDir | dirPerm
	}
	return filePerm
}

// simFile is an open file.
type simFile struct {
	d    *simDisk
	n    *simNode
	path string

	direct bool // opened with O_DIRECT
}

// simBlock is what the log has as its block on a simulated disk: small, so that most
// writes meet the end of one.
const simBlock = 256

// refuse is what a disk says to an unaligned use of a file opened with O_DIRECT.
func (f *simFile) refuse(b []byte, off int64) error {
	if f.direct && (off%simBlock != 0 || len(b)%simBlock != 0 || uintptr(unsafe.Pointer(unsafe.SliceData(b)))%ioBlock != 0) {
		return syscall.EINVAL
	}
	return nil
}

func (f *simFile) ReadAt(b []byte, off int64) (int, error) {
	if err := f.refuse(b, off); err != nil {
		return 0, err
	}
	if f.d.badSector != nil && f.d.badSector(f.path, off, len(b)) {
		return 0, syscall.EIO
	}
	if off >= int64(len(f.n.data)) {
		return 0, io.EOF
	}
	n := copy(b, f.n.data[off:])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (f *simFile) WriteAt(b []byte, off int64) (int, error) {
	if err := f.refuse(b, off); err != nil {
		return 0, err
	}
	err := f.d.change("write", f.path)
	if err == nil && f.d.noRoom && off+int64(len(b)) > max(f.n.reserved, int64(len(f.n.data))) {
		err = syscall.ENOSPC
	}
	if err != nil {
		b = b[:f.d.rng.IntN(len(b)+1)]
		f.n.write(b, off)
		return len(b), err
	}
	f.n.write(b, off)
	return len(b), nil
}

func (f *simFile) Truncate(size int64) error {
	if size == int64(len(f.n.data)) {
		return nil
	}
	if err := f.d.change("truncate", f.path); err != nil {
		return err
	}
	f.n.resize(size)
	return nil
}

func (f *simFile) Sync() error {
	ignored := f.d.synced()
	if err := f.d.change("sync", f.path); err != nil {
		f.d.fail(f.n)
		return err
	}
	if !ignored {
		f.n.sync()
	}
	return nil
}

func (f *simFile) WriteBack(_, _ int64) {} // any of it may survive a crash anyway

func (f *simFile) Preallocate(off, n int64) error {
	if off+n <= f.n.reserved {
		return nil
	}
	if f.d.noRoom {
		return syscall.ENOSPC
	}
	f.n.reserved = off + n
	return nil
}

func (f *simFile) Close() error { return nil }

func (f *simFile) Size() (int64, error) { return int64(len(f.n.data)), nil }

func (f *simFile) Changed() (int64, error) { return f.n.changed, nil }

func (f *simFile) Removed() (bool, error) { return false, nil } // nobody else is there

func (n *simNode) write(b []byte, off int64) {
	w := simWrite{off, append(make([]byte, 0, len(b)), b...)} // never nil
	n.data = w.apply(n.data)
	n.pending = append(n.pending, w)
	n.modified = time.Now()
	n.changed = n.modified.UnixNano()
}

func (n *simNode) resize(size int64) {
	w := simWrite{off: size}
	n.data = w.apply(n.data)
	n.pending = append(n.pending, w)
	n.modified = time.Now()
	n.changed = n.modified.UnixNano()
	n.reserved = min(n.reserved, size)
}

// grow makes b at least size long, with zeros.
func grow(b []byte, size int) []byte {
	if len(b) < size {
		old := len(b)
		b = slices.Grow(b, size-old)[:size]
		clear(b[old:])
	}
	return b
}

func (w simWrite) apply(b []byte) []byte {
	if w.data == nil {
		return grow(b, int(w.off))[:w.off]
	}
	b = grow(b, int(w.off)+len(w.data))
	copy(b[w.off:], w.data)
	return b
}
