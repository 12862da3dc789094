package eventlog

import (
	"bytes"
	"errors"
	"time"
)

const (
	// maxGroup bounds the bytes of one write, and with them the time that the
	// first publisher of a group waits for the last.
	maxGroup = 4 << 20
	// maxBatch is more than the lines of a batch take, which is no more than a session
	// reads at once. A larger one makes the write longer.
	maxBatch = 256 << 10

	// expireInterval is how often, at least, a log that does not grow looks for records
	// grown too old.
	expireInterval = 10 * time.Minute
)

// committer is what only who commits touches, that is, has [Log.turn].
type committer struct {
	file      File   // the newest segment; nil after a failed write
	first     uint64 // its first number
	size      int64  // its bytes that are committed
	reserved  int64  // its bytes that blocks are reserved for; -1: the file system cannot
	backed    int64  // reserved as it was when the segment was synced last
	begun     int64  // its bytes that the disk has begun to write
	journal   journal
	next      uint64    // the number of the next record
	looked    time.Time // when file was last seen to be there
	failures  int       // writes failed since the last one that succeeded
	lastError error     // of the newest failed write
	held      bool      // a segment is kept only because the VMs' streams are behind
	unfreed   bool      // one is kept only until the blocks of others are given back
	torn      *Cut      // an unfinished tail that there was no room to keep aside; nil: none
	led       bool      // it is a publisher who commits

	group  []*Batch
	chunk  *chunk   // being filled
	newest *Entry   // of the newest line in chunk
	inside []*Entry // entries whose record, or whose first record, is in chunk
	fresh  []*chunk // committed, and still to be told of; each held

	syncTimer, retryTimer, expireTimer *time.Timer
}

// run is the committer: it writes what publishers have not written themselves, and
// does all else there is to do with the log's files.
func (l *Log) run() {
	defer close(l.done)
	c := &l.c
	c.expireTimer.Reset(0)
	for {
		select {
		case b := <-l.queue:
			l.commitQueued(b)
		case <-l.around:
			l.round(func() {
				if c.held || c.unfreed || l.released.Load() > 0 {
					l.expire()
				}
			})
		case <-c.syncTimer.C:
			l.round(l.syncLazily)
		case <-c.retryTimer.C:
			l.round(l.retry)
		case <-c.expireTimer.C:
			l.round(l.expire)
			c.expireTimer.Reset(expireEvery(l.opts.MaxAge))
		case <-l.quit:
			for {
				select {
				case b := <-l.queue:
					l.commitQueued(b)
					continue
				default:
				}
				l.turn <- struct{}{} // for good
				l.closeErr = l.shut()
				return
			}
		}
	}
}

// round is one piece of the committer's work, seen to end in time.
func (l *Log) round(work func()) {
	l.turn <- struct{}{}
	l.beginWrite(nil)
	work()
	l.endWrite()
	<-l.turn
}

// commitQueued commits b, which was taken from the queue.
func (l *Log) commitQueued(b *Batch) {
	l.round(func() {
		l.queued.Add(-1)
		l.commit(b)
	})
}

func stoppedTimer() *time.Timer {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return t
}

// commit commits b and whatever else is queued, and releases the publishers.
func (l *Log) commit(b *Batch) {
	c := &l.c
	c.group = append(c.group[:0], b)
	size, entries := b.size(), len(b.Entries)
drain:
	for size <= maxGroup-maxBatch {
		select {
		case b := <-l.queue:
			l.queued.Add(-1)
			c.group = append(c.group, b)
			size += b.size()
			entries += len(b.Entries)
		default:
			break drain
		}
	}
	now := time.Now()
	when := now.UTC().Format(timeLayout)
	err := l.writable()
	l.begin(size, entries)
	for _, b := range c.group {
		for i := range b.Entries {
			e := &b.Entries[i]
			e.Seq, e.Duplicate, e.Err = 0, false, nil
			if err == nil {
				err = l.add(b, e, when, now)
			}
			if err != nil {
				e.Err = err
			}
		}
	}
	if err == nil {
		_ = l.flush(now) // the entries hold the error
	}
	c.chunk.release() // what was refused, or nothing
	c.chunk, c.newest = nil, nil
	for i, b := range c.group {
		if len(b.tables) > 0 {
			l.perVM.ids.release(b)
		}
		b.done <- struct{}{}
		c.group[i] = nil // not to keep a publisher's buffers alive
	}
	l.tell()
}

// tell makes what was committed known. Whoever it wakes last is run first once the
// committer waits again, on the processor that it leaves: a subscriber is not to
// wait for the acks, nor either of them for the copies to the VMs' streams.
func (l *Log) tell() {
	c := &l.c
	if len(c.fresh) == 0 {
		return
	}
	if l.perVM != nil {
		l.perVM.notify()
	}
	for i, chunk := range c.fresh {
		if l.opts.OnCommit != nil {
			l.opts.OnCommit(Commit{chunk, c.led})
		}
		chunk.release()
		c.fresh[i] = nil // the array outlives the slice
	}
	c.fresh = c.fresh[:0]
}

// size is an upper bound of what the batch's lines take.
func (b *Batch) size() int {
	n := 0
	for i := range b.Entries {
		e := &b.Entries[i]
		// An id's byte takes up to six when escaped.
		n += recordOverhead + len(e.VM) + len(e.Topic) + 6*len(e.ID) + len(e.Reply) + len(e.Payload)
	}
	return n
}

// begin starts a chunk with room for size bytes and so many entries.
func (l *Log) begin(size, entries int) {
	c := &l.c
	c.chunk.release() // one whose first line belongs to another segment
	room := l.recent.slabs.get(min(size, maxGroup))
	c.chunk = &chunk{first: c.next, data: room.mem, slab: room, offsets: make([]uint32, 0, entries)}
	c.inside, c.newest = c.inside[:0], nil
}

// add appends e's line to the chunk, flushing it first where the line belongs
// to another segment. An error refuses e and the whole chunk.
func (l *Log) add(b *Batch, e *Entry, when string, now time.Time) error {
	c := &l.c
	if l.perVM != nil && len(e.ID) > 0 {
		seq, err := l.perVM.ids.lookup(b, e)
		if err != nil {
			e.Err = &WriteError{Err: err}
			return nil //nolint:nilerr // it is this VM's alone: the log itself is well
		}
		if seq != 0 {
			e.Seq, e.Duplicate = seq, true
			c.inside = append(c.inside, e)
			return nil
		}
	}
	start := len(c.chunk.data)
	c.chunk.data = appendRecord(c.chunk.data, e, c.next, l.mark(), when)
	line := len(c.chunk.data) - start
	if full := c.size+int64(start) > 0 && c.size+int64(start+line) > l.opts.SegmentSize; full || start > maxGroup {
		c.chunk.data = c.chunk.data[:start]
		if err := l.flush(now); err != nil {
			return err
		}
		if full {
			if err := l.rotate(); err != nil {
				return l.fail(err)
			}
		}
		l.begin(int(min(maxGroup/4, l.opts.SegmentSize)), len(b.Entries))
		start = 0
		c.chunk.data = appendRecord(c.chunk.data, e, c.next, l.mark(), when)
	}
	if was := c.newest; was == nil || was.VM != e.VM || !bytes.Equal(was.Topic, e.Topic) {
		c.chunk.runs = append(c.chunk.runs, uint32(len(c.chunk.offsets)))
	}
	c.newest = e
	c.chunk.offsets = append(c.chunk.offsets, uint32(start))
	c.inside = append(c.inside, e)
	e.Seq = c.next
	if l.perVM != nil && len(e.ID) > 0 {
		c.chunk.ids = append(c.chunk.ids, l.perVM.ids.add(c.next))
	}
	c.next++
	return nil
}

// mark gives the durable mark for the next record: each chunk's first has one.
func (l *Log) mark() uint64 {
	if len(l.c.chunk.offsets) > 0 {
		return 0
	}
	return l.durable.Load()
}

// flush writes the chunk, syncs it and shows it to the readers. An error
// refuses every entry in it.
func (l *Log) flush(now time.Time) error {
	c := &l.c
	if len(c.chunk.offsets) == 0 {
		return nil
	}
	err := l.look(now)
	if err == nil {
		l.reserve()
		_, err = c.file.WriteAt(c.chunk.data, c.size)
	}
	if err == nil && l.opts.SyncEvery == 0 {
		err = c.syncChunk()
	}
	if err != nil {
		return l.fail(err)
	}
	c.size += int64(len(c.chunk.data))
	l.stream.grown(c.size, now)
	l.recent.add(c.chunk)
	last := c.chunk.last()
	switch {
	case l.opts.SyncEvery == 0:
		l.durable.Store(last)
	case l.opts.SyncEvery > 0 && l.durable.Load() == c.chunk.first-1:
		c.syncTimer.Reset(l.opts.SyncEvery)
	}
	l.committed.Store(last)
	if l.perVM != nil {
		l.perVM.ids.commit()
	}
	l.healthy()
	c.fresh = append(c.fresh, c.chunk.hold())
	c.chunk, c.inside = nil, c.inside[:0] // a later failure must not touch what is committed
	return nil
}

// shut ends the log in good order.
func (l *Log) shut() error {
	l.stall.Stop()
	if l.perVM != nil {
		l.perVM.stop()
	}
	err := l.finish()
	if l.stream.freeing != nil {
		close(l.stream.freeing)
		<-l.freed
	}
	return err
}

// finish is shut without ending goroutines.
func (l *Log) finish() error {
	err := errors.Join(l.sync(), l.mend())
	if l.perVM != nil {
		err = errors.Join(err, l.perVM.finish())
	}
	return errors.Join(err, l.c.closeFile(), l.c.journal.end())
}
