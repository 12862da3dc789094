package eventlog

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"
)

// bootFile has the name of this run of the kernel.
const bootFile = "/proc/sys/kernel/random/boot_id"

// bootName gives the boot's name as the journal has it, "" if there is none.
func bootName(name string) string {
	if name == "" {
		b, err := os.ReadFile(bootFile)
		if err != nil {
			return ""
		}
		name = string(b)
	}
	name = strings.ToLower(strings.ReplaceAll(strings.TrimSpace(name), "-", ""))
	if len(name) != bootDigits || strings.Trim(name, "0123456789abcdef") != "" || name == noBoot {
		return ""
	}
	return name
}

// syncChunk makes the chunk durable, which has been written to the segment: by the
// journal where it takes it, or else with all that the segment has.
func (c *committer) syncChunk() error {
	// Beyond what is reserved durably, a full disk might have no room for it when it
	// has to be written again after a power cut.
	if !c.journal.takes(len(c.chunk.data)) || c.size+int64(len(c.chunk.data)) > c.backed {
		return c.syncSegment()
	}
	// The clock's time, which is not behind the file's ctime: where that is asked for, the
	// next write has to change it, and each sync takes as long as that of an append.
	if err := c.journal.add(c.first, c.size, time.Now().UnixNano(), c.chunk.data); err != nil {
		return err
	}
	c.writeBehind()
	return nil
}

// writeBehind has the disk write the segment while the journal takes what comes next: the
// sync that ends the round would have to wait for all of it.
func (c *committer) writeBehind() {
	const step, page = 256 << 10, 4 << 10
	// The last page is not full yet, and would have to be written once more.
	if end := (c.size + int64(len(c.chunk.data))) / page * page; end-c.begun >= step {
		c.file.WriteBack(c.begun, end-c.begun)
		c.begun = end
	}
}

// syncSegment makes durable what is in the segment, whatever the journal has of it, and
// the journal begins anew.
func (c *committer) syncSegment() error {
	j := &c.journal
	var err error
	if j.ahead { // should castrad be killed in a sync that fails, no start may trust the kernel
		err = j.mark(noBoot)
	}
	if err == nil {
		err = c.file.Sync()
	}
	if err != nil {
		if j.ahead { // what castrad does to the segment now must not look like somebody else's
			_ = j.file.Sync()
		}
		j.lost = j.lost || j.ahead
		j.stale = j.stale || j.lost
		return err
	}
	if j.ahead {
		_ = j.mark(j.boot) // with the other one a start writes more than it must
	}
	j.begin()
	c.backed = c.reserved
	return nil
}

// redo writes what the journal has, found, to the newest segment, f, and corrects its
// size. What that has from sure on may not have been synced there.
func (l *Log) redo(f File, seg *segment, found journaled, rec *Recovery) (sure int64, err error) {
	if found.segment != seg.first || len(found.data) == 0 { // a segment is synced before the next one begins
		l.missing(seg, found, rec)
		return seg.size, nil
	}
	if found.from > seg.size { // a hole would be worse than what is missing already
		rec.Journal = fmt.Errorf("the journal has what comes behind byte %d of %s, which ends at %d", found.from, l.stream.path(seg.first), seg.size)
		return seg.size, nil
	}
	changed, err := f.Changed()
	if err != nil {
		return 0, err
	}
	// Where castrad alone was killed the kernel has it all, and what somebody did to the
	// segment since stays as he left it. But the kernel may have lost it, too: a write
	// behind castrad's back failed, or the disk went away and was mounted again. Then
	// the segment is not newer than its last entry.
	if found.boot == l.c.journal.boot && changed > found.written {
		return found.from, nil
	}
	// A start that is killed behind this leaves the segment newer, and half done.
	if err := l.c.journal.mark(noBoot); err != nil {
		return 0, err
	}
	if _, err := f.WriteAt(found.data, found.from); err != nil {
		return 0, err
	}
	seg.size = max(seg.size, found.from+int64(len(found.data)))
	l.missing(seg, found, rec)
	return found.from, nil
}

// missing tells of what the journal had and can not give back: where one of its entries is
// damaged, those behind it show how far it went. What is left of earlier rounds is in the
// segment.
func (l *Log) missing(seg *segment, found journaled, rec *Recovery) {
	end := seg.size
	for _, p := range found.behind {
		if p.segment == seg.first {
			end = max(end, p.end)
		}
	}
	if end > seg.size && rec.Journal == nil {
		rec.Journal = fmt.Errorf("the journal is damaged: it went beyond byte %d of %s, up to %d at least", seg.size, l.stream.path(seg.first), end)
	}
}

// mend does after a failure what must be done before another record is taken: what was
// acknowledged is in the segment for good, and what was refused nowhere.
func (l *Log) mend() error {
	if l.c.journal.lost {
		if err := l.restore(); err != nil {
			return fmt.Errorf("writing %s again from the journal: %w", l.stream.path(l.c.first), err)
		}
	}
	return l.c.journal.void()
}

// restore writes to the segment once more what it may have through the journal alone:
// after a sync that failed, no later one writes it (see File.Sync).
func (l *Log) restore() error {
	c := &l.c
	found, err := c.journal.read(nil)
	// An entry behind the committed size was refused.
	n := c.size - found.from
	if found.segment != c.first || n < 1 || n > int64(len(found.data)) {
		if err == nil {
			err = errors.New("it does not have all of it any more")
		}
		return err
	}
	f, err := l.opts.FS.OpenFile(l.stream.path(c.first), os.O_RDWR, filePerm)
	if err != nil {
		return err
	}
	if err = c.journal.mark(noBoot); err == nil {
		_, err = f.WriteAt(found.data[:n], found.from)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	c.journal.lost, c.journal.ahead = false, false
	return nil
}
