package eventlog

import (
	"errors"
	"path/filepath"
	"strings"
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
	// Share gives fewer bytes for a VM that is not to have all of Retention; 0: it
	// is. The segments of its stream are then as much smaller. It may be nil.
	Share  func(vm string) int64
	MaxAge time.Duration
	// Sender is the name under which the host publishes; it has no stream.
	Sender string
	// Owner gives the VM that a topic belongs to.
	Owner func(topic []byte) (vm []byte, ok bool)
	// OnOversize is called when the oldest records of a VM's stream went because it had
	// too many bytes. It must not wait. It may be nil.
	OnOversize func(vm string)
	// OnError is called when copying, or a checkpoint of it, fails and when both go well
	// again (nil).
	OnError func(error)
	// OnAside is called when something was renamed because a file belongs in its place,
	// and it is none, or a directory, or because it could not be used for long.
	OnAside func(file, name string)

	idWindow int // 0: idWindow
	together int // 0: syncTogether
}

const (
	// maxBuffered is how much is gathered in memory before the files are
	// written; also the most that a VM's file is written with at once.
	maxBuffered = 1 << 20

	// leastSegment is what a share leaves of a segment at least.
	leastSegment = 64 << 10

	// The copied position is made durable after so many bytes, or so long
	// after the first copy since: what a start has to copy again at most.
	checkpointBytes    = 128 << 20
	checkpointInterval = 30 * time.Second

	// syncTogether is from how many VMs on a checkpoint syncs the whole file system:
	// each for itself takes milliseconds. For fewer, others would be kept busy with
	// what they have not written yet.
	syncTogether = 64

	// gatherTime is how long copying waits after a commit for more: a goroutine woken
	// and a write for each record would cost as much as its commit.
	gatherTime = 5 * time.Millisecond
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
	furthest atomic.Uint64 // the largest that position has been
	saved    atomic.Uint64 // the position on disk is at least this
	resets   atomic.Uint64 // how often position has gone back, or streams was emptied
	wanted   atomic.Bool   // a checkpoint, soon
	wake     chan struct{} // room for one token: more wake-ups would say the same
	quit     chan struct{}
	done     chan struct{}
	// forgettings is unbuffered: who has sent one is answered.
	forgettings chan forgetting

	unbegun atomic.Pointer[error] // why begin has not succeeded yet; nil: it has

	mu      sync.Mutex
	streams map[string]*vmStream

	open     openFiles
	filled   []*vmStream // with something in their buffers
	buffered int
	since    int64           // bytes copied since the last checkpoint
	unsynced map[string]bool // VMs whose files were written since the last checkpoint
	newDirs  bool            // there are VMs' directories whose names are not synced
	newIDs   bool            // the same of files of ids
	doubted  bool            // the files may hold what the host stream has lost
	synced   uint64          // records up to here are durably in the files; may be beyond saved
	lost     bool            // a sync has failed since then
	unsaved  bool            // the last checkpoint has failed
	failed   bool            // it has, or copying

	bad      string // what of one VM's has kept the copies of all back; "": nothing has
	badSince time.Time
	passed   map[string]bool // what was set aside for that

	// The trees of opts.Dir and opts.IDDir, open since before anything was written in
	// them; nil where every file is synced by itself.
	streamTree, idTree Tree

	unswept []string  // VMs whose streams this round has still to look at
	quiet   time.Time // streams not known have not been written to since
}

func openPerVM(l *Log, opts PerVMOptions, saved savedPosition) (_ *perVM, err error) {
	if opts.together == 0 {
		opts.together = syncTogether
	}
	p := &perVM{
		log: l, opts: opts,
		wake: make(chan struct{}, 1), quit: make(chan struct{}), done: make(chan struct{}),
		forgettings: make(chan forgetting),
		streams:     make(map[string]*vmStream), unsynced: make(map[string]bool),
		quiet: l.startedAt, passed: make(map[string]bool),
	}
	p.ids = newIDIndex(l.opts.FS, opts.IDDir, l.opts.StallAfter, p.filesHold)
	p.ids.aside, p.ids.resets = opts.OnAside, p.resets.Load
	if opts.idWindow > 0 {
		p.ids.window = opts.idWindow
	}
	for _, dir := range []string{opts.Dir, opts.IDDir, filepath.Dir(opts.PositionFile)} {
		if err := MakeDir(l.opts.FS, dir); err != nil {
			return nil, err
		}
	}
	p.newDirs, p.newIDs = true, true // of a run that was killed
	defer func() {
		if err != nil {
			_ = closeTrees(p.streamTree, p.idTree)
		}
	}()
	if p.streamTree, err = l.opts.FS.OpenTree(opts.Dir); err != nil {
		return nil, err
	}
	if p.idTree, err = l.opts.FS.OpenTree(opts.IDDir); err != nil {
		return nil, err
	}
	// Where the position file is lost, what the host stream no longer has must
	// not be copied again, nor cut off for that.
	position := max(min(saved.Seq, l.Committed()), max(1, l.Oldest())-1)
	p.position.Store(position)
	p.saved.Store(position)
	p.synced = position
	p.furthest.Store(l.Committed()) // or ids might be looked up in files that are not whole yet
	// A lazy log may have come back with less than was copied, and so may a disk that
	// was restored.
	p.doubted = saved.Lazy || l.Lazy() || saved.Seq > l.Committed()
	_ = p.begin() // else it is tried again, and the log takes nothing before
	return p, nil
}

// begin makes the files whole, as a crash may not have left them.
func (p *perVM) begin() (err error) {
	defer func() {
		if err == nil {
			p.unbegun.Store(nil)
		} else {
			p.unbegun.Store(&err)
		}
	}()
	if p.doubted {
		if err := p.loadAll(); err != nil {
			return err
		}
		// Before anything has a number again that was lost; and a log that has become
		// lazy must be known to be.
		if err := p.checkpoint(); err != nil {
			return err
		}
		p.doubted = false
	}
	return p.copyNew() // the ids must be whole before the first publish
}

// late tells why the files are not whole yet; nil: they are.
func (p *perVM) late() error {
	if err := p.unbegun.Load(); err != nil {
		return *err
	}
	return nil
}

// goOn copies what is new, and what the start could not.
func (p *perVM) goOn() error {
	if p.late() != nil {
		return p.begin()
	}
	return p.copyNew()
}

// loadAll looks at every VM's files, so that nothing is left in them that the
// host stream does not have.
func (p *perVM) loadAll() error {
	for _, dir := range []string{p.opts.Dir, p.opts.IDDir} {
		entries, err := p.log.opts.FS.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, e := range entries {
			vm, ids := strings.CutSuffix(e.Name(), idSuffix)
			if ids == e.IsDir() || isAside(vm) {
				continue // nothing of ours
			}
			s, err := p.stream([]byte(vm))
			if err != nil {
				return err
			}
			// Also where nothing is cut off now: a start that was killed may have done it,
			// and a power cut take that back behind the position that is saved next.
			p.written(s)
		}
	}
	return nil
}

// hurry asks for a checkpoint.
func (p *perVM) hurry() {
	p.wanted.Store(true)
	p.notify()
}

// share is how many bytes of a VM's stream are kept; 0: all.
func (p *perVM) share(vm string) int64 {
	if p.opts.Share != nil && p.opts.Retention > 0 {
		if n := p.opts.Share(vm); n > 0 {
			return min(n, p.opts.Retention)
		}
	}
	return p.opts.Retention
}

func (p *perVM) retention(vm string) retention {
	r := retention{size: p.share(vm), age: p.opts.MaxAge, before: noNumber}
	if p.opts.OnOversize != nil {
		r.oversize = func() { p.opts.OnOversize(vm) }
	}
	return r
}

// segmentSize is how large a segment of a VM's stream gets.
func (p *perVM) segmentSize(vm string) int64 {
	share := p.share(vm)
	if share == p.opts.Retention {
		return p.opts.SegmentSize
	}
	return min(p.opts.SegmentSize, max(leastSegment, int64(float64(p.opts.SegmentSize)*float64(share)/float64(p.opts.Retention))))
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
	sweep := time.NewTimer(0)
	gather := stoppedTimer()
	armed := false
	if err := p.late(); err != nil {
		p.note(err, retry)
	}
	wake := p.wake // nil while gathering: nobody is to be woken meanwhile
	for {
		gathered := gather.C
		if p.failed { // a try looks at the files anew, and commits are not to hasten it
			gathered = nil
		}
		select {
		case <-wake:
			wake = nil
			gather.Reset(gatherTime)
			p.notify() // nothing of it is copied yet
			continue
		case <-gathered:
			select {
			case <-p.wake:
			default:
				wake = p.wake
				continue
			}
		case <-retry.C:
		case <-checkpoint.C:
			armed = false
			if !p.unsaved { // else the next try makes one, when all that was lost is copied again
				p.save(retry)
			}
			continue
		case <-sweep.C:
			next, err := p.sweep()
			p.log.note(err)
			sweep.Reset(next)
			continue
		case req := <-p.forgettings:
			req.done <- p.forgetVM(req.vm)
			continue
		case <-p.quit:
			return
		}
		err := p.goOn()
		if wake == nil { // who commits has nobody to wake while there is something each time
			gather.Reset(gatherTime)
		}
		if err != nil {
			p.note(err, retry)
			continue // a position saved before a start is done would be taken at its word
		}
		if (p.wanted.Swap(false) || p.unsaved || p.since > checkpointBytes) && !p.save(retry) {
			continue
		}
		p.note(nil, retry)
		if p.since > 0 && !armed {
			checkpoint.Reset(checkpointInterval)
			armed = true
		}
	}
}

// save makes a checkpoint and tells whether it went well, which does not say that copying
// does. What one that failed has lost is copied again at once, since no ids can be read
// before; but behind note, so that what begins anew in place of files set aside has it.
func (p *perVM) save(retry *time.Timer) bool {
	err := p.checkpoint()
	if err != nil {
		p.note(err, retry)
		_ = p.copyNew() // the next try tells
	}
	return err == nil
}

// note reports a change between working and failing and arranges another try.
func (p *perVM) note(err error, retry *time.Timer) {
	p.passOver(err)
	if err != nil {
		retry.Reset(retryInterval)
	}
	changed := p.failed != (err != nil)
	p.failed = err != nil
	if changed && p.opts.OnError != nil {
		p.opts.OnError(err)
	}
}

// stop ends the goroutine.
func (p *perVM) stop() {
	close(p.quit)
	<-p.done
}

// finish copies what is left and makes it durable. The committer and the
// goroutine have ended.
func (p *perVM) finish() error {
	err := p.goOn()
	if err == nil {
		err = p.checkpoint()
	}
	p.open.closeAll()
	return errors.Join(err, closeTrees(p.streamTree, p.idTree))
}
