package eventlog

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// Gap is the error of [Reader.Next] where records are lost to this reader:
// expired or damaged before it came to them. Reading goes on behind them.
type Gap struct{ From, To uint64 }

func (g *Gap) Error() string { return fmt.Sprintf("records %d to %d are gone", g.From, g.To) }

// Reader reads committed records in order of seq. It belongs to one goroutine
// at a time. While it is caught up it holds neither a buffer nor a descriptor.
type Reader struct {
	log  *Log
	next uint64

	mem  *chunk // has next, or did, and is held; or nil
	disk *cursor
	// asked is the disk's file offset when memory was last asked instead.
	asked int64
	vm    *vmReader // reads a VM's own stream first; nil: not, or no longer
	// ahead is a record read from disk beyond a gap that is still to be told; nil: none
	// is, as nearly ever.
	ahead *Record
}

// NewReader gives a reader whose first record is seq, or if seq is beyond the
// newest, the first one after it. Close it after use.
func (l *Log) NewReader(seq uint64) *Reader { return &Reader{log: l, next: max(1, seq)} }

// Position gives the number of the record that Next gives next.
func (r *Reader) Position() uint64 { return r.next }

// Skip moves the reader to seq.
func (r *Reader) Skip(seq uint64) {
	if seq != r.next {
		r.Close()
		r.vm = nil
		r.next = seq
	}
}

// Close gives back what the reader holds. It may be used again.
func (r *Reader) Close() {
	r.take(nil)
	r.ahead = nil
	if v := r.vm; v != nil {
		v.cursor.close()
		if v.has { // what was read ahead was in the buffer given back
			v.has, v.cursor.next = false, r.next
		}
	}
	if r.disk != nil {
		r.disk.close()
		r.disk = nil
	}
}

// take has the reader hold c, which was held for it, instead of what it has held.
func (r *Reader) take(c *chunk) bool {
	r.mem.release()
	r.mem = c
	return c != nil
}

// Rest lets go of memory that the reader shares with others: who has to wait for somebody
// slow must not keep a megabyte for each record. Reading goes on as before.
func (r *Reader) Rest() { r.take(nil) }

// Near tells whether Next gives what is in memory, and does not wait for a disk.
func (r *Reader) Near() bool {
	if r.vm != nil || r.ahead != nil {
		return false
	}
	if r.mem.has(r.next) || r.next > r.log.Committed() { // there is nothing yet
		return true
	}
	if r.disk != nil || r.next < r.log.stream.oldest() {
		return false
	}
	return r.take(r.log.recent.find(r.next))
}

// Next gives the next committed record, false where there is none yet. rec is
// valid until the next call of any of the reader's methods. The error is a *Gap,
// behind which the next call goes on, or one of the disk.
func (r *Reader) Next(rec *Record) (bool, error) {
	if r.vm != nil {
		if ok, err := r.fromVM(rec); ok || err != nil {
			return ok, err
		}
	}
	for {
		if r.ahead != nil {
			*rec, r.ahead = *r.ahead, nil
			r.next = rec.Seq + 1
			return true, nil
		}
		if m := r.mem; m.has(r.next) {
			if err := parseRecord(m.line(int(r.next-m.first)), rec, false); err != nil {
				return false, fmt.Errorf("record %d in memory: %w", r.next, err) // a bug: it was written from there
			}
			r.next++
			return true, nil
		}
		committed := r.log.Committed()
		if r.next > committed {
			r.Close()
			return false, nil
		}
		// Of what was read from the disk at once only the first record asks whether
		// memory has it, or whether it has expired: both take locks.
		if r.disk == nil || r.disk.off != r.asked {
			// What has expired is gone, though memory may still have it: or what a
			// reader gets would hang on how much memory there is.
			if oldest := r.log.stream.oldest(); r.next < oldest {
				return false, r.skipTo(oldest)
			}
			if r.take(r.log.recent.find(r.next)) {
				if r.disk != nil {
					r.disk.close()
					r.disk = nil
				}
				continue
			}
			if r.disk != nil {
				r.asked = r.disk.off
			}
		}
		if ok, err := r.fromDisk(rec, committed); ok || err != nil {
			return ok, err
		}
	}
}

// run is records that follow each other, of one sender on one topic.
type run struct {
	lines []byte // with a newline each
	ids   []idSeq
}

// nextRun is [Reader.Next] for whoever treats alike what one sender published on one
// topic: run is of rec, and while memory has them of those that follow it, in at most
// limit bytes unless it is one. It is valid as rec is.
func (r *Reader) nextRun(rec *Record, limit int) (_ run, ok bool, err error) {
	if ok, err = r.Next(rec); !ok || err != nil {
		return run{}, ok, err
	}
	if m := r.mem; m.has(rec.Seq) {
		lines, n := m.run(int(rec.Seq-m.first), limit)
		r.next = rec.Seq + uint64(n)
		return run{lines, m.idsOf(rec.Seq, n)}, true, nil
	}
	one := run{lines: append(rec.Line, '\n')} // in the buffer that it was read into there is one already
	if rec.ID != nil {
		var id string
		if err := json.Unmarshal(rec.ID, &id); err != nil {
			return run{}, false, fmt.Errorf("the id of record %d: %w", rec.Seq, err)
		}
		one.ids = []idSeq{{hashID([]byte(id)), rec.Seq}}
	}
	return one, true, nil
}

// fromDisk reads the next record from a segment. It gives false without an
// error where it is worth looking in memory again.
func (r *Reader) fromDisk(rec *Record, committed uint64) (bool, error) {
	if r.disk == nil {
		r.disk = &cursor{st: &r.log.stream, next: r.next}
	}
	err := r.disk.read(rec)
	if r.disk.damaged && r.log.opts.OnDamage != nil {
		r.log.opts.OnDamage(r.disk.damagedAt)
	}
	switch {
	case errors.Is(err, io.EOF):
		// The end of the newest segment, and yet something newer is committed:
		// either it was written a moment ago, or its place on disk is damaged.
		r.disk.close()
		r.disk = nil
		if mem := r.log.recent.oldest(); mem > r.next {
			return false, r.skipTo(mem)
		}
		if !r.log.recent.has(r.next) && r.log.Committed() == committed {
			return false, r.skipTo(committed + 1)
		}
		return false, nil
	case err != nil:
		return false, err
	case rec.Seq > committed: // written, but not yet to be seen
		r.disk.close()
		r.disk = nil
		return false, r.skipTo(committed + 1)
	case rec.Seq > r.next:
		ahead := *rec
		r.ahead = &ahead
		gap := &Gap{From: r.next, To: rec.Seq - 1}
		r.next = rec.Seq
		return false, gap
	}
	r.next = rec.Seq + 1
	return true, nil
}

// skipTo passes over what cannot be read any more.
func (r *Reader) skipTo(seq uint64) error {
	gap := &Gap{From: r.next, To: seq - 1}
	r.next = seq
	if r.disk != nil {
		r.disk.close()
		r.disk = nil
	}
	return gap
}

// FirstSince gives the number of the first record at or after t, and the next
// number to be given where there is none yet. After the clock has stepped back
// several records qualify; it is one of them.
func (l *Log) FirstSince(t time.Time) (uint64, error) {
	end := l.Committed() + 1
	seq, ok, err := l.stream.firstSince(t)
	if err != nil || !ok {
		return end, err
	}
	return min(seq, end), nil
}

// LastMatching gives the number of the n-th newest committed record that match
// accepts, the oldest accepted if there are fewer, and the next number to be
// given if there are none. It reads backwards for as long as it takes, or until match gives
// an error. A record is valid until match returns.
func (l *Log) LastMatching(n uint64, match func(*Record) (bool, error)) (uint64, error) {
	end := l.Committed()
	seq, err := l.stream.lastMatching(int(min(n, 1<<31)), end, match)
	if err != nil {
		return 0, fmt.Errorf("looking for the last %d records: %w", n, err)
	}
	if seq == 0 {
		return end + 1, nil
	}
	return seq, nil
}
