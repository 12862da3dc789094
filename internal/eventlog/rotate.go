package eventlog

import (
	"errors"
	"time"
)

// preallocStep is how far ahead of the data blocks are reserved: far enough to be rare,
// small enough for a small disk.
const preallocStep = 4 << 20

// reserve keeps blocks reserved ahead of the data, for a round of the journal: it ends
// where they end, by a sync. It is no fault where the file system cannot or the disk is
// nearly full: the write itself will tell.
func (l *Log) reserve() {
	c := &l.c
	end := c.size + int64(len(c.chunk.data))
	most := max(l.opts.SegmentSize, end)
	if c.reserved < 0 || min(end+int64(c.journal.room.size), most) <= c.reserved {
		return
	}
	n := min(max(preallocStep, end-c.reserved), most-c.reserved)
	if err := c.file.Preallocate(c.reserved, n); err != nil {
		if end > c.reserved || !isFull(err) {
			c.reserved = -1
		}
		return
	}
	c.reserved += n
}

// rotate seals the newest segment and begins the next. What is in it is synced
// first, so that only the newest segment ever has an unfinished tail.
func (l *Log) rotate() error {
	c := &l.c
	if err := l.sync(); err != nil {
		return err
	}
	if err := c.closeFile(); err != nil {
		return err
	}
	return l.openNext()
}

// openNext begins the segment of the next record.
func (l *Log) openNext() error {
	c := &l.c
	if c.journal.file == nil || c.journal.taken {
		if err := c.journal.renew(); err != nil {
			return err
		}
	}
	f, err := l.stream.create(c.next)
	if err != nil {
		return err
	}
	// Without this a crash could lose the name, and with it every record that
	// is synced into the file.
	if err := l.stream.syncDir(); err != nil {
		return errors.Join(err, f.Close())
	}
	c.file, c.first, c.size, c.reserved, c.backed, c.begun = f, c.next, 0, 0, 0, 0
	l.tidy(true)
	return nil
}

// closeFile cuts the newest segment back to what is committed, which also
// frees the reserved blocks, and closes it.
func (c *committer) closeFile() error {
	if c.file == nil {
		return nil
	}
	f := c.file
	c.file = nil
	return errors.Join(f.Truncate(c.size), f.Close())
}

// sync makes everything committed durable in the segment.
func (l *Log) sync() error {
	committed := l.committed.Load()
	if l.c.file == nil || l.durable.Load() == committed && !l.c.journal.ahead {
		return nil
	}
	if err := l.c.syncSegment(); err != nil {
		return mayBeLost(l.durable.Load(), committed, err)
	}
	l.durable.Store(committed)
	return nil
}

// syncLazily is sync for a log that acknowledges first. What it could not sync
// has been acknowledged already: all that is left is to say so.
func (l *Log) syncLazily() {
	l.c.chunk = nil
	if err := l.sync(); err != nil {
		_ = l.fail(err)
	}
}

// expire is tidy without waiting.
func (l *Log) expire() { l.tidy(false) }

// tidy applies the retention; records that the VMs' streams do not have durably yet stay.
// Where segments cannot be given back as fast as they are removed, others stay until they
// have been, but for one if it may wait: whoever begins segments faster than that is to,
// or nothing would bound what there is.
func (l *Log) tidy(wait bool) {
	r := retention{size: l.opts.Retention, age: l.opts.MaxAge, before: l.c.next}
	if l.perVM != nil {
		r.before = l.perVM.saved.Load() + 1
	}
	held, busy, err := l.stream.expire(r, time.Now(), wait)
	if l.c.held = held; held {
		l.perVM.hurry()
	}
	if released := l.released.Load(); released > 0 && err == nil {
		var more bool
		_, more, err = l.stream.expire(retention{size: 1, before: released + 1}, time.Now(), wait)
		busy = busy || more
	}
	l.c.unfreed = busy
	l.note(err)
}

// maxFreeing is how many removed segments may wait to be given back: descriptors, and
// more than are removed where it is a rotation's turn.
const maxFreeing = 16

// free gives the blocks of removed segments back, until the log ends.
func (l *Log) free() {
	defer close(l.freed)
	for f := range l.stream.freeing {
		_ = f.Close()
		l.lookAround() // if there are more than had room
	}
}

// note tells of what went wrong without anything being refused; nil: nothing did.
func (l *Log) note(err error) {
	if err != nil && l.opts.OnError != nil {
		l.opts.OnError(err)
	}
}

// lookAround makes the committer expire what may go now.
func (l *Log) lookAround() {
	select {
	case l.around <- struct{}{}:
	default:
	}
}
