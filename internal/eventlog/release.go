package eventlog

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
)

// Release removes the segments all of whose records are at or below seq, but
// never the newest. It is for a log whose one reader says when it is done with
// a record, as a guest's spool is. Whatever it could not remove is off the list
// all the same, and found again by the next Open.
func (l *Log) Release(seq uint64) error {
	s := &l.stream
	s.mu.Lock()
	// A segment is done with when the one behind it begins at or below seq+1.
	n, exact := slices.BinarySearchFunc(s.segs, seq+1, func(g segment, seq uint64) int { return cmp.Compare(g.first, seq) })
	if !exact {
		n--
	}
	n = max(0, min(n, len(s.segs)-1))
	doomed := slices.Clone(s.segs[:n])
	s.segs = s.segs[n:]
	s.mu.Unlock()
	var errs []error
	for _, g := range doomed {
		if err := s.fs.Remove(s.path(g.first)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("removing a released segment: %w", err))
		}
	}
	return errors.Join(errs...)
}

// Replace gives the small file at path the contents data, whole or not at all,
// and such that a power cut does not take it back.
func Replace(fsys FS, path string, data []byte) error {
	if err := replaceFile(fsys, path, data); err != nil {
		return err
	}
	return fsys.SyncDir(filepath.Dir(path))
}

// MakeDir makes dir and those above it that are missing, durably.
func MakeDir(fsys FS, dir string) error { return makeDir(fsys, dir) }

// LastIn gives the number of the newest record of the log in dir, which need not
// be open, 0 if it has none. It changes nothing.
func LastIn(fsys FS, dir string) (uint64, error) {
	s := &stream{fs: fsys, dir: dir}
	if err := s.load(); err != nil {
		return 0, err
	}
	return s.lastMatching(1, ^uint64(0), func(*Record) bool { return true })
}
