package eventlog

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"time"
)

const (
	// retryInterval is how often a log that the disk refused tries again.
	retryInterval = time.Second

	// lookInterval is how often a log that takes records makes sure that its newest
	// segment is still there.
	lookInterval = time.Second
)

// fail refuses the chunk: none of its records is stored. The segment is cut
// back to its last committed byte and left; what the kernel made of the pages
// that it could not write is unknown, so nothing is ever appended to it again.
func (l *Log) fail(err error) error {
	c := &l.c
	we := &WriteError{Err: err, Full: isFull(err)}
	for _, e := range c.inside {
		e.Err = we
	}
	c.inside = c.inside[:0]
	if c.chunk != nil {
		c.next = c.chunk.first
	}
	if l.perVM != nil {
		l.perVM.ids.rollback()
	}
	told := State{Degraded: Cause(we), Err: we}
	err = l.abandonFile()
	if durable, committed := l.durable.Load(), l.committed.Load(); durable < committed { // acknowledged before it was synced
		if err != nil {
			told.Err = errors.Join(mayBeLost(durable, committed, err), we)
		}
		// No sync to come is of that file, and the next interval begins behind it.
		l.durable.Store(committed)
	}
	c.failures++
	c.lastError = we
	c.retryTimer.Reset(retryInterval)
	l.setState(told)
	return we
}

// look makes sure, at times, that the newest segment is still there: of one that
// somebody has removed, as people do to make room, or renamed, what is acknowledged from
// then on would be in no reader's way, and gone with the file. An error has the next
// record begin a new one.
func (l *Log) look(now time.Time) error {
	c := &l.c
	if now.Sub(c.looked) < lookInterval {
		return nil
	}
	removed, err := c.file.Removed()
	switch {
	case err != nil:
	case removed:
		c.journal.stale = true // it may be gone likewise, and what it has belongs to the segment
		err = errors.Join(errRemoved, l.stream.load())
	case c.journal.gone():
		c.journal.taken = true
	}
	if err != nil {
		return &fs.PathError{Op: "write", Path: l.stream.path(c.first), Err: err}
	}
	c.looked = now
	return nil
}

var errRemoved = errors.New("somebody has removed or renamed the file, and with it what was in it")

// abandonFile is closeFile after a failed write. What was refused must not come
// back after a crash, so the cut is synced. Where that fails too, what is left
// over is void once there is a next segment.
func (l *Log) abandonFile() error {
	c := &l.c
	f := c.file
	if f == nil {
		return nil
	}
	var err error
	// Before the cut, which gives up the room that a start might need to write again what
	// the journal has.
	if c.journal.ahead && !c.journal.lost {
		err = c.syncSegment()
	}
	_ = l.mend() // settle tries it again
	c.file = nil
	if c.journal.lost {
		if markErr := c.journal.mark(noBoot); markErr != nil { // then nor does this sync, see syncSegment
			return errors.Join(err, markErr, f.Close())
		}
	}
	err = errors.Join(err, f.Truncate(c.size))
	if c.journal.stale {
		// A start writes again what the journal has, and the cut gave up the room for it.
		_ = f.Preallocate(c.size, int64(c.journal.room.most))
	}
	return errors.Join(err, f.Sync(), f.Close())
}

func mayBeLost(durable, committed uint64, err error) error {
	if durable == committed { // the journal has them
		return err
	}
	return fmt.Errorf("records %d to %d, acknowledged before they were synced, may be lost: %w", durable+1, committed, err)
}

// writable makes sure that there is a segment to write to. After one failure
// the next batch tries a new segment; after a second one the stream stops, and
// only the timer tries again.
func (l *Log) writable() error {
	c := &l.c
	if c.file != nil {
		return nil
	}
	if c.failures > 1 {
		return c.lastError
	}
	return l.reopen()
}

func (l *Log) reopen() error {
	err := l.settle()
	if err == nil {
		err = l.openNext()
	}
	if err != nil {
		return l.fail(err)
	}
	return nil
}

// retry tries to get the log going again after a failed write, so that it
// recovers even if nobody publishes.
func (l *Log) retry() {
	c := &l.c
	if l.state.Load().Degraded == "" {
		return // a publisher has got it going, who had his turn first
	}
	if c.file == nil {
		if err := l.reopen(); err != nil {
			return
		}
	}
	// An empty file can be made on a full disk; a block cannot be reserved.
	err := c.file.Preallocate(0, 1<<16)
	if err != nil && !errors.Is(err, syscall.EOPNOTSUPP) {
		_ = l.fail(err)
		return
	}
	l.healthy()
}

// healthy notes that the disk takes writes.
func (l *Log) healthy() {
	l.c.failures = 0
	if l.state.Load().Degraded != "" {
		l.c.retryTimer.Stop()
		l.setState(State{})
	}
}

func (l *Log) setState(s State) {
	l.state.Store(&s)
	if s.Degraded != "" {
		l.fault.Store(&s)
	}
	l.stateChanged()
}
