package eventlog

import (
	"bytes"
	"container/list"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
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
	last uint64 // the newest record, buffered ones included
	size int64  // of the newest segment
	full bool   // the next line begins a segment

	buf      []byte // lines still to be written
	bufFirst uint64
	listed   bool

	ids    []byte // entries still to be written
	lastID uint64 // the newest number in the id file, buffered ones included
	idSize int64

	f    File
	elem *list.Element // in openFiles while f is open
}

// stream gives a VM's stream, looking at its files when it is first asked for.
func (p *perVM) stream(vm []byte) (*vmStream, error) {
	p.mu.Lock()
	s := p.streams[string(vm)]
	p.mu.Unlock()
	if s != nil {
		return s, nil
	}
	s = &vmStream{p: p, vm: string(vm)}
	s.st = stream{fs: p.log.opts.FS, dir: filepath.Join(p.opts.Dir, s.vm)}
	if err := s.load(); err != nil {
		return nil, fmt.Errorf("opening the stream of %s: %w", vm, err)
	}
	p.mu.Lock()
	p.streams[s.vm] = s
	p.mu.Unlock()
	return s, nil
}

// load finds the newest record on disk and cuts off a line that a crash left
// unfinished: the host stream still has it.
func (s *vmStream) load() error {
	if err := s.st.load(); err != nil {
		return err
	}
	if segs := s.st.snapshot(); len(segs) > 0 {
		g := segs[len(segs)-1]
		f, err := s.st.fs.OpenFile(s.st.path(g.first), os.O_RDWR, filePerm)
		if err != nil {
			return err
		}
		last, end, err := lastRecord(f, g.size)
		if err == nil && end < g.size {
			err = f.Truncate(end)
		}
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
		s.st.grown(end, g.modified)
		s.last, s.size = max(last, g.first-1), end
	}
	ids, err := s.p.ids.read(s.vm)
	if err != nil {
		return err
	}
	if s.idSize = int64(len(ids)); s.idSize > 0 {
		s.lastID = binary.BigEndian.Uint64(ids[len(ids)-8:])
	}
	return nil
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
		return fmt.Errorf("writing the stream of %s: %w", s.vm, err)
	}
	s.size += int64(len(s.buf))
	s.buf = s.buf[:0]
	if cap(s.buf) > 64<<10 {
		s.buf = nil // a burst must not be held for ever, times ten thousand
	}
	s.st.grown(s.size, time.Now())
	return nil
}

// openFor opens s's newest segment, or begins one where there is none or it is
// full.
func (p *perVM) openFor(s *vmStream) error {
	segs := s.st.snapshot()
	if len(segs) > 0 {
		if err := p.openNewest(s, segs[len(segs)-1].first); err != nil || !s.full {
			return err
		}
		// Checkpoints sync the newest segment only.
		if err := s.f.Sync(); err != nil {
			return fmt.Errorf("syncing the stream of %s: %w", s.vm, err)
		}
		p.open.close(s)
	} else if err := s.st.fs.MkdirAll(s.st.dir, dirPerm); err != nil {
		return fmt.Errorf("creating the stream of %s: %w", s.vm, err)
	}
	f, err := s.st.create(s.bufFirst)
	if err != nil {
		return fmt.Errorf("continuing the stream of %s: %w", s.vm, err)
	}
	p.open.add(s, f)
	s.size, s.full = 0, false
	return s.st.expire(retention{size: p.opts.Retention, age: p.opts.MaxAge, before: s.bufFirst}, time.Now())
}

func (p *perVM) openNewest(s *vmStream, first uint64) error {
	if s.f != nil {
		p.open.touch(s)
		return nil
	}
	f, err := s.st.fs.OpenFile(s.st.path(first), os.O_RDWR, filePerm)
	if err != nil {
		return fmt.Errorf("opening the stream of %s: %w", s.vm, err)
	}
	p.open.add(s, f)
	return nil
}

// sync makes the newest segment and the ids durable.
func (s *vmStream) sync(open *openFiles) error {
	if segs := s.st.snapshot(); len(segs) > 0 {
		if err := s.p.openNewest(s, segs[len(segs)-1].first); err != nil {
			return err
		}
		if err := s.f.Sync(); err != nil {
			open.close(s)
			return fmt.Errorf("syncing the stream of %s: %w", s.vm, err)
		}
	}
	if s.idSize == 0 {
		return nil
	}
	f, err := s.st.fs.OpenFile(s.p.ids.path(s.vm), os.O_RDWR, filePerm)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// addID buffers the entry for a record with an id.
func (s *vmStream) addID(rec *Record) error {
	if rec.Seq <= s.lastID {
		return nil
	}
	var id string
	if err := json.Unmarshal(rec.ID, &id); err != nil {
		return fmt.Errorf("the id of record %d: %w", rec.Seq, err)
	}
	key := hashID([]byte(id))
	s.p.fill(s)
	s.ids = binary.BigEndian.AppendUint64(append(s.ids, key[:]...), rec.Seq)
	s.lastID = rec.Seq
	return nil
}

// flushIDs writes the buffered entries, and the file anew when half of it is
// beyond the window.
func (s *vmStream) flushIDs() error {
	if len(s.ids) == 0 {
		return nil
	}
	fsys, path := s.st.fs, s.p.ids.path(s.vm)
	if s.idSize+int64(len(s.ids)) > idFile {
		all, err := readIDs(fsys, path)
		if err != nil {
			return err
		}
		keep := all[max(0, len(all)-idWindow*idEntry):]
		if err := replaceFile(fsys, path, keep); err != nil {
			return fmt.Errorf("shortening the ids of %s: %w", s.vm, err)
		}
		s.idSize = int64(len(keep))
	}
	f, err := fsys.OpenFile(path, os.O_RDWR|os.O_CREATE, filePerm)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(s.ids, s.idSize)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("writing the ids of %s: %w", s.vm, err)
	}
	s.idSize += int64(len(s.ids))
	s.ids = s.ids[:0]
	return nil
}

// replaceFile gives path the contents data, whole or not at all.
func replaceFile(fsys FS, path string, data []byte) error {
	tmp := path + ".tmp"
	f, err := fsys.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, filePerm)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, 0)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := fsys.Rename(tmp, path); err != nil {
		return err
	}
	return fsys.SyncDir(filepath.Dir(path))
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
