// Package guest is the agent inside a virtual machine: it keeps a session with the
// host's broker, spools what is published until the host has acknowledged it, and
// serves the programs of this machine over a Unix socket and, through the interface
// that package dbusapi asks for, over D-Bus.
//
//	local client ─┐                        ┌─▶ session.write ──▶ host
//	D-Bus ────────┴─▶ outbox over a disk  ─┤
//	                                       └── session.read ◀── acks, deliveries
//	local client ◀── its own buffer ◀── table of subscriptions ◀──┘
//
// The session's reader never waits for a listener: each has a bounded buffer of its
// own. A client of the socket that falls behind is disconnected and may go on where
// it was; a tail is unsubscribed and subscribed again where it was, so that the
// host's log is the buffer.
package guest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/backoff"
	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/logging"
)

// CodeNotConnected refuses what cannot be had without the host just now.
const CodeNotConnected bus.Code = "not-connected"

const (
	// ackPatience is how long a publisher waits for the host's number before it is
	// told that its record is kept: less than the 25 s after which D-Bus callers
	// give up.
	ackPatience = 10 * time.Second
	// drainFor bounds how long a stopping agent tries to hand over what is kept.
	drainFor = 2 * time.Second
	// diskPatience bounds how long it then waits for its own disk.
	diskPatience = 5 * time.Second
)

// Options are what an Agent needs. Name, Address and Log must be set.
type Options struct {
	Name      string // a valid VM name
	Address   string // the host's, host:port
	Key       []byte // 32 bytes; nil: the VM has none
	Version   string
	Subscribe []string // topics that are always listened to; vm:self is the VM's own
	Socket    string   // path of the local bus; empty: none is served
	// Listener, if set, is the local bus's socket, and Socket is not looked at. The
	// agent closes it.
	Listener  *net.UnixListener
	SpoolDir  string // where what the host has not taken is kept; empty: in memory
	SpoolSize int64  // bytes
	Log       *logrus.Entry

	fs eventlog.FS // nil: the machine's

	// OnState is called from one goroutine, soon after anything changed that
	// Summary shows. It may be nil.
	OnState func()
}

// Agent is the bus as this machine sees it. It satisfies dbusapi.Bus.
type Agent struct {
	opts    Options
	id      identity
	started time.Time
	idBase  string // what generated ids begin with, random for each process
	ids     atomic.Uint64
	head    atomic.Uint64 // the newest record that came by

	outbox   *outbox
	memory   string // why the spool is in memory; empty: it is on disk
	subs     *table
	uplink   *uplink
	local    *server // nil: no socket is served
	watchers watchers
	stopping atomic.Bool
	ended    chan struct{} // closed when no session comes any more
	loss     lossLog
	always   []*subscription // Options.Subscribe; of whoever calls Reload
}

// New makes an agent; Run makes it work. It takes the socket, so that a program
// started next can connect.
func New(opts Options) (*Agent, error) {
	return newAgent(opts, backoff.New(retryMin, retryMax), func(ctx context.Context, address string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", address)
	})
}

func newAgent(opts Options, pace pacer, dial func(context.Context, string) (net.Conn, error)) (*Agent, error) {
	var random [16]byte
	_, _ = rand.Read(random[:]) // never fails (crypto/rand, Go 1.24)
	a := &Agent{
		opts:    opts,
		id:      identity{name: opts.Name, key: opts.Key},
		started: time.Now(),
		idBase:  hex.EncodeToString(random[:]) + "-",
		subs:    newTable(),
		ended:   make(chan struct{}),
		loss:    lossLog{log: opts.Log},
	}
	if opts.fs == nil {
		a.opts.fs = eventlog.OS
	}
	var disk *disk
	if disk, a.memory = spoolDisk(a.opts); disk == nil && opts.SpoolDir != "" {
		logging.SpoolInMemory.On(opts.Log).WithFields(logrus.Fields{"directory": opts.SpoolDir, "reason": a.memory}).Error("the spool cannot be opened: what is published while the host is away is kept in memory alone, and lost if castra-guestd ends before the host is back")
	}
	a.outbox = newOutbox(opts.SpoolSize, disk)
	a.watchers.init(a)
	a.uplink = &uplink{
		id: a.id, log: opts.Log, dial: dial, pace: pace, outbox: a.outbox, subs: a.subs,
		seen: a.seen, note: a.watchers.note,
		probes: make(chan struct{}), moved: make(chan struct{}, 1),
		state: linkState{address: opts.Address},
	}
	a.outbox.wake, a.outbox.note, a.outbox.lost = a.uplink.nudge, a.watchers.note, a.loss.lost
	a.subs.wake, a.subs.note, a.subs.shorter = a.uplink.nudge, a.watchers.note, a.shorter
	err := a.Reload(opts.Address, opts.Subscribe)
	switch {
	case err != nil:
	case opts.Listener != nil:
		a.local = newServer(opts.Listener, a)
	case opts.Socket != "":
		a.local, err = listen(opts.Socket, a)
	}
	if err != nil {
		if disk != nil {
			disk.close(diskPatience)
		}
		return nil, err
	}
	return a, nil
}

// Run works until ctx is done. It then takes no more publishes, gives the host a
// moment to take those that are kept, and returns when everything has ended.
func (a *Agent) Run(ctx context.Context) {
	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	var all sync.WaitGroup
	all.Go(func() { a.uplink.run(work) })
	all.Go(func() { a.watchers.run(work) })
	if a.local != nil {
		all.Go(func() { a.local.run(work) })
	}
	keeping, stopKeeping := context.WithCancel(work)
	kept := inBackground(func() { a.outbox.keeper(keeping) })
	loading, stopLoading := context.WithCancel(context.WithoutCancel(ctx))
	defer stopLoading()
	loaded := inBackground(func() {
		if a.outbox.disk != nil {
			a.outbox.loader(loading)
		}
	})
	<-ctx.Done()
	a.stopping.Store(true)
	a.watchers.note()
	within(drainFor, a.outbox.close())
	stopKeeping() // which first puts on disk what is not there yet
	within(diskPatience, kept)
	if lost := a.outbox.abandon(); lost > 0 {
		logging.MessagesLost.On(a.opts.Log).WithField("records", lost).Warn("stopping with messages that the host has not taken and that are in memory alone; they are lost")
	}
	close(a.ended)
	stop()
	all.Wait()
	stopLoading()
	within(diskPatience, loaded)
	if a.outbox.disk != nil {
		a.outbox.disk.close(diskPatience)
	}
	a.loss.flush()
}

// inBackground runs f, and gives what is closed when it has returned. A disk that blocks
// may keep that from happening.
func inBackground(f func()) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	return done
}

// within waits for done, which may be nil, but no longer than d.
func within(d time.Duration, done <-chan struct{}) {
	if done == nil {
		return
	}
	patience := time.NewTimer(d)
	defer patience.Stop()
	select {
	case <-done:
	case <-patience.C:
	}
}

// Reload takes over another address and other topics that are always listened to.
// The error says which topic is none; nothing is changed then. One goroutine at a
// time may call it.
func (a *Agent) Reload(address string, subscribe []string) error {
	if err := a.listenAlways(subscribe); err != nil {
		return err
	}
	a.uplink.move(address)
	return nil
}

// Probe returns nil once those who serve the host and the local socket have shown
// that they do.
func (a *Agent) Probe(ctx context.Context) error {
	if err := a.uplink.probe(ctx); err != nil {
		return err
	}
	if a.local != nil {
		return a.local.probe(ctx)
	}
	return nil
}

// shorter takes in that the host's log is not the one that was heard of so far.
func (a *Agent) shorter(end uint64) {
	a.head.Store(end)
	logging.RecordsMissed.On(a.opts.Log).WithField("newest", end).Warn("the host's log ends before what this guest has heard of it: it was begun anew, or restored; going on with what is new")
}

// seen notes the number of a record that came by.
func (a *Agent) seen(seq uint64) {
	for {
		head := a.head.Load()
		if seq <= head || a.head.CompareAndSwap(head, seq) {
			return
		}
	}
}
