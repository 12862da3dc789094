package eventlog

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
)

// Recovery tells what Open found.
type Recovery struct {
	Last uint64 // the newest record; 0: none
	// Cut is the unfinished tail that a crash left, nil if there was none, or no
	// room to keep it: then Options.OnCut tells of it.
	Cut *Cut
	// Damaged are the places in the newest segment where a record that was
	// known durable cannot be read. They stay, and are served as gaps.
	Damaged []Damage
	// Journal says why the journal could not be used as it was found. If the power has
	// failed, records that were acknowledged last may be missing then.
	Journal error
}

// Cut is a tail that was cut off: bytes behind the last whole record that were
// never acknowledged as durable.
type Cut struct {
	Damage        // where it was cut
	Bytes  int64  // how many
	Aside  string // the file that keeps them
}

// recover lists the segments and makes the newest one ready to be appended to.
// Only that one is read, so the time it takes does not grow with the log. Up to known
// all was durable.
func (l *Log) recover(known uint64) (*Recovery, error) {
	if err := l.stream.load(); err != nil {
		return nil, err
	}
	rec := &Recovery{}
	found, err := l.c.journal.open()
	rec.Journal = err
	segs := l.stream.snapshot()
	if len(segs) == 0 {
		l.c.next = 1
		err := l.c.journal.renew()
		if err == nil {
			err = l.openNext()
		}
		if isFull(err) {
			_ = l.fail(err)
			return rec, nil
		}
		return rec, err
	}
	seg := segs[len(segs)-1]
	path := l.stream.path(seg.first)
	f, err := l.opts.FS.OpenFile(path, os.O_RDWR, filePerm)
	if err != nil {
		return nil, err
	}
	sure, err := l.redo(f, &seg, found, rec)
	var t tail
	if err == nil {
		t, err = scanTail(f, seg.size, seg.first, known)
	}
	var late error // what has to be done before a record is taken
	if err == nil {
		for _, off := range t.damaged {
			rec.Damaged = append(rec.Damaged, Damage{File: path, Offset: off})
		}
		if t.end < seg.size {
			c := &Cut{Damage: Damage{File: path, Offset: t.end}, Bytes: seg.size - t.end}
			switch err = l.cut(f, c); {
			case err == nil:
				rec.Cut = c
			case isFull(err): // then it stays where it is, and nobody reads beyond t.end
				l.c.torn, late, err = c, err, nil
			}
		}
	}
	// What a killed daemon wrote but had not synced is read back as if it were on
	// disk; it must be before anybody is told of it. It is written again, because
	// its sync may have failed: then no other writes it (see File.Sync).
	if err == nil {
		err = rewrite(f, min(t.sure, sure), t.end)
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("recovering %s: %w", path, err), f.Close())
	}
	// Nor may its name get lost, if it was killed between making and syncing it.
	if err := l.stream.syncDir(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	// From here on the segment may get other bytes than the old journal has for it.
	late = errors.Join(late, l.c.journal.renew())
	l.stream.grown(t.end, seg.modified)
	l.c.next = t.last + 1
	l.committed.Store(t.last)
	l.durable.Store(t.last)
	rec.Last = t.last
	l.c.first, l.c.size = seg.first, t.end
	if late != nil {
		_ = l.fail(late)
		return rec, f.Close()
	}
	if t.sealed {
		switch err := errors.Join(f.Close(), l.openNext()); {
		case isFull(err):
			_ = l.fail(err)
		case err != nil:
			return nil, err
		}
		return rec, nil
	}
	l.c.file, l.c.reserved, l.c.begun = f, t.end, t.end
	return rec, nil
}

// settle does what the start could not, most likely for want of room. Nothing is taken
// in before: the next segment may have the name of the one whose tail is still in it,
// and while the files of ids are not whole a retry would be stored twice.
func (l *Log) settle() error {
	if err := l.mend(); err != nil {
		return err
	}
	if torn := l.c.torn; torn != nil {
		f, err := l.opts.FS.OpenFile(torn.File, os.O_RDWR, filePerm)
		if err != nil {
			return err
		}
		if err := errors.Join(l.cut(f, torn), f.Close()); err != nil {
			return err
		}
		l.c.torn = nil
		if l.opts.OnCut != nil {
			l.opts.OnCut(*torn)
		}
	}
	if l.perVM != nil {
		return l.perVM.late()
	}
	return nil
}

// minLine is less than any record takes, in bytes.
const minLine = 64

// tail is what scanTail found.
type tail struct {
	last    uint64  // the newest record to keep
	end     int64   // where it ends
	sure    int64   // a mark says that what is before this is durable
	damaged []int64 // offsets of lines before it that are no records
	sealed  bool    // the end is damaged, and nothing may be appended to it
}

// scanTail reads the newest segment, whose first number is first, from its
// beginning. A line that is no record is damage if a later record's mark says
// that the missing number was durable, or it is at most known, up to which all was;
// otherwise it begins the unfinished tail, with all that is behind it.
func scanTail(f File, size int64, first, known uint64) (tail, error) {
	t := tail{last: first - 1}
	// The first place in doubt, and what to go back to if no mark clears it.
	doubt := struct {
		at   int64 // -1: none
		back tail
	}{at: -1}
	suspect := func(off int64) {
		if doubt.at < 0 {
			doubt.at, doubt.back = off, t
		}
	}
	err := eachLine(f, 0, size, func(off int64, line []byte, whole bool) {
		var rec Record
		if !whole || parseRecord(line, &rec, true) != nil || rec.Seq <= t.last {
			suspect(off)
			return
		}
		if rec.Seq > t.last+1 {
			suspect(off)
		}
		if doubt.at >= 0 && rec.Synced > doubt.back.last {
			t.damaged = append(t.damaged, doubt.at)
			doubt.at = -1
		}
		if rec.Synced == rec.Seq-1 {
			t.sure = off
		}
		t.last, t.end = rec.Seq, off+int64(len(line))+1
	})
	switch {
	case doubt.at < 0:
	case doubt.back.last < known && known-doubt.back.last <= uint64(size-doubt.at)/minLine+1:
		// No number is given twice. But what is known may be of another log than this, which
		// was restored, or be wrong itself: then it is more than can have stood here.
		t.damaged = append(t.damaged, doubt.at)
		t.last, t.end, t.sealed = max(t.last, known), size, true
	default:
		t = doubt.back
	}
	return t, err
}

// eachLine calls fn for every line from the offset from, where one begins, to
// size, without its newline; whole is false for a last line that has none, and
// for a piece of one longer than any record.
func eachLine(f File, from, size int64, fn func(off int64, line []byte, whole bool)) error {
	c := &cursor{st: &stream{}, f: f, off: from, limit: size, until: ^uint64(0)}
	c.buf = buffers.Get().(*[]byte)
	defer buffers.Put(c.buf)
	for {
		c.damaged = false
		line, err := c.line()
		if c.damaged {
			fn(c.damagedAt.Offset, nil, false)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		fn(c.off-int64(c.end-c.begin)-int64(len(line))-1, line, true)
	}
}

// cut moves the bytes of a tail into a file beside the segment f and makes both
// durable, in this order, so that a crash in between loses nothing.
func (l *Log) cut(f File, c *Cut) error {
	aside, name, err := l.createAside(c.File)
	if err != nil {
		return err
	}
	bufp := buffers.Get().(*[]byte)
	defer buffers.Put(bufp)
	for off := int64(0); off < c.Bytes && err == nil; {
		var n int
		n, err = f.ReadAt((*bufp)[:min(int64(len(*bufp)), c.Bytes-off)], c.Offset+off)
		if n > 0 {
			_, err = aside.WriteAt((*bufp)[:n], off)
			off += int64(n)
		}
	}
	if err == nil {
		err = aside.Sync()
	}
	if err = errors.Join(err, aside.Close()); err == nil {
		err = l.opts.FS.SyncDir(l.opts.Dir)
	}
	if err == nil {
		err = f.Truncate(c.Offset)
	}
	if err == nil {
		// The next start may write again what the journal has, if this one ends before that is new.
		_ = f.Preallocate(c.Offset, c.Bytes)
	}
	if err != nil {
		// The segment has it all yet, and the next attempt makes another.
		return errors.Join(fmt.Errorf("keeping the unfinished tail in %s: %w", name, err), l.opts.FS.Remove(name))
	}
	c.Aside = name
	return nil
}

// rewrite writes the file's bytes from one offset to another over themselves.
func rewrite(f File, from, to int64) error {
	bufp := buffers.Get().(*[]byte)
	defer buffers.Put(bufp)
	for from < to {
		n, err := f.ReadAt((*bufp)[:min(int64(len(*bufp)), to-from)], from)
		if n == 0 {
			return err
		}
		if _, err := f.WriteAt((*bufp)[:n], from); err != nil {
			return err
		}
		from += int64(n)
	}
	return nil
}

func (l *Log) createAside(path string) (File, string, error) {
	for i := 1; ; i++ {
		name := fmt.Sprintf("%s.cut-%d", path, i)
		f, err := l.opts.FS.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, filePerm)
		if !errors.Is(err, fs.ErrExist) {
			return f, name, err
		}
	}
}
