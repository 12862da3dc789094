package eventlog

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// read goes on with a stream and gives each its records below limit. It tells
// whether one at or beyond it is left.
func (v *verifier) read(s *verified, limit uint64, each func(*verified, *Record, Finding)) bool {
	for ; s.at < len(s.segs); s.at, s.off = s.at+1, 0 {
		until := noNumber
		if s.at+1 < len(s.segs) {
			until = s.segs[s.at+1]
		}
		more, err := v.readSegment(s, limit, until, each)
		if err != nil {
			s.excused = true
			if !v.expired(s) {
				v.unreadable(s.path(s.at), err)
			}
			if until != noNumber {
				s.last = until - 1
			}
		}
		if more {
			return true
		}
	}
	return false
}

// expired tells whether the segment being read was removed for its age or its
// stream's size since it was listed.
func (v *verifier) expired(s *verified) bool {
	now := stream{fs: v.opts.FS, dir: s.dir}
	return now.load() == nil && now.oldest() > s.segs[s.at]
}

func (v *verifier) readSegment(s *verified, limit, until uint64, each func(*verified, *Record, Finding)) (more bool, err error) {
	first, path := s.segs[s.at], s.path(s.at)
	f, err := v.opts.FS.OpenFile(path, os.O_RDONLY, 0)
	if err != nil {
		return false, err
	}
	defer func() { _ = f.Close() }() // opened for reading
	size, err := f.Size()
	if err != nil {
		return false, err
	}
	if until == noNumber && s.vm != "" {
		size = min(size, s.newestSize) // of what came later, the host stream may have been read too soon
	}
	if s.vm == "" && s.last == 0 {
		s.last = first - 1
	}
	from := s.off
	r := &lineReader{f: f, off: from, limit: size, buf: v.buf}
	defer func() { v.sum.Bytes += r.off - from }()
	var rec Record
	for {
		line, off, whole, err := r.next()
		at := Finding{File: path, Offset: off, Bytes: r.off - off}
		if errors.Is(err, io.EOF) {
			if until != noNumber { // what a stream lacks at its end cannot be known
				v.hole(s, at, until)
			}
			return false, nil
		}
		if err != nil {
			return false, err
		}
		ok := whole && parseRecord(line, &rec, true) == nil
		switch {
		case ok && rec.Seq >= until, s.vm == "" && s.last+1 == until:
			v.hole(s, at, until)
			at.Kind, at.Bytes = Void, size-off
			v.tell(at, "left over from a write that failed; nothing in it was acknowledged, and the next segment has its numbers")
			return false, nil
		case !ok && until == noNumber && torn(line, whole):
			v.tails = append(v.tails, verifiedTail{path, off, size})
		case !ok:
			s.excused = true
			v.judge(at, line, whole)
		case rec.Seq <= s.last || rec.Seq < first:
			s.excused = true
			at.Kind, at.From, at.To = OutOfOrder, rec.Seq, rec.Seq
			v.tell(at, "record %d is behind record %d, in a segment that begins with record %d", rec.Seq, s.last, first)
		case rec.Seq >= limit:
			s.off, s.resume, r.off = off, rec.Seq, off
			return true, nil
		default:
			v.hole(s, at, rec.Seq)
			s.last = rec.Seq
			v.sum.Records++
			at.From, at.To = rec.Seq, rec.Seq
			each(s, &rec, at)
		}
	}
}

// hole tells what the host stream lacks before the record next.
func (v *verifier) hole(s *verified, at Finding, next uint64) {
	if s.vm != "" || next <= s.last+1 {
		return
	}
	at.Kind, at.Bytes, at.From, at.To = Hole, 0, s.last+1, next-1
	v.tell(at, "%s missing before this place; readers are told of a gap", numbers(at.From, at.To))
	s.last = next - 1
}

func numbers(from, to uint64) string {
	if from == to {
		return fmt.Sprintf("record %d is", from)
	}
	return fmt.Sprintf("records %d to %d are", from, to)
}

// torn tells whether line is what an unfinished write leaves: the beginning of
// a record. A whole one with a wrong byte where its newline should be is none.
func torn(line []byte, whole bool) bool {
	var rec Record
	return !whole && len(line) < cursorBuffer && bytes.IndexByte(line, 0) < 0 &&
		parseRecord(line[:len(line)-1], &rec, true) != nil
}

// judge tells of a line that is no record.
func (v *verifier) judge(at Finding, line []byte, whole bool) {
	switch {
	case bytes.IndexByte(line, 0) >= 0:
		at.Kind = NULBytes
		v.tell(at, "NUL bytes stand where a record should")
	case !whole && len(line) < cursorBuffer:
		at.Kind = CutShort
		v.tell(at, "the last line has no end")
	case bytes.HasPrefix(line, []byte(crcPrefix)):
		at.Kind = BadChecksum
		v.tell(at, "the record does not have the checksum that it was written with")
	default:
		at.Kind = NotRecord
		v.tell(at, "the line is no record")
	}
}

// settle looks again at the lines that had no end: a castrad that runs has
// written them to their ends, or cut them off.
func (v *verifier) settle() {
	if len(v.tails) > 0 {
		time.Sleep(verifyGrace)
	}
	for _, t := range v.tails {
		f, err := v.opts.FS.OpenFile(t.file, os.O_RDONLY, 0)
		if err != nil {
			continue // expired meanwhile
		}
		size, err := f.Size()
		if err == nil && size == t.size {
			v.tell(Finding{Kind: UnfinishedTail, File: t.file, Offset: t.off, Bytes: size - t.off},
				"an unfinished write; nothing in it was acknowledged, and castrad cuts it off when it starts, with room to keep it aside")
		}
		_ = f.Close() // opened for reading
	}
}

// lineReader reads a file's lines up to limit.
type lineReader struct {
	f          File
	off        int64 // of the next line
	limit      int64
	buf        []byte
	begin, end int // of what is read and still to be given
}

// next gives a line without its newline and where it began; whole is false for
// the last one if it has none, and for the first bytes of one longer than the
// buffer, the rest of which is passed over. io.EOF where there are no more.
func (r *lineReader) next() (line []byte, off int64, whole bool, err error) {
	off = r.off
	for long := false; ; {
		b := r.buf[r.begin:r.end]
		i := bytes.IndexByte(b, '\n')
		if i >= 0 {
			r.begin += i + 1
			r.off += int64(i) + 1
			if long {
				return r.buf, off, false, nil
			}
			return b[:i], off, true, nil
		}
		if len(b) == len(r.buf) {
			long = true
			r.off += int64(len(b))
			r.begin, r.end, b = 0, 0, nil
		}
		r.end = copy(r.buf, b)
		r.begin = 0
		want := min(int64(len(r.buf)-r.end), r.limit-r.off-int64(r.end))
		n, err := r.f.ReadAt(r.buf[r.end:r.end+int(want)], r.off+int64(r.end))
		r.end += n
		switch {
		case n > 0:
		case err != nil && !errors.Is(err, io.EOF):
			return nil, off, false, err
		case long || r.end > 0: // the end: want was 0, or the file is shorter than it was
			r.off += int64(r.end)
			r.limit, r.begin = r.off, r.end
			if long {
				return r.buf, off, false, nil
			}
			return r.buf[:r.end], off, false, nil
		default:
			return nil, off, false, io.EOF
		}
	}
}
