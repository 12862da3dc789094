package eventlog

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// ErrClosed says that the log takes no more records.
var ErrClosed = errors.New("the event log is closed")

// ErrStalled says that a write has been outstanding for longer than
// Options.StallAfter. Unless it is ErrNotQueued too, whether the batch is
// stored is open.
var ErrStalled = errors.New("the disk does not answer")

// ErrNotQueued says that the batch was not even taken in: it is not stored, and
// remains the caller's.
var ErrNotQueued = fmt.Errorf("%w; nothing was taken in", ErrStalled)

// WriteError says that a batch was refused because the disk refused it; none
// of its records is stored.
type WriteError struct {
	Err error
	// Full: the disk has no room; anything else is a fault of the disk.
	Full bool
}

func (e *WriteError) Error() string { return "writing the event log: " + e.Err.Error() }

func (e *WriteError) Unwrap() error { return e.Err }

// Entry is one record to append. The log does not keep its slices.
type Entry struct {
	VM      string // the sender: a valid VM name, or "host"
	Topic   []byte // of the topics' characters
	ID      []byte // 1 to 128 bytes of UTF-8; nil: none
	Reply   []byte // a topic; nil: none
	Payload []byte // one compact JSON value of valid UTF-8; nil: null

	// Seq is set by the log: the record's number, or where Duplicate the number
	// of the first record with this VM and ID. It counts only if Err is nil.
	Seq       uint64
	Duplicate bool
	Err       error // *WriteError
}

// Batch is a list of entries of one publisher that are committed together and
// in order. It may be used again once Append has returned anything but
// [ErrStalled]; then it, and all that it points to, belongs to the log.
type Batch struct {
	Entries []Entry
	// done has room for one token, so that the committer never waits.
	done chan struct{}
	// tables are those of the ids in Entries, while the log has the batch.
	tables []*idTable
}

// Done is closed by nobody: it gives one token when the log is done with a batch
// for which Append gave ErrStalled. Then its entries tell what became of it.
// For no batch at all it never does.
func (b *Batch) Done() <-chan struct{} {
	if b == nil {
		return nil
	}
	return b.done
}

// Options say how a log is kept.
type Options struct {
	Dir         string
	FS          FS            // nil: OS
	SegmentSize int64         // bytes; a longer record gets a segment of its own
	Retention   int64         // bytes kept; 0: all
	MaxAge      time.Duration // of a segment's last record; 0: for ever
	// SyncEvery is 0 to sync before each commit, positive to sync that often,
	// negative to leave it to the kernel.
	SyncEvery time.Duration
	// Journal is the file through which small commits are synced, where SyncEvery is 0,
	// in a directory that is there; "": each commit syncs the segment.
	Journal string
	// Boot names this run of the kernel, in 32 hex digits; "": as the kernel says.
	Boot       string
	StallAfter time.Duration // 0: 5 s
	// Recent is about how many bytes of records are kept in memory for readers; 0: 8 MiB.
	Recent int
	// PerVM, if not nil, keeps a stream a VM and the ids that make retries safe.
	PerVM *PerVMOptions

	// OnCommit is called by whoever commits after each commit, in order, when the
	// publishers have been released. It must be quick and must not call Append; the
	// Commit is valid until it returns.
	OnCommit func(Commit)
	// OnState is called when the log becomes degraded or recovers, from one
	// goroutine, with how the log is by then; a fault that is over is told first.
	OnState func(State)
	// OnError is told of what went wrong without anything being refused.
	OnError func(error)
	// OnCut is called when an unfinished tail has been cut off that Open had no room
	// to keep aside. Until then no record is taken.
	OnCut func(Cut)
	// OnDamage is called, by whoever reads, for each of the first 256 damaged places that
	// readers come upon, once; [Verify] finds all of them.
	OnDamage func(Damage)

	room journalRoom // of the journal; zero: wholeJournal
}

// State tells how the log is.
type State struct {
	// Degraded is the [Cause] of what is wrong; empty: all is well.
	Degraded string
	Err      error
}

// Log is an event log that is open for writing. All methods may be called by
// anybody at any time.
type Log struct {
	opts   Options
	stream stream
	recent recent

	// queue holds batches on their way to the committer, each of at most a
	// session's read buffer: enough that the committer always finds all that
	// arrived during a sync, and a bound on memory when the disk is slow.
	queue chan *Batch
	// queued counts those that are in it or on their way there, and those that the
	// committer has taken from it and not begun with: it goes down under turn.
	queued atomic.Int64

	committed atomic.Uint64 // newest record that readers may see
	durable   atomic.Uint64 // newest record that would survive a power cut
	writing   atomic.Int64  // since when (ns of startedAt) somebody has been in a write; 0: nobody is
	startedAt time.Time
	gate      atomic.Pointer[stallGate]
	stall     *time.Timer
	stallMu   sync.Mutex // held where writing and gate change together
	stuck     func()     // with stallMu: to be called where this write stalls; nil: nothing is
	watched   bool       // with stallMu: the timer is set
	state     atomic.Pointer[State]
	fault     atomic.Pointer[State] // the last one that is still to be reported, over or not
	changed   chan struct{}         // room for one token: the state is to be reported
	reported  chan struct{}         // closed when the reporting goroutine has ended
	freed     chan struct{}         // closed when the freeing goroutine has

	quit     chan struct{} // closed by Close
	quitOnce sync.Once
	done     chan struct{} // closed when the committer has ended
	closeErr error         // valid once done is closed

	perVM    *perVM
	released atomic.Uint64 // see Release
	around   chan struct{} // room for one token: more may be expired than before
	turn     chan struct{} // room for the one token: whoever put it there may commit
	c        committer
}

// Open opens or creates the log in opts.Dir and recovers what a crash left.
// Only one process may have a log open.
func Open(opts Options) (*Log, *Recovery, error) {
	l, rec, err := open(opts)
	if err != nil {
		return nil, nil, err
	}
	l.stream.freeing = make(chan File, maxFreeing)
	go l.free()
	go l.run()
	go l.reportState()
	if l.perVM != nil {
		go l.perVM.run()
	}
	return l, rec, nil
}

// open is Open without the goroutines.
func open(opts Options) (*Log, *Recovery, error) {
	if opts.FS == nil {
		opts.FS = OS
	}
	if opts.StallAfter == 0 {
		opts.StallAfter = 5 * time.Second
	}
	if opts.Recent == 0 {
		opts.Recent = 8 << 20
	}
	if opts.OnDamage != nil {
		opts.OnDamage = tellOnce(opts.OnDamage)
	}
	if err := MakeDir(opts.FS, opts.Dir); err != nil {
		return nil, nil, fmt.Errorf("creating the log's directory: %w", err)
	}
	if opts.room == (journalRoom{}) && opts.Journal != "" {
		opts.room = wholeJournal
	}
	l := &Log{
		opts:      opts,
		stream:    stream{fs: opts.FS, dir: opts.Dir},
		recent:    newRecent(opts.Recent),
		queue:     make(chan *Batch, 1024),
		startedAt: time.Now(),
		quit:      make(chan struct{}),
		done:      make(chan struct{}),
		changed:   make(chan struct{}, 1),
		reported:  make(chan struct{}),
		freed:     make(chan struct{}),
		around:    make(chan struct{}, 1),
		turn:      make(chan struct{}, 1),
	}
	l.c.journal = journal{fs: opts.FS, path: opts.Journal, boot: bootName(opts.Boot), room: opts.room, lazy: opts.SyncEvery != 0}
	l.c.syncTimer, l.c.retryTimer, l.c.expireTimer = stoppedTimer(), stoppedTimer(), stoppedTimer()
	l.state.Store(&State{})
	l.gate.Store(&stallGate{stalled: make(chan struct{})})
	l.stall = time.AfterFunc(time.Hour, l.stalled)
	l.stall.Stop()
	var saved savedPosition
	if opts.PerVM != nil {
		var err error
		if saved, err = opts.PerVM.loadPosition(opts.FS); err != nil {
			return nil, nil, fmt.Errorf("opening the VMs' streams: %w", err)
		}
	}
	rec, err := l.recover(saved.durable())
	if err != nil {
		l.c.journal.close()
		return nil, nil, fmt.Errorf("opening the event log in %s: %w", opts.Dir, err)
	}
	if opts.PerVM != nil {
		if l.perVM, err = openPerVM(l, *opts.PerVM, saved); err != nil {
			l.c.journal.close()
			return nil, nil, fmt.Errorf("opening the VMs' streams: %w", errors.Join(err, l.c.closeFile()))
		}
		if late := l.perVM.late(); late != nil {
			_ = l.fail(late)
		}
	}
	return l, rec, nil
}

// Append commits b and returns once its records would survive a power cut (or,
// with a lazy SyncEvery, are written). Each entry then has its Seq or its Err.
// The error is ErrStalled, ErrClosed or ctx's; after the latter two nothing of
// b is stored.
func (l *Log) Append(ctx context.Context, b *Batch) error {
	gate := l.gate.Load()
	if err := l.enqueue(ctx, b, gate); err != nil {
		return err
	}
	return l.await(b, gate)
}

// AppendHere is Append by the caller's own goroutine, where nobody else commits just
// then: a wake-up each for the committer and the caller is a fifth of the CPU of a record
// that comes alone. Where the disk keeps the caller for longer than
// Options.StallAfter, stuck is called once, by another goroutine, which must not wait:
// it is for the caller to be told of ErrStalled so, since it cannot return. led tells
// whether it was done here; then [Options.OnCommit] has been called for it, too.
func (l *Log) AppendHere(ctx context.Context, b *Batch, stuck func()) (led bool, err error) {
	gate := l.gate.Load()
	if err := l.admit(ctx, b, gate); err != nil {
		return false, err
	}
	select {
	case l.turn <- struct{}{}:
		// Not before what waits: it may be of the same VM, left to the log where the
		// disk stalled or by an older session.
		if l.queued.Load() > 0 {
			<-l.turn
			break
		}
		l.c.led = true
		l.beginWrite(stuck)
		l.commit(b)
		l.endWrite()
		l.c.led = false
		<-l.turn
		<-b.done
		return true, nil
	default:
	}
	if err := l.offer(ctx, b, gate); err != nil {
		return false, err
	}
	return false, l.await(b, gate)
}

// await returns once the committer is done with b.
func (l *Log) await(b *Batch, gate *stallGate) error {
	select {
	case <-b.done:
		return nil
	case <-gate.stalled:
		return ErrStalled
	case <-l.done:
		select {
		case <-b.done:
			return nil
		default:
			return ErrClosed // queued behind the committer's last look
		}
	}
}

// enqueue hands b to the committer.
func (l *Log) enqueue(ctx context.Context, b *Batch, gate *stallGate) error {
	if err := l.admit(ctx, b, gate); err != nil {
		return err
	}
	return l.offer(ctx, b, gate)
}

// admit makes b ready to be committed.
func (l *Log) admit(ctx context.Context, b *Batch, gate *stallGate) error {
	if b.done == nil {
		b.done = make(chan struct{}, 1)
	}
	if gate.shut() {
		return ErrNotQueued
	}
	if l.perVM == nil {
		return nil
	}
	return l.perVM.ids.acquire(ctx, b)
}

// offer queues what was admitted.
func (l *Log) offer(ctx context.Context, b *Batch, gate *stallGate) (err error) {
	l.queued.Add(1)
	select {
	case l.queue <- b:
		return nil
	case <-gate.stalled:
		err = ErrNotQueued
	case <-l.quit:
		err = ErrClosed
	case <-ctx.Done():
		err = ctx.Err()
	}
	l.queued.Add(-1)
	if l.perVM != nil {
		l.perVM.ids.release(b)
	}
	return err
}

// Committed gives the number of the newest record that readers may see.
func (l *Log) Committed() uint64 { return l.committed.Load() }

// Oldest gives the first number of the oldest segment kept.
func (l *Log) Oldest() uint64 { return l.stream.oldest() }

// NewestIn gives the first number of the oldest of those newest segments that take at most
// so many bytes together; the newest is always one of them.
func (l *Log) NewestIn(bytes int64) uint64 { return l.stream.newestIn(bytes) }

// Lazy tells whether an acknowledged record may still be lost to a power cut.
func (l *Log) Lazy() bool { return l.opts.SyncEvery != 0 }

// Writing tells for how long somebody has been at work on the disk; 0
// while nobody is.
func (l *Log) Writing() time.Duration {
	since := l.writing.Load()
	if since == 0 {
		return 0
	}
	return time.Since(l.startedAt) - time.Duration(since)
}

// Ping returns once the committer has answered: at once while somebody is at work on
// the disk, which nothing can hurry, else after its next round. For the
// watchdog.
func (l *Log) Ping(ctx context.Context) error {
	if l.writing.Load() != 0 {
		return nil
	}
	b, gate := &Batch{}, l.gate.Load()
	err := l.enqueue(ctx, b, gate)
	if errors.Is(err, ErrStalled) {
		return nil
	}
	if err != nil {
		return err
	}
	select {
	case <-b.done:
		return nil
	case <-gate.stalled:
		return nil
	case <-l.done:
		return ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Close commits what is queued, syncs it and ends the log's goroutines.
func (l *Log) Close() error {
	l.quitOnce.Do(func() { close(l.quit) })
	<-l.done
	<-l.reported
	return l.closeErr
}
