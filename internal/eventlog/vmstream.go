package eventlog

import (
	"bytes"
	"container/list"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

// maxOpenFiles bounds the descriptors held for the VMs' streams, so that ten
// thousand VMs stay within an ordinary limit.
const maxOpenFiles = 256

// vmStream is one VM's stream. All but st belongs to the copying goroutine.
type vmStream struct {
	st   stream
	p    *perVM
	vm   string
	size int64 // of the newest segment
	full bool  // the next line begins a segment

	buf      []byte // lines still to be written
	bufFirst uint64
	listed   bool // in perVM.filled

	ids    []byte // entries still to be written
	idSize int64

	f    File
	elem *list.Element // in openFiles while f is open
}

// known gives a VM's stream if its files were looked at; else nil.
func (p *perVM) known(vm string) *vmStream {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.streams[vm]
}

// stream gives a VM's stream, looking at its files when it is first asked for.
func (p *perVM) stream(vm []byte) (*vmStream, error) {
	if s := p.known(string(vm)); s != nil {
		return s, nil
	}
	s := &vmStream{p: p, vm: string(vm)}
	s.st = stream{fs: p.log.opts.FS, dir: filepath.Join(p.opts.Dir, s.vm)}
	upTo := p.position.Load()
	if err := s.load(upTo); err != nil {
		return nil, s.streamFault("opening", err)
	}
	if err := s.loadIDs(upTo); err != nil {
		return nil, s.idsFault("opening", err)
	}
	p.mu.Lock()
	p.streams[s.vm] = s
	p.mu.Unlock()
	return s, nil
}

// load looks at the files, and cuts off what is behind the record upTo: it may
// have been written and never synced, so that a power cut may have left any part
// of it, or be left of a write that failed, or be newer than what the host stream
// has come back with. The host stream has it, and it is copied again.
func (s *vmStream) load(upTo uint64) error {
	err := s.st.load()
	if errors.Is(err, syscall.ENOTDIR) { // or one VM's would keep all from being copied
		err = s.makeWay()
	}
	if err != nil {
		return err
	}
	cut, err := s.st.cutNewest(upTo)
	if err != nil {
		return err
	}
	if segs := s.st.snapshot(); len(segs) > 0 {
		g := segs[len(segs)-1]
		f, err := s.st.fs.OpenFile(s.st.path(g.first), os.O_RDWR, filePerm)
		if err != nil {
			return err
		}
		end, err := endOf(f, g.size, upTo)
		if err == nil && end < g.size {
			cut = true
			err = f.Truncate(end)
		}
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
		s.st.grown(end, g.modified)
		s.size = end
	}
	if cut {
		s.p.written(s)
	}
	return nil
}

// makeWay sets aside what is in the place of the stream's directory.
func (s *vmStream) makeWay() error {
	name, err := setAside(s.st.fs, s.st.dir, ".aside-")
	if err != nil {
		return err
	}
	s.p.newDirs = true
	if s.p.opts.OnAside != nil {
		s.p.opts.OnAside(s.st.dir, name)
	}
	return s.st.load()
}

// loadIDs is load for the file of ids.
func (s *vmStream) loadIDs(upTo uint64) error {
	f, err := openOwn(s.st.fs, s.p.ids.path(s.vm), os.O_RDWR, s.p.ids.aside)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	size, err := f.Size()
	if err == nil {
		s.idSize, err = endOfIDs(f, size, upTo)
	}
	if _, whole := s.p.filesHold(); err == nil && (!whole || s.p.doubted) {
		s.idSize, err = s.trueIDs(f, s.idSize)
	}
	if err == nil && s.idSize < size {
		err = f.Truncate(s.idSize)
		s.p.written(s)
	}
	return errors.Join(err, f.Close())
}

// trueIDs gives where the entries before end end that a crash has not made up: a number of
// which it left the first bytes alone looks like that of an older record. A record that has
// expired cannot tell.
func (s *vmStream) trueIDs(f File, end int64) (int64, error) {
	var b [idEntry]byte
	for ; end > 0; end -= idEntry {
		if _, err := f.ReadAt(b[:], end-idEntry); err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
		entry := idSeq{idKey(b[:]), binary.BigEndian.Uint64(b[idHash:])}
		r := s.p.log.NewReader(entry.seq)
		var rec Record
		run, ok, err := r.nextRun(&rec, 1)
		known := ok && err == nil // of what is damaged copying will tell
		lie := known && (string(rec.VM) != s.vm || !slices.Contains(run.ids, entry))
		r.Close()
		if !lie {
			break
		}
	}
	return end, nil
}

// endOf gives where the newest record of at most upTo ends in the file's first
// size bytes.
func endOf(f File, size int64, upTo uint64) (int64, error) {
	last, end, err := lastRecord(f, size)
	if err != nil || last <= upTo && end == size { // nearly always
		return end, err
	}
	from, err := seekSeq(f, size, upTo)
	if err != nil {
		return 0, err
	}
	end = 0
	err = eachLine(f, from, size, func(off int64, line []byte, whole bool) {
		var rec Record
		if whole && parseRecord(line, &rec, true) == nil && rec.Seq <= upTo {
			end = off + int64(len(line)) + 1
		}
	})
	return end, err
}

// lastRecord gives the number of the newest whole record in the file's first
// size bytes and where it ends; 0, 0 if there is none.
func lastRecord(f File, size int64) (seq uint64, end int64, err error) {
	bufp := buffers.Get().(*[]byte)
	defer buffers.Put(bufp)
	for hi := size; hi > 0; {
		lo := max(0, hi-int64(len(*bufp)))
		b := (*bufp)[:hi-lo]
		if _, err := f.ReadAt(b, lo); err != nil && !errors.Is(err, io.EOF) {
			return 0, 0, err
		}
		for at := bytes.LastIndexByte(b, '\n'); at > 0; {
			start := bytes.LastIndexByte(b[:at], '\n') + 1
			var rec Record
			if (start > 0 || lo == 0) && parseRecord(b[start:at], &rec, true) == nil {
				return rec.Seq, lo + int64(at) + 1, nil
			}
			at = start - 1
		}
		if lo == 0 {
			break
		}
		hi = lo + cursorBuffer/2 // a line may straddle the two windows
	}
	return 0, 0, nil
}

// flushStream writes s's buffer to its newest segment.
func (p *perVM) flushStream(s *vmStream) error {
	if len(s.buf) == 0 {
		return nil
	}
	if err := p.openFor(s); err != nil {
		return err
	}
	if _, err := s.f.WriteAt(s.buf, s.size); err != nil {
		// A part of a line must not stay: while the disk is full jq would stop at it.
		return s.streamFault("writing", errors.Join(err, s.f.Truncate(s.size)))
	}
	s.size += int64(len(s.buf))
	s.giveBack()
	s.st.grown(s.size, time.Now())
	return nil
}

// openFor opens s's newest segment, or begins one where there is none or it is
// full.
func (p *perVM) openFor(s *vmStream) error {
	segs := s.st.snapshot()
	if len(segs) > 0 && !s.full {
		return p.openNewest(s, segs[len(segs)-1].first)
	}
	p.open.close(s)
	if len(segs) == 0 {
		err := s.st.fs.Mkdir(s.st.dir, dirPerm)
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("creating the stream of %s: %w", s.vm, err)
		}
		p.newDirs = true
	}
	// The next checkpoint makes the names durable.
	f, err := s.st.create(s.bufFirst)
	if err != nil {
		return s.streamFault("continuing", err)
	}
	p.open.add(s, f)
	s.size, s.full = 0, false
	// One that stays takes room, and is no reason to keep the copies of all VMs back.
	_, _, err = s.st.expire(p.retention(s.vm), time.Now(), false)
	p.log.note(err)
	return nil
}

func (p *perVM) openNewest(s *vmStream, first uint64) error {
	if s.f != nil {
		p.open.touch(s)
		return nil
	}
	f, err := s.st.fs.OpenFile(s.st.path(first), os.O_RDWR, filePerm)
	if err != nil {
		return s.streamFault("opening", err)
	}
	p.open.add(s, f)
	return nil
}

// sync makes what was written since the last checkpoint durable: the segments that
// may hold records of since then, the names of all and the ids.
func (s *vmStream) sync(open *openFiles) error {
	segs := s.st.snapshot()
	for i, g := range segs {
		if i == len(segs)-1 {
			if err := s.p.openNewest(s, g.first); err != nil {
				return err
			}
			if err := s.f.Sync(); err != nil {
				open.close(s)
				return s.streamFault("syncing", err)
			}
		} else if segs[i+1].first > s.p.synced+1 {
			if err := syncIfThere(s.st.fs, s.st.path(g.first)); err != nil {
				return s.streamFault("syncing", err)
			}
		}
	}
	if err := s.st.syncDir(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return s.streamFault("syncing", err)
	}
	if err := syncIfThere(s.st.fs, s.p.ids.path(s.vm)); err != nil {
		return s.idsFault("syncing", err)
	}
	return nil
}

// syncIfThere makes the file's content durable.
func syncIfThere(fsys FS, path string) error {
	f, err := fsys.OpenFile(path, os.O_RDWR, filePerm)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// addIDs buffers the entries for records with ids.
func (s *vmStream) addIDs(ids []idSeq) {
	s.p.fill(s)
	for i := range ids {
		s.ids = binary.BigEndian.AppendUint64(append(s.ids, ids[i].key[:]...), ids[i].seq)
	}
	s.p.buffered += len(ids) * idEntry // the host's are not in any stream's buffer
}

// flushIDs writes the buffered entries, and the file anew when half of it is
// beyond the window.
func (s *vmStream) flushIDs() error {
	if len(s.ids) == 0 {
		return nil
	}
	if s.idSize+int64(len(s.ids)) > int64(2*s.p.ids.window*idEntry) {
		if err := s.shortenIDs(); err != nil {
			return s.idsFault("shortening", err)
		}
	}
	f, err := s.st.fs.OpenFile(s.p.ids.path(s.vm), os.O_RDWR|os.O_CREATE, filePerm)
	if err != nil {
		return s.idsFault("opening", err)
	}
	size, err := f.Size()
	if err == nil {
		s.idSize = min(s.idSize, size-size%idEntry) // somebody may have removed or cut it
		_, err = f.WriteAt(s.ids, s.idSize)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return s.idsFault("writing", err)
	}
	s.p.newIDs = s.p.newIDs || s.idSize == 0
	s.idSize += int64(len(s.ids))
	s.ids = s.ids[:0]
	return nil
}

// shortenIDs writes the file anew with what is in the window.
func (s *vmStream) shortenIDs() error {
	keep, err := s.p.ids.read(s.vm, s.p.ids.window)
	if err != nil {
		return err
	}
	if err := replaceFile(s.st.fs, s.p.ids.path(s.vm), keep); err != nil {
		return err
	}
	s.idSize = int64(len(keep))
	s.p.newIDs = true
	return nil
}

// openFiles closes the stream files used longest ago.
type openFiles struct{ used list.List }

func (o *openFiles) add(s *vmStream, f File) {
	s.f, s.elem = f, o.used.PushFront(s)
	for o.used.Len() > maxOpenFiles {
		o.close(o.used.Back().Value.(*vmStream))
	}
}

func (o *openFiles) touch(s *vmStream) { o.used.MoveToFront(s.elem) }

// close closes s's file. What was written is in the page cache, and a
// checkpoint opens the file again to sync it.
func (o *openFiles) close(s *vmStream) {
	if s.f != nil {
		_ = s.f.Close()
		o.used.Remove(s.elem)
		s.f, s.elem = nil, nil
	}
}

func (o *openFiles) closeAll() {
	for o.used.Len() > 0 {
		o.close(o.used.Front().Value.(*vmStream))
	}
}
