package broker

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/logging"
	"github.com/castrabus/castra/internal/statefile"
)

// rotated is a file of lines that is set aside when it is large.
type rotated struct {
	path string
	log  *logrus.Logger
	f    *os.File
	size int64
}

func (r *rotated) write(lines []byte) error {
	if len(lines) == 0 {
		return nil
	}
	if err := r.follow(); err != nil {
		return err
	}
	if r.f == nil {
		if err := os.Mkdir(filepath.Dir(r.path), 0o750); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		f, moved, err := statefile.Append(r.path, 0o640)
		if moved != "" {
			noteAside(r.log, r.path, moved)
		}
		if err != nil {
			return err
		}
		if r.size, err = wholeLines(f); err != nil {
			return errors.Join(err, f.Close())
		}
		r.f = f
	}
	if r.size > 0 && r.size+int64(len(lines)) > eventFileSize {
		if err := errors.Join(r.close(), r.shift()); err != nil {
			return err
		}
		return r.write(lines)
	}
	if _, err := r.f.Write(lines); err != nil {
		// A part of a line must not stay: what follows would be joined to it.
		return errors.Join(err, r.f.Truncate(r.size), r.close())
	}
	r.size += int64(len(lines))
	return nil
}

// noteAside tells the journal that what was at path is called name now.
func noteAside(log *logrus.Logger, path, name string) {
	logging.StateSetAside.On(log).WithFields(logrus.Fields{"file": path, "aside": name}).Error("castrad cannot use what is there, and has set it aside")
}

// follow closes the file if it no longer has its name: somebody removed it to make room,
// or renamed it, and what is written to it from then on is not found again.
func (r *rotated) follow() error {
	if r.f == nil {
		return nil
	}
	own, err := r.f.Stat()
	if err != nil {
		return errors.Join(err, r.close())
	}
	if st, err := os.Lstat(r.path); err != nil || !os.SameFile(st, own) {
		return r.close()
	}
	r.size = own.Size() // somebody may have emptied it
	return nil
}

// wholeLines cuts off a last line that a crash left unfinished, and gives the
// file's size then.
func wholeLines(f *os.File) (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	size := st.Size()
	tail := make([]byte, min(size, 64<<10)) // longer than any line
	if _, err := f.ReadAt(tail, size-int64(len(tail))); err != nil {
		return 0, err
	}
	whole := size - int64(len(tail)) + int64(bytes.LastIndexByte(tail, '\n')) + 1
	if whole == size {
		return size, nil
	}
	return whole, f.Truncate(whole)
}

// shift renames path to path.1 and so on; the oldest goes.
func (r *rotated) shift() error {
	for i := eventFileKeep - 1; i >= 0; i-- {
		from := r.path
		if i > 0 {
			from = fmt.Sprintf("%s.%d", r.path, i)
		}
		if err := os.Rename(from, fmt.Sprintf("%s.%d", r.path, i+1)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (r *rotated) close() error {
	if r.f == nil {
		return nil
	}
	err := r.f.Close()
	r.f = nil
	return err
}
