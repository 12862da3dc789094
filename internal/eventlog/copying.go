package eventlog

import (
	"bytes"
	"errors"
	"sync"
	"time"
)

// copyNew copies everything committed since position. After an error the files
// are looked at anew, and copying begins again at position; after a failed sync
// that is where the last checkpoint was.
func (p *perVM) copyNew() (err error) {
	r := p.log.NewReader(p.position.Load() + 1)
	defer r.Close()
	defer func() {
		if err != nil {
			p.forget()
		}
	}()
	var rec Record
	for {
		run, ok, err := r.nextRun(&rec, maxBuffered)
		if _, gone := errors.AsType[*Gap](err); gone {
			continue // the host stream itself has lost it, and told so
		}
		if err != nil {
			return err
		}
		if ok {
			p.since += int64(len(run.lines))
			if err := p.put(&rec, run); err != nil {
				return err
			}
		}
		if !ok || p.buffered >= maxBuffered {
			if err := p.flush(); err != nil {
				return err
			}
			p.advance(r.Position() - 1)
		}
		if !ok {
			return nil
		}
	}
}

// advance notes that the files hold the records up to position.
func (p *perVM) advance(position uint64) {
	p.position.Store(position)
	p.furthest.Store(max(position, p.furthest.Load()))
	p.ids.advanced()
}

// filesHold tells up to which record the files hold all, and whether that is all that
// they have ever held: after a failed sync they are written anew from further back.
func (p *perVM) filesHold() (upTo uint64, whole bool) {
	upTo = p.position.Load()
	return upTo, upTo >= p.furthest.Load()
}

// put buffers a run, whose first record is rec.
func (p *perVM) put(rec *Record, run run) error {
	sender := string(rec.VM) != p.opts.Sender
	if sender {
		s, err := p.stream(rec.VM)
		if err != nil {
			return err
		}
		if err := p.append(s, rec.Seq, run.lines); err != nil {
			return err
		}
	}
	if len(run.ids) > 0 { // the host's too: it has no stream, and may retry
		s, err := p.stream(rec.VM)
		if err != nil {
			return err
		}
		s.addIDs(run.ids)
	}
	if vm, ok := p.opts.Owner(rec.Topic); ok && !(sender && string(vm) == string(rec.VM)) {
		s, err := p.stream(vm)
		if err != nil {
			return err
		}
		return p.append(s, rec.Seq, run.lines)
	}
	return nil
}

// append buffers lines for s, the first of which is the record seq.
func (p *perVM) append(s *vmStream, seq uint64, lines []byte) error {
	for len(lines) > 0 {
		used := len(s.buf)
		if !s.full { // otherwise what is buffered begins a segment
			used += int(s.size)
		}
		n := len(lines)
		if most := int(min(leastSegment, p.opts.SegmentSize)); used+n > most {
			n = fitting(lines, max(most, int(p.segmentSize(s.vm)))-used)
		}
		if n == 0 && used > 0 {
			if err := p.flushStream(s); err != nil {
				return err
			}
			s.full = true
			continue
		}
		if n == 0 { // longer than a segment: it gets one of its own
			n = bytes.IndexByte(lines, '\n') + 1
		}
		if len(s.buf) == 0 {
			s.bufFirst = seq
		}
		p.fill(s)
		s.borrow(n)
		s.buf = append(s.buf, lines[:n]...)
		p.buffered += n
		if lines = lines[n:]; len(lines) > 0 {
			seq += uint64(bytes.Count(s.buf[len(s.buf)-n:], newline))
		}
	}
	return nil
}

const (
	// smallBuffer is about how large a stream's own buffer gets: what a burst needs
	// beyond that would be held for ever, times ten thousand, and is lent.
	smallBuffer = 4 << 10
	largeBuffer = 128 << 10
)

var largeBuffers = sync.Pool{New: func() any { b := make([]byte, 0, largeBuffer); return &b }}

// borrow makes room for n bytes in s's buffer where its own would get too large.
func (s *vmStream) borrow(n int) {
	if len(s.buf)+n > smallBuffer && cap(s.buf) < largeBuffer {
		large := *largeBuffers.Get().(*[]byte)
		s.buf = append(large, s.buf...)
	}
}

// giveBack empties the buffer.
func (s *vmStream) giveBack() {
	b := s.buf[:0]
	if s.buf = b; cap(b) >= largeBuffer {
		s.buf = nil
		largeBuffers.Put(&b)
	}
}

var newline = []byte{'\n'}

// fitting gives how many bytes of lines are whole ones that fit into room.
func fitting(lines []byte, room int) int {
	if len(lines) <= room {
		return len(lines)
	}
	return bytes.LastIndexByte(lines[:max(0, room)], '\n') + 1
}

// fill puts s on the list of those to be flushed.
func (p *perVM) fill(s *vmStream) {
	if !s.listed {
		s.listed = true
		p.filled = append(p.filled, s)
	}
}

func (p *perVM) flush() error {
	for _, s := range p.filled {
		if err := p.flushStream(s); err != nil {
			return err
		}
		if err := s.flushIDs(); err != nil {
			return err
		}
		s.listed = false
		p.written(s)
	}
	p.filled, p.buffered = p.filled[:0], 0
	return nil
}

// written has the next checkpoint sync s.
func (p *perVM) written(s *vmStream) { p.unsynced[s.vm] = true }

// forget drops what is buffered and known of the files, after an error.
func (p *perVM) forget() {
	p.quiet = time.Now()
	if p.lost {
		p.lost = false
		clear(p.unsynced)
		p.position.Store(p.synced)
	}
	p.open.closeAll()
	p.mu.Lock()
	clear(p.streams)
	p.mu.Unlock()
	p.resets.Add(1) // when nobody finds the old ones any more, and before the files are touched
	p.filled, p.buffered = nil, 0
	p.newDirs, p.newIDs = true, true // as far as is known
}
