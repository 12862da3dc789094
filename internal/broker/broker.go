// Package broker is the bus on the host: it owns the event log, the presence
// table and the sessions, and moves messages between them.
package broker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/identity"
	"github.com/castrabus/castra/internal/logging"
	"github.com/castrabus/castra/internal/presence"
	"github.com/castrabus/castra/internal/session"
	"github.com/castrabus/castra/internal/wire"
)

// Options say how a broker is set up. Those in Settings may be changed later.
type Options struct {
	Version  string
	StateDir string
	LogDir   string
	Registry *identity.Registry
	Log      *logrus.Logger
	FS       eventlog.FS // what the event log is kept on; nil: the machine's

	SyncName      string        // as configured, for status
	SyncEvery     time.Duration // see eventlog.Options
	Boot          string        // the same
	StallAfter    time.Duration // the same
	SegmentSize   int64
	HostRetention int64
	VMRetention   int64
	RetentionAge  time.Duration
	MaxHandshakes int      // unfinished at once; beyond it the oldest is closed
	UnsentBytes   int      // what the kernel may hold of what a session was sent; 0: as it likes
	Inherit       *os.File // what the castrad before handed over; nil: nothing
	Settings
}

// Settings may be changed while the broker runs; sessions that began before
// keep the timeouts they began with.
type Settings struct {
	AcceptUnknown    bool
	GuestTopics      []wire.Pattern
	HandshakeTimeout time.Duration
	SessionTimeout   time.Duration
	ReachableWithin  time.Duration
	MaxSessions      int
	MaxVMs           int
	MaxSubscriptions int
	Rate             presence.Rate // of a guest's publishes
	HandshakeRate    presence.Rate // of a VM's handshakes that are granted
}

// vmSegments is how many segments a VM's retention is cut into (contract 5).
const vmSegments = 8

// leastVMSegment is an eighth of the least vm_retention_size that there may be.
const leastVMSegment = 8 << 10

// Broker is a running bus. Its methods may be called by anybody at any time.
type Broker struct {
	opts    Options
	log     *logrus.Logger
	events  *eventlog.Log
	table   *presence.Table
	records *recorder
	cursors *cursors
	began   time.Time

	files    fileBudget
	settings atomic.Pointer[Settings]
	sessions atomic.Pointer[session.Options]
	health   health

	topics   index
	tails    waiters // those that follow the log
	acks     waiters // those that wait for a guest's ack
	watchers watchers

	handshakes handshakes
	parking    parking
	listeners  atomic.Pointer[[]*listener] // replaced, never changed in place
	acked      ackMemory
	leftBehind atomic.Int64 // names on disk that nobody registered, when it was last looked
	strangers  presence.Bucket
	early      presence.Bucket
	room       chan struct{} // of the lobbies; as many tokens as seats
	refusals   presence.Bucket
	limited    limitCounts
	shares     shares
	words      *lastWords
	left       []presence.Change // what the castrad before had no time or no room to say
	scans      chan struct{}     // see session.Options.Scans
	idle       *session.Idle
	couriers   *session.Couriers

	// admission is held for reading while a guest is let in by name and key, and for
	// writing while those are ended whose name or key has just changed: who was let in
	// by the old one has his session by then. Nothing is asked of a disk meanwhile, or
	// one that does not answer would keep all guests out.
	admission sync.RWMutex
	leaving   *departure // whose files are being removed, with admission; nil: nobody's

	// The broker ends in two steps: first the guests, their connections and the
	// tails; then the goroutines that write down what that changed.
	ctx     context.Context
	cancel  context.CancelFunc
	guests  sync.WaitGroup
	ctx2    context.Context
	cancel2 context.CancelFunc
	work    sync.WaitGroup
}

// Open recovers the log and makes a broker that serves nobody yet.
func Open(opts Options) (*Broker, error) {
	b := &Broker{opts: opts, log: opts.Log, began: time.Now(), scans: make(chan struct{}, maxScans), couriers: session.NewCouriers()}
	settings := opts.Settings
	b.settings.Store(&settings)
	b.files = openFiles()
	b.table = presence.New(b.tableOptions(settings))
	b.topics.init()
	b.handshakes.max = b.files.handshakes(opts.MaxHandshakes)
	b.room = make(chan struct{}, b.files.lobby())
	b.health.changed = make(chan struct{}, 1)
	var err error
	if b.records, err = openRecorder(filepath.Join(opts.StateDir, "handshakes"), b.table, opts.Log); err != nil {
		return nil, err
	}
	if b.cursors, err = openCursors(filepath.Join(opts.StateDir, "cursors")); err != nil {
		return nil, err
	}
	if err := b.openLog(); err != nil {
		return nil, err
	}
	if b.words, err = recallWords(filepath.Join(opts.StateDir, "reachable.json"), b.events, recallBytes); err != nil {
		logging.PresenceUnknown.On(b.log).WithError(err).Warn("who was reachable when castrad ended may not be wholly known")
	}
	b.records.words = b.words
	for _, e := range opts.Registry.List() {
		b.table.Know(e.Name)
	}
	if most := b.files.sessions(settings.MaxSessions); most < settings.MaxSessions {
		logging.LimitReached.On(b.log).WithField("limit", limitOpenFiles).
			Warnf("castrad may have %d open files: no more than %d of limits.max_sessions can be connected; raise LimitNOFILE= of castrad.service", b.files.total, most)
	}
	if b.idle, err = session.NewIdle(); err != nil {
		return nil, errors.Join(err, b.events.Close())
	}
	b.configureSessions(&settings)
	b.ctx, b.cancel = context.WithCancel(context.Background())
	b.ctx2, b.cancel2 = context.WithCancel(context.Background())
	inherited := b.inherit()
	b.left = b.table.CatchUp(b.words.reachable) // nobody says anything yet
	if !inherited {
		b.records.past = &past{recall: b.recall, read: make(map[string]struct{})}
		b.work.Go(b.remember)
	}
	recording, stopRecording := context.WithCancel(context.Background())
	b.work.Go(func() { b.records.run(recording) })
	b.work.Go(func() { b.cursors.run(b.ctx2, func(err error) { b.note(partCursors, err) }) })
	b.work.Go(b.sweep)
	b.work.Go(b.watchIdle)
	b.work.Go(func() { b.couriers.Run(b.ctx2) })
	b.work.Go(b.watchStrangers)
	b.work.Go(func() {
		defer stopRecording()
		b.announce()
	})
	return b, nil
}

// maxScans is how many subscribers search the log backwards at once: two keep
// a disk busy, and leave the processors to the others.
const maxScans = 2

// newVMs is how many more names than may be remembered can appear at once where
// unknown ones are accepted, and how many a second after that: each announces
// itself to the host and leaves a stream behind.
const (
	newVMsBurst = 1000
	newVMsRate  = 10
)

func (b *Broker) tableOptions(s Settings) presence.Options {
	return presence.Options{
		ReachableWithin: s.ReachableWithin, SessionTimeout: s.SessionTimeout, MaxVMs: s.MaxVMs,
		NewVMs:      presence.Rate{Records: newVMsRate, Burst: float64(s.MaxVMs + newVMsBurst), Bytes: 1},
		MaxSessions: b.files.sessions(s.MaxSessions),
	}
}

func (b *Broker) openLog() error {
	o := b.opts
	log, rec, err := eventlog.Open(eventlog.Options{
		FS:  o.FS,
		Dir: filepath.Join(o.LogDir, "bus", "host"), SegmentSize: o.SegmentSize,
		Retention: o.HostRetention, MaxAge: o.RetentionAge, SyncEvery: o.SyncEvery, StallAfter: o.StallAfter,
		Journal: filepath.Join(o.LogDir, "bus", "journal"), Boot: o.Boot,
		PerVM: &eventlog.PerVMOptions{
			Dir:          filepath.Join(o.LogDir, "bus", "vm"),
			IDDir:        filepath.Join(o.StateDir, "ids"),
			PositionFile: filepath.Join(o.StateDir, "vm-streams.json"),
			SegmentSize:  max(leastVMSegment, o.VMRetention/vmSegments), Retention: o.VMRetention, MaxAge: o.RetentionAge,
			Sender: bus.HostVM, Owner: wire.TopicVM[[]byte], Share: b.share,
			OnOversize: func(vm string) {
				b.bite(limitVMBytes, vm, "", session.TroubleQueueFull, session.ActionThrottle, "the stream of this VM is full, its oldest records went")
			},
			OnError: func(err error) { b.note(partVMStreams, err) },
			OnAside: func(file, name string) { noteAside(b.log, file, name) },
		},
		OnCommit: b.committed,
		OnState:  func(s eventlog.State) { b.note(partLog, s.Err) },
		OnError:  func(err error) { logging.ExpiryFailed.On(b.log).WithError(err).Warn("the event log cannot tidy up") },
		OnCut:    b.wasCut,
		OnDamage: func(d eventlog.Damage) {
			logging.RecordDamaged.On(b.log).WithFields(logrus.Fields{"file": d.File, "offset": d.Offset}).
				Error("a damaged record is passed over; its readers are told of a gap")
		},
	})
	if err != nil {
		return err
	}
	b.events = log
	for _, d := range rec.Damaged {
		logging.RecordDamaged.On(b.log).WithFields(logrus.Fields{"file": d.File, "offset": d.Offset}).Error("the event log has a damaged record")
	}
	if rec.Cut != nil {
		b.wasCut(*rec.Cut)
	}
	if rec.Journal != nil {
		logging.RecordDamaged.On(b.log).WithError(rec.Journal).Error("the event log's journal is no use; if the power has failed, records that were acknowledged last may be missing")
	}
	return nil
}

func (b *Broker) wasCut(c eventlog.Cut) {
	logging.WriteCutOff.On(b.log).WithFields(logrus.Fields{"file": c.File, "offset": c.Offset, "bytes": c.Bytes, "aside": c.Aside}).
		Warn("an unfinished write was cut off the event log; nothing in it had been acknowledged")
}

// Configure changes the settings of a running broker and reads the registry
// anew; it gives the files that cannot be used. Sessions whose name is gone, or has
// another key or one at last, end.
func (b *Broker) Configure(s Settings) ([]identity.Problem, error) {
	b.settings.Store(&s)
	b.configureSessions(&s)
	b.table.Configure(b.tableOptions(s))
	before := b.opts.Registry.List()
	problems, err := b.opts.Registry.Reload()
	known := make(map[string]bool, len(before))
	b.admission.Lock()
	for _, e := range before {
		known[e.Name] = true
		now, ok := b.opts.Registry.Lookup(e.Name)
		if !ok {
			b.table.Forget(e.Name)
		}
		if !ok || !bytes.Equal(now.Key, e.Key) {
			b.endSession(e.Name, "the VM's registration has changed")
		}
	}
	for _, e := range b.opts.Registry.List() {
		b.table.Know(e.Name)
		if !known[e.Name] && e.Key != nil { // who was let in as a stranger does not have it
			b.endSession(e.Name, "the VM has a key now")
		}
	}
	b.admission.Unlock()
	return problems, err
}

// Serve accepts guests on ln, which it takes over, until Close. One goroutine calls it.
func (b *Broker) Serve(ln net.Listener) {
	if tcp, ok := ln.(*net.TCPListener); ok {
		prepare(tcp, b.opts.UnsentBytes)
		if own, err := newTCPListener(tcp); err == nil {
			ln = own
		} // else there was no descriptor left for it, and this one will do
	}
	l := newListener(ln)
	all := append(slices.Clone(b.listening()), l)
	b.listeners.Store(&all)
	b.guests.Go(func() { b.accept(l) })
}

func (b *Broker) listening() []*listener {
	if p := b.listeners.Load(); p != nil {
		return *p
	}
	return nil
}

// Ping returns once every accept loop and the committer have answered, for the
// watchdog.
func (b *Broker) Ping(ctx context.Context) error {
	for _, l := range b.listening() {
		if err := l.ping(ctx); err != nil {
			return fmt.Errorf("accept loop of %s: %w", l.Addr(), err)
		}
	}
	if err := b.events.Ping(ctx); err != nil {
		return fmt.Errorf("committer: %w", err)
	}
	return nil
}

// ending is why sessions end that castrad ends.
const ending = "castrad is ending"

// Close ends the sessions, commits what they had sent, and closes the log.
func (b *Broker) Close() error {
	var errs []error
	for _, l := range b.listening() {
		if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	b.cancel()
	b.handshakes.end()
	for _, s := range b.table.Sessions() {
		if s, ok := s.(*session.Session); ok {
			s.End(session.TroubleShutdown, ending)
		}
	}
	b.guests.Wait()
	b.cancel2()
	b.work.Wait()
	errs = append(errs, b.events.Close())
	return errors.Join(errs...)
}

// sweep looks after the deadlines of presence.
func (b *Broker) sweep() {
	stoodStill := false
	for {
		interval := b.table.Interval()
		due := time.Now().Add(interval)
		t := time.NewTimer(interval)
		select {
		case <-t.C:
			// Where castrad itself was stopped, or its machine, who has spoken meanwhile is
			// heard first. Once: on a machine that is always late silence has an end, too.
			if late := time.Since(due) > interval; late && !stoodStill {
				stoodStill = true
				continue
			}
			stoodStill = false
		case <-b.table.Configured:
			t.Stop()
		case <-b.ctx2.Done():
			t.Stop()
			return
		}
		b.table.Sweep()
		b.records.refresh()
		b.tellWithheld()
	}
}

// watchIdle serves the sessions that have nothing to do.
func (b *Broker) watchIdle() {
	if err := b.idle.Run(b.ctx2); err != nil {
		logging.Failed.On(b.log).WithError(err).Error("idle guests are not heard any more: systemctl restart castrad")
	}
}

// sessionOptions gives the options of the sessions that begin now. They share them.
func (b *Broker) sessionOptions() *session.Options { return b.sessions.Load() }

func (b *Broker) configureSessions(s *Settings) {
	b.sessions.Store(&session.Options{
		HandshakeTimeout: s.HandshakeTimeout, WriteTimeout: s.SessionTimeout,
		MaxSubscriptions: s.MaxSubscriptions, Scans: b.scans, Lazy: b.events.Lazy(), Log: b.events, Idle: b.idle, Couriers: b.couriers,
	})
}
