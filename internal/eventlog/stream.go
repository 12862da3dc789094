package eventlog

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	segmentSuffix = ".jsonl"
	seqDigits     = 20 // of the largest uint64, so that names sort in seq order

	dirPerm  = 0o750
	filePerm = 0o640
)

// segment is one file of a stream.
type segment struct {
	first    uint64    // no record in it is older; also its name
	size     int64     // bytes that may be read
	modified time.Time // wall clock of the last write, for retention by age
	sealed   time.Time // monotonic: when this process saw it sealed
}

// stream is the segments of one directory, oldest first. The last one is being
// written. Its methods may be called by anybody at any time.
type stream struct {
	fs  FS
	dir string

	mu   sync.RWMutex
	segs []segment

	// private: it is a reader's own list, of a stream that nobody was writing.
	private bool

	// unsynced: names were made or removed since the directory was last synced,
	// or may have been by a run that was killed. It is the writer's.
	unsynced bool

	// freeing takes removed segments that are still open; nil: whoever removes gives their
	// blocks back himself.
	freeing chan File
}

func segmentName(first uint64) string {
	return fmt.Sprintf("%0*d%s", seqDigits, first, segmentSuffix)
}

// segmentFirst takes a sequence number from a file's name.
func segmentFirst(name string) (uint64, bool) {
	digits, ok := strings.CutSuffix(name, segmentSuffix)
	if !ok || len(digits) != seqDigits {
		return 0, false
	}
	first, err := strconv.ParseUint(digits, 10, 64)
	return first, err == nil && first > 0
}

func (s *stream) path(first uint64) string { return filepath.Join(s.dir, segmentName(first)) }

// load lists the directory; one that does not exist is an empty stream.
func (s *stream) load() error {
	s.unsynced = true
	entries, err := s.fs.ReadDir(s.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("listing segments: %w", err)
	}
	var segs []segment
	for _, e := range entries {
		first, ok := segmentFirst(e.Name())
		if !ok || !e.Type().IsRegular() {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("listing segments: %w", err)
		}
		segs = append(segs, segment{first: first, size: info.Size(), modified: info.ModTime(), sealed: time.Now()})
	}
	slices.SortFunc(segs, func(a, b segment) int { return cmp.Compare(a.first, b.first) })
	s.mu.Lock()
	s.segs = segs
	s.mu.Unlock()
	return nil
}

// create makes the segment that begins at first; until the directory is synced
// its name may be lost, and with it what is in it. A file of that name can only
// be the remains of a write that failed before any record of it was durable; it
// is replaced, and by a rename: were it the only one and gone when the power fails,
// the log would count from 1 again.
func (s *stream) create(first uint64) (File, error) {
	name := s.path(first)
	f, err := s.fs.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, filePerm)
	if errors.Is(err, fs.ErrExist) {
		if err = replaceFile(s.fs, name, nil); err == nil {
			f, err = s.fs.OpenFile(name, os.O_RDWR, filePerm)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("creating segment: %w", err)
	}
	s.unsynced = true
	s.drop(first)
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.segs); n > 0 {
		s.segs[n-1].sealed = time.Now()
	}
	s.segs = append(s.segs, segment{first: first, modified: time.Now()})
	return f, nil
}

// drop takes the newest segment off the list if it is the one that begins at first.
func (s *stream) drop(first uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.segs); n > 0 && s.segs[n-1].first == first {
		s.segs = s.segs[:n-1]
	}
}

// syncDir makes the segments' names, and the lack of those removed, durable.
func (s *stream) syncDir() error {
	if !s.unsynced {
		return nil
	}
	if err := s.fs.SyncDir(s.dir); err != nil {
		return fmt.Errorf("making the names in %s durable: %w", s.dir, err)
	}
	s.unsynced = false
	return nil
}

// cutNewest removes the segments that hold nothing but records beyond upTo.
func (s *stream) cutNewest(upTo uint64) (cut bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for n := len(s.segs); n > 0 && s.segs[n-1].first > upTo; n = len(s.segs) {
		if err := s.fs.Remove(s.path(s.segs[n-1].first)); err != nil {
			return cut, fmt.Errorf("cutting the stream back: %w", err)
		}
		s.segs, cut = s.segs[:n-1], true
	}
	return cut, nil
}

// grown records that the newest segment may be read up to size.
func (s *stream) grown(size int64, now time.Time) {
	s.mu.Lock()
	last := &s.segs[len(s.segs)-1]
	last.size, last.modified = size, now
	s.mu.Unlock()
}

// find gives the segment that holds seq, or would: the last that begins at or
// before it, else the oldest. next is the first number of the one behind it, 0
// if it is the newest.
func (s *stream) find(seq uint64) (seg segment, next uint64, ok bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	i, exact := slices.BinarySearchFunc(s.segs, seq, func(g segment, seq uint64) int { return cmp.Compare(g.first, seq) })
	if !exact && i > 0 {
		i--
	}
	if i >= len(s.segs) {
		return segment{}, 0, false
	}
	if i+1 < len(s.segs) {
		next = s.segs[i+1].first
	}
	return s.segs[i], next, true
}

// snapshot copies the list.
func (s *stream) snapshot() []segment {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.Clone(s.segs)
}

// oldest gives the first number of the oldest segment; 0: there is none.
func (s *stream) oldest() uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if len(s.segs) == 0 {
		return 0
	}
	return s.segs[0].first
}

// expiredBefore tells whether the segment that begins with first has expired.
func (s *stream) expiredBefore(first uint64) bool {
	if s.private {
		_ = s.load() // the list stays as it was, and the caller tells of the file
	}
	oldest := s.oldest()
	return oldest == 0 || oldest > first // 0: all of it was forgotten
}

// lacks tells whether somebody has removed the segment that begins with first, and one
// behind it is still there: with the newest the whole directory may have gone, be it that
// its file system is not mounted just now.
func (s *stream) lacks(first uint64) bool {
	segs := s.snapshot()
	if len(segs) == 0 || segs[len(segs)-1].first == first {
		return false
	}
	f, err := s.fs.OpenFile(s.path(segs[len(segs)-1].first), os.O_RDONLY, 0)
	return err == nil && f.Close() == nil
}

// retention says which segments may go.
type retention struct {
	size int64         // bytes that a stream may hold; 0: any
	age  time.Duration // how long a record is kept; 0: for ever
	// before protects segments that hold records from this number on.
	before uint64
	// oversize is called for each segment that went because of size, if it is not nil.
	oversize func()
}

// minSealed is how long this process must have seen a segment sealed, if it may not grow
// that old anyway, before its age counts: a clock that jumps must not expire fresh records.
const minSealed = time.Hour

// expireEvery is how often records of at most that age are looked for; 0: of any.
func expireEvery(age time.Duration) time.Duration {
	if age == 0 {
		return expireInterval
	}
	return min(expireInterval, max(time.Second, age/4))
}

// expire removes whole segments, oldest first, never the newest, until the
// stream is within r. It stops at the first that cannot be removed: a newer one
// must not go before it, or the stream would have a hole. held tells whether
// r.before kept one that should have gone, busy whether there may be more than can be
// given back just now. With wait it waits until one can.
func (s *stream) expire(r retention, now time.Time, wait bool) (held, busy bool, err error) {
	for ; ; wait = false {
		if !wait && s.freeing != nil && len(s.freeing) == cap(s.freeing) {
			return false, true, nil
		}
		doomed, tooBig, held := s.doomed(r, now)
		if doomed.first == 0 {
			return held, false, nil
		}
		if err := s.remove(doomed); err != nil {
			return false, false, err
		}
		if tooBig && r.oversize != nil {
			r.oversize()
		}
	}
}

// remove removes the file of a segment that was the first on the list, to which it
// comes back if that fails.
func (s *stream) remove(doomed segment) error {
	// Should a power cut undo the last removal and not this one, that would be a
	// hole too.
	err := s.syncDir()
	if err == nil {
		err = s.unlink(s.path(doomed.first))
		s.unsynced = true
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.mu.Lock()
		s.segs = slices.Insert(s.segs, 0, doomed)
		s.mu.Unlock()
		return fmt.Errorf("expiring segment: %w", err)
	}
	return nil
}

// unlink removes the file at path. That gives its blocks back, which takes 15 to 30 ms
// for 64 MiB where the file system discards them (ext4(5), "discard"), unless somebody
// has it open: then whoever closes it last does (unlink(2)), and no ack waits for it.
func (s *stream) unlink(path string) error {
	var held File
	if s.freeing != nil {
		held, _ = s.fs.OpenFile(path, os.O_RDONLY, 0) // else it takes its time
	}
	err := s.fs.Remove(path)
	switch {
	case held == nil:
	case err != nil:
		_ = held.Close() // nothing is given back
	default:
		s.freeing <- held // who receives it waits for nobody
	}
	return err
}

// newestIn is [Log.NewestIn].
func (s *stream) newestIn(bytes int64) uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	first := uint64(1)
	for i := len(s.segs) - 1; i >= 0; i-- {
		if bytes -= s.segs[i].size; bytes < 0 && i < len(s.segs)-1 {
			break
		}
		first = s.segs[i].first
	}
	return first
}

// doomed takes the oldest segment off the list if r says that it is to go, so
// that no reader begins with it any more.
func (s *stream) doomed(r retention, now time.Time) (g segment, tooBig, held bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.segs) < 2 {
		return g, false, false
	}
	var total int64
	for _, g := range s.segs {
		total += g.size
	}
	tooBig = r.size > 0 && total > r.size
	tooOld := r.age > 0 && now.Sub(s.segs[0].modified) > r.age && time.Since(s.segs[0].sealed) >= min(minSealed, r.age)
	if !tooBig && !tooOld {
		return g, false, false
	}
	if s.segs[1].first > r.before {
		return g, false, true
	}
	g = s.segs[0]
	s.segs = s.segs[1:]
	return g, tooBig, false
}
