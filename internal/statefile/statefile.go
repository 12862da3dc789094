// Package statefile reads files that a daemon keeps and that somebody may have
// edited, or put something else in the place of.
package statefile

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
)

// Flags of Read.
const (
	// NoFollow refuses a symbolic link, which may lead to what is not the daemon's.
	NoFollow = syscall.O_NOFOLLOW
)

// Read gives the contents of a regular file of at most limit bytes. It waits for
// nobody: a pipe in the file's place is an error. The error is fs.ErrNotExist where
// there is no file.
func Read(path string, limit int64, flags int) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|flags, 0)
	if errors.Is(err, syscall.ELOOP) {
		return nil, errors.New("it is a symbolic link")
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // it was opened for reading
	if st, err := f.Stat(); err != nil {
		return nil, err
	} else if !st.Mode().IsRegular() {
		return nil, errors.New("it is no regular file")
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("it is larger than %d bytes", limit)
	}
	return data, err
}

// SetAside renames what is at path, so that there is room for a file and nothing is
// lost, and gives its new name.
func SetAside(path string) (string, error) { return setAside(path, path) }

// setAside is SetAside where what was at path is at now.
func setAside(now, path string) (string, error) {
	for i := 1; ; i++ {
		name := fmt.Sprintf("%s.aside-%d", path, i)
		if _, err := os.Lstat(name); errors.Is(err, os.ErrNotExist) {
			return name, os.Rename(now, name)
		}
	}
}

// Append opens a regular file for appending, and makes it where there is none. What
// is in its place and is no file is set aside, and moved says as what.
func Append(path string, perm os.FileMode) (f *os.File, moved string, err error) {
	if st, err := os.Lstat(path); err == nil && !st.Mode().IsRegular() {
		if moved, err = SetAside(path); err != nil {
			return nil, "", err
		}
	}
	f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND|syscall.O_NOFOLLOW, perm)
	return f, moved, err
}
