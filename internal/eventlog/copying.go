package eventlog

import (
	"errors"
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
		ok, err := r.Next(&rec)
		var gap *Gap
		if errors.As(err, &gap) {
			continue // the host stream itself has lost it, and told so
		}
		if err != nil {
			return err
		}
		if ok {
			p.since += int64(len(rec.Line))
			if err := p.put(&rec); err != nil {
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

func (p *perVM) put(rec *Record) error {
	sender := string(rec.VM) != p.opts.Sender
	if sender {
		s, err := p.stream(rec.VM)
		if err != nil {
			return err
		}
		if err := p.append(s, rec); err != nil {
			return err
		}
	}
	if rec.ID != nil { // the host's too: it has no stream, and may retry
		s, err := p.stream(rec.VM)
		if err != nil {
			return err
		}
		if err := s.addID(rec); err != nil {
			return err
		}
	}
	if vm, ok := p.opts.Owner(rec.Topic); ok && !(sender && string(vm) == string(rec.VM)) {
		s, err := p.stream(vm)
		if err != nil {
			return err
		}
		return p.append(s, rec)
	}
	return nil
}

// append buffers rec for s.
func (p *perVM) append(s *vmStream, rec *Record) error {
	n := len(rec.Line) + 1
	used := int64(len(s.buf))
	if !s.full { // otherwise what is buffered begins a segment
		used += s.size
	}
	if used > 0 && used+int64(n) > min(leastSegment, p.opts.SegmentSize) && used+int64(n) > p.segmentSize(s.vm) {
		if err := p.flushStream(s); err != nil {
			return err
		}
		s.full = true
	}
	if len(s.buf) == 0 {
		s.bufFirst = rec.Seq
	}
	p.fill(s)
	s.buf = append(append(s.buf, rec.Line...), '\n')
	p.buffered += n
	return nil
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

// written puts s on the list of those that the next checkpoint syncs.
func (p *perVM) written(s *vmStream) {
	if !s.unsynced {
		s.unsynced = true
		p.unsynced = append(p.unsynced, s.vm)
	}
}

// forget drops what is buffered and known of the files, after an error.
func (p *perVM) forget() {
	p.quiet = time.Now()
	if p.lost {
		p.lost = false
		p.unsynced = nil
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
