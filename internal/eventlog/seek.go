package eventlog

import (
	"bytes"
	"errors"
	"io"
	"os"
	"slices"
	"time"
)

// seekWindow is where a binary search over a file's bytes stops halving and a
// reader may as well read on: about one disk read.
const seekWindow = 128 << 10

// seekSeq gives the offset of a line at or before the record seq, close to it,
// by halving the file: lines are sorted by seq, so no index is needed.
func seekSeq(f File, size int64, seq uint64) (int64, error) {
	return seekLine(f, size, func(r *Record) bool { return r.Seq <= seq })
}

// seekLine gives the offset of the last line that it looked at for which
// before held, 0 if there was none. Lines that are no records are passed over.
func seekLine(f File, size int64, before func(*Record) bool) (int64, error) {
	bufp := buffers.Get().(*[]byte)
	defer buffers.Put(bufp)
	lo, hi := int64(0), size
	for hi-lo > seekWindow {
		mid := lo + (hi-lo)/2
		var rec Record
		off, err := firstRecord(f, *bufp, mid, hi, &rec)
		if err != nil {
			return 0, err
		}
		switch {
		case off < 0: // nothing but damage from mid to hi
			hi = mid
		case before(&rec):
			lo = off
		default:
			hi = mid
		}
	}
	return lo, nil
}

// firstRecord finds the first whole record that begins behind from and ends
// before to, and gives its offset, -1 if there is none. rec aliases buf.
func firstRecord(f File, buf []byte, from, to int64, rec *Record) (int64, error) {
	inLine := from > 0 // from is most likely in the middle of a line
	for from < to {
		n, err := f.ReadAt(buf[:min(int64(len(buf)), to-from)], from)
		if err != nil && !errors.Is(err, io.EOF) {
			return -1, err
		}
		b := buf[:n]
		if inLine {
			i := bytes.IndexByte(b, '\n')
			if i < 0 {
				return -1, nil
			}
			b, from = b[i+1:], from+int64(i)+1
		}
		i := bytes.IndexByte(b, '\n')
		if i < 0 {
			if n == 0 || int64(n) >= to-from || !inLine {
				return -1, nil
			}
			inLine = false
			continue // the line is cut by the buffer: read again from its start
		}
		if parseRecord(b[:i], rec, true) == nil {
			return from, nil
		}
		from, inLine = from+int64(i)+1, false
	}
	return -1, nil
}

// firstSince gives the number of the first record at or after t, in the order
// of seq, ok=false if there is none yet. Where the clock stepped back the
// search may land on any of the candidates.
func (s *stream) firstSince(t time.Time) (seq uint64, ok bool, err error) {
	segs := s.snapshot()
	// A segment's last write bounds the times in it from above.
	i, _ := slices.BinarySearchFunc(segs, t, func(g segment, t time.Time) int {
		if g.modified.Before(t) {
			return -1
		}
		return 1
	})
	when := t.UTC().Format(timeLayout)
	for ; i < len(segs); i++ {
		c := &cursor{st: s, next: segs[i].first}
		seq, err := c.firstFrom(when)
		c.close()
		if err == nil {
			return seq, true, nil
		}
		if !errors.Is(err, io.EOF) {
			return 0, false, err
		}
	}
	return 0, false, nil
}

// firstFrom gives the number of the first record from c's segment on whose
// time is at or after when, io.EOF if there is none.
func (c *cursor) firstFrom(when string) (uint64, error) {
	if err := c.open(); err != nil {
		return 0, err
	}
	off, err := seekLine(c.f, c.limit, func(r *Record) bool { return string(r.Time) < when })
	if err != nil {
		return 0, err
	}
	c.off = off
	var rec Record
	for {
		if err := c.read(&rec); err != nil {
			return 0, err
		}
		if string(rec.Time) >= when {
			return rec.Seq, nil
		}
	}
}

// lastMatching gives the number of the n-th newest record with a number of at
// most upTo that match accepts, the oldest such if there are fewer, 0 if there
// is none. It reads backwards, so that a short answer is a quick one.
func (s *stream) lastMatching(n int, upTo uint64, match func(*Record) (bool, error)) (uint64, error) {
	segs := s.snapshot()
	oldest := uint64(0)
	bufp := buffers.Get().(*[]byte)
	defer buffers.Put(bufp)
	for i := len(segs) - 1; i >= 0 && n > 0; i-- {
		limit := upTo
		if i+1 < len(segs) {
			limit = min(limit, segs[i+1].first-1)
		}
		f, err := s.fs.OpenFile(s.path(segs[i].first), os.O_RDONLY, 0)
		if err != nil {
			if errors.Is(err, os.ErrNotExist) { // expired meanwhile, or removed by somebody
				continue
			}
			return 0, err
		}
		seq, found, err := lastInFile(f, *bufp, segs[i].size, n, func(r *Record) (bool, error) {
			if r.Seq > limit {
				return false, nil
			}
			return match(r)
		})
		_ = f.Close() // opened for reading
		if err != nil {
			return 0, err
		}
		if found > 0 {
			oldest = seq
			n -= found
		}
	}
	return oldest, nil
}

// lastInFile looks for the n newest matching records in the file's first size
// bytes and gives the oldest of them and how many there were.
func lastInFile(f File, buf []byte, size int64, n int, match func(*Record) (bool, error)) (oldest uint64, found int, err error) {
	var seqs []uint64
	for hi := size; hi > 0 && found < n; {
		lo := max(0, hi-int64(len(buf)))
		b := buf[:hi-lo]
		if _, err := f.ReadAt(b, lo); err != nil && !errors.Is(err, io.EOF) {
			return 0, 0, err
		}
		start := 0
		if lo > 0 {
			i := bytes.IndexByte(b, '\n')
			if i < 0 || i+1 == len(b) { // no line is that long: damage
				hi = lo
				continue
			}
			start = i + 1
		}
		seqs = seqs[:0]
		for line := range bytes.Lines(b[start:]) {
			var rec Record
			if parseRecord(bytes.TrimSuffix(line, []byte("\n")), &rec, true) != nil {
				continue
			}
			ok, err := match(&rec)
			if err != nil {
				return 0, 0, err
			}
			if ok {
				seqs = append(seqs, rec.Seq)
			}
		}
		if k := min(n-found, len(seqs)); k > 0 {
			oldest = seqs[len(seqs)-k]
			found += k
		}
		hi = lo + int64(start)
	}
	return oldest, found, nil
}
