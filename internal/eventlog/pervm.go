package eventlog

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// PerVMOptions say how the VMs' own streams and ids are kept.
type PerVMOptions struct {
	Dir          string // a directory a VM, named after it, is made in it
	IDDir        string // a file of ids a VM
	PositionFile string // how far the host stream is copied, durably
	SegmentSize  int64
	Retention    int64 // bytes a VM; 0: all
	MaxAge       time.Duration
	// Sender is the name under which the host publishes; it has no stream.
	Sender string
	// Owner gives the VM that a topic belongs to.
	Owner func(topic []byte) (vm []byte, ok bool)
	// OnError is called when copying fails and when it goes on (nil).
	OnError func(error)
	// OnAside is called when something that is no file was renamed, because a file
	// belongs in its place.
	OnAside func(file, name string)
}

const (
	// maxBuffered is how much is gathered in memory before the files are
	// written; also the most that a VM's file is written with at once.
	maxBuffered = 1 << 20

	// The copied position is made durable after so many bytes, or so long
	// after the first copy since: what a start has to copy again at most.
	checkpointBytes    = 64 << 20
	checkpointInterval = 30 * time.Second
)

// perVM copies each record of the host stream to the streams of its sender and
// of the VM whose topic it is on, behind the commit: an acknowledged record is
// in the host stream, from which this is repaired after a crash. One goroutine
// does it; the exported part is for everybody.
type perVM struct {
	log  *Log
	opts PerVMOptions
	ids  *idIndex // the committer's

	position atomic.Uint64 // records up to here are in the files
	wake     chan struct{} // room for one token: more wake-ups would say the same
	quit     chan struct{}
	done     chan struct{}

	mu      sync.Mutex
	streams map[string]*vmStream

	open     openFiles
	filled   []*vmStream // with something in their buffers
	buffered int
	since    int64 // bytes copied since the last checkpoint
	unsynced map[*vmStream]struct{}
	failed   bool
}

func openPerVM(l *Log, opts PerVMOptions) (*perVM, error) {
	p := &perVM{
		log: l, opts: opts,
		wake: make(chan struct{}, 1), quit: make(chan struct{}), done: make(chan struct{}),
		streams: make(map[string]*vmStream), unsynced: make(map[*vmStream]struct{}),
	}
	p.ids = newIDIndex(l.opts.FS, opts.IDDir, p.position.Load)
	if opts.OnAside != nil {
		p.ids.aside = opts.OnAside
	}
	for _, dir := range []string{opts.Dir, opts.IDDir} {
		if err := l.opts.FS.MkdirAll(dir, dirPerm); err != nil {
			return nil, err
		}
	}
	position, err := p.loadPosition()
	if err != nil {
		return nil, err
	}
	p.position.Store(min(position, l.Committed()))
	if err := p.copyNew(); err != nil { // the ids must be whole before the first publish
		return nil, err
	}
	go p.run()
	return p, nil
}

// notify tells that something was committed.
func (p *perVM) notify() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

func (p *perVM) run() {
	defer close(p.done)
	checkpoint := stoppedTimer()
	retry := stoppedTimer()
	armed := false
	for {
		select {
		case <-p.wake:
		case <-retry.C:
		case <-checkpoint.C:
			armed = false
			p.note(p.checkpoint(), retry)
			continue
		case <-p.quit:
			return
		}
		p.note(p.copyNew(), retry)
		if p.since > checkpointBytes {
			p.note(p.checkpoint(), retry)
		}
		if p.since > 0 && !armed {
			checkpoint.Reset(checkpointInterval)
			armed = true
		}
	}
}

// note reports a change between working and failing and arranges another try.
func (p *perVM) note(err error, retry *time.Timer) {
	if err != nil {
		retry.Reset(retryInterval)
	}
	if failed := err != nil; failed != p.failed || failed {
		changed := failed != p.failed
		p.failed = failed
		if changed && p.opts.OnError != nil {
			p.opts.OnError(err)
		}
	}
}

// close copies what is left and makes it durable. The committer has ended.
func (p *perVM) close() error {
	close(p.quit)
	<-p.done
	err := p.copyNew()
	if err == nil {
		err = p.checkpoint()
	}
	p.open.closeAll()
	return err
}

// copyNew copies everything committed since position. After an error the files
// are looked at anew, and copying begins again at position.
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
			if err := p.put(&rec); err != nil {
				return err
			}
		}
		if !ok || p.buffered >= maxBuffered {
			if err := p.flush(); err != nil {
				return err
			}
			p.position.Store(r.Position() - 1)
		}
		if !ok {
			return nil
		}
	}
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

// append buffers rec for s, unless a run before a crash already wrote it.
func (p *perVM) append(s *vmStream, rec *Record) error {
	if rec.Seq <= s.last {
		return nil
	}
	n := len(rec.Line) + 1
	used := int64(len(s.buf))
	if !s.full { // otherwise what is buffered begins a segment
		used += s.size
	}
	if used > 0 && used+int64(n) > p.opts.SegmentSize {
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
	s.last = rec.Seq
	p.buffered += n
	p.since += int64(n)
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
		p.unsynced[s] = struct{}{}
	}
	p.filled, p.buffered = p.filled[:0], 0
	return nil
}

// forget drops what is buffered and known of the files, after an error.
func (p *perVM) forget() {
	p.open.closeAll()
	p.mu.Lock()
	clear(p.streams)
	p.mu.Unlock()
	clear(p.unsynced)
	p.filled, p.buffered = nil, 0
}

// checkpoint makes what was copied durable, and then the position.
func (p *perVM) checkpoint() error {
	for s := range p.unsynced {
		if err := s.sync(&p.open); err != nil {
			p.forget()
			return err
		}
		delete(p.unsynced, s)
	}
	if err := p.savePosition(); err != nil {
		return fmt.Errorf("saving how far the VMs' streams are: %w", err)
	}
	p.since = 0
	return nil
}

type savedPosition struct {
	Seq uint64 `json:"seq"`
}

func (p *perVM) loadPosition() (uint64, error) {
	f, err := p.log.opts.FS.OpenFile(p.opts.PositionFile, os.O_RDONLY, 0)
	if misplaced(err) {
		var name string
		if name, err = setAside(p.log.opts.FS, p.opts.PositionFile); err == nil {
			p.ids.aside(p.opts.PositionFile, name)
			return 0, nil
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }() // opened for reading
	var b [64]byte
	n, _ := f.ReadAt(b[:], 0)
	var pos savedPosition
	if json.Unmarshal(b[:n], &pos) != nil {
		return 0, nil // copy everything once more: slow, and never wrong
	}
	return pos.Seq, nil
}

func (p *perVM) savePosition() error {
	b, err := json.Marshal(savedPosition{p.position.Load()})
	if err != nil {
		return err
	}
	return replaceFile(p.log.opts.FS, p.opts.PositionFile, append(b, '\n'))
}
