package eventlog

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"time"
)

// vmReader reads a VM's own stream up to where it had been copied when the
// reader was made; the host stream has the rest.
type vmReader struct {
	vm     string
	cursor cursor
	until  uint64
	begins uint64 // the first number that the stream can have
	resets uint64 // of what is known of the files, when it was made
	unsure bool   // after a failed sync, behind until anything may be in the files
	ahead  Record
	has    bool
}

// NewVMReader is NewReader for what the VM published and what was sent to it,
// and whatever else was committed lately: older records come from the VM's own
// stream, which other VMs' traffic does not push out.
func (l *Log) NewVMReader(vm string, seq uint64) (*Reader, error) {
	var resets uint64
	whole := true
	if l.perVM != nil {
		resets = l.perVM.resets.Load()
		_, whole = l.perVM.filesHold()
	}
	st, position, err := l.vmStream(vm)
	if err != nil {
		return nil, err
	}
	seq = max(1, seq)
	r := l.NewReader(seq)
	if st == nil || seq > position {
		return r, nil
	}
	// The VM's stream may begin later than asked for; what is missing there the
	// host's may still have, or nobody.
	oldest := st.oldest()
	if oldest == 0 || oldest > max(seq, l.Oldest()) {
		return r, nil
	}
	r.vm = &vmReader{vm: vm, cursor: cursor{st: st, next: seq}, until: position, begins: oldest, resets: resets, unsure: !whole}
	return r, nil
}

// vmStream gives a VM's stream and how far the host stream is copied to it. The
// position is taken first: the files hold at least that much.
func (l *Log) vmStream(vm string) (*stream, uint64, error) {
	p := l.perVM
	if p == nil {
		return nil, 0, nil
	}
	position := p.position.Load()
	if s := p.known(vm); s != nil {
		return &s.st, position, nil
	}
	st := &stream{fs: l.opts.FS, dir: filepath.Join(p.opts.Dir, vm), private: true}
	if err := st.load(); err != nil {
		return nil, 0, fmt.Errorf("opening the stream of %s: %w", vm, err)
	}
	return st, position, nil
}

// fromVM reads the next record from the VM's stream, false where it has ended.
func (r *Reader) fromVM(rec *Record) (bool, error) {
	v := r.vm
	if v.has {
		*rec, v.has = v.ahead, false
		r.next = rec.Seq + 1
		return true, nil
	}
	if v.begins > r.next {
		gap := &Gap{From: r.next, To: v.begins - 1}
		r.next, v.cursor.next = v.begins, v.begins
		return false, gap
	}
	err := v.cursor.read(rec)
	if r.log.perVM.resets.Load() != v.resets {
		// The end of the files is being written anew, and their list is no longer kept
		// up to date: begin again with what is known by now.
		v.cursor.close()
		v.cursor.next = r.next // should this fail
		again, err := r.log.NewVMReader(v.vm, r.next)
		if err != nil {
			return false, err
		}
		if r.vm = again.vm; r.vm == nil {
			return false, nil
		}
		return r.fromVM(rec)
	}
	if errors.Is(err, fs.ErrNotExist) { // somebody has removed it; the host stream may have it yet
		v.cursor.close()
		r.vm = nil
		return false, nil
	}
	damaged := v.cursor.damaged
	if damaged && v.unsure && (err != nil || rec.Seq > v.until) {
		// What is up to until was synced, so this is most likely behind it; should it
		// not be, the host stream has what is missing, if anybody has.
		v.cursor.close()
		r.vm = nil
		if r.next < r.log.Oldest() {
			r.next = v.until + 1
		}
		return false, nil
	}
	if damaged && r.log.opts.OnDamage != nil {
		r.log.opts.OnDamage(v.cursor.damagedAt)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	from := r.next
	if err != nil || rec.Seq > v.until {
		v.cursor.close()
		r.vm = nil
		r.next = v.until + 1
		gone := v.cursor.st.oldest() == 0 && from <= v.until // it was forgotten meanwhile
		if damaged || v.cursor.expired || gone {
			return false, &Gap{From: from, To: v.until}
		}
		return false, nil
	}
	if (damaged || v.cursor.expired) && rec.Seq > from {
		v.ahead, v.has = *rec, true
		r.next = rec.Seq // it is still to be given: who goes on from Position must not miss it
		return false, &Gap{From: from, To: rec.Seq - 1}
	}
	r.next = rec.Seq + 1
	return true, nil
}

// FirstSinceOf is FirstSince over a VM's own stream.
func (l *Log) FirstSinceOf(vm string, t time.Time) (uint64, error) {
	st, position, err := l.vmStream(vm)
	if err != nil {
		return 0, err
	}
	if st != nil {
		if seq, ok, err := st.firstSince(t); err != nil || ok && seq <= position {
			return seq, err
		}
	}
	seq, err := l.FirstSince(t)
	return max(seq, position+1), err
}

// OldestOf gives the number from which on a VM's own stream, or failing one the
// host's, is kept.
func (l *Log) OldestOf(vm string) (uint64, error) {
	st, _, err := l.vmStream(vm)
	if err != nil {
		return 0, err
	}
	if st != nil {
		if oldest := st.oldest(); oldest > 0 {
			return oldest, nil
		}
	}
	return l.Oldest(), nil
}

// LastMatchingOf is LastMatching over a VM's own stream.
func (l *Log) LastMatchingOf(vm string, n uint64, match func(*Record) (bool, error)) (uint64, error) {
	st, position, err := l.vmStream(vm)
	if err != nil {
		return 0, err
	}
	if st == nil {
		return l.LastMatching(n, match)
	}
	end := l.Committed()
	r := l.NewReader(position + 1)
	defer r.Close()
	var newer []uint64 // matches not copied yet: there are few, the copy is close behind
	var rec Record
	for r.Position() <= end {
		ok, err := r.Next(&rec)
		if _, gone := errors.AsType[*Gap](err); gone {
			continue
		}
		if err != nil {
			return 0, err
		}
		if !ok {
			break
		}
		if ok, err = match(&rec); err != nil {
			return 0, err
		}
		if ok {
			newer = append(newer, rec.Seq)
		}
	}
	r.Close() // the search may take long
	if n == 0 {
		return end + 1, nil
	}
	if have := uint64(len(newer)); have >= n {
		return newer[have-n], nil
	}
	seq, err := st.lastMatching(int(min(n, 1<<31))-len(newer), position, match)
	switch {
	case err != nil:
		return 0, fmt.Errorf("looking for the last %d records of %s: %w", n, vm, err)
	case seq != 0:
		return seq, nil
	case len(newer) > 0:
		return newer[0], nil
	}
	return end + 1, nil
}
