package dbusapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/backoff"
	"github.com/castrabus/castra/internal/bus"
)

// Bus is what is served. castrad's broker and castra-guestd's agent satisfy it.
// Errors that the caller on D-Bus is meant to see are *bus.Error. Every method
// may be called from several goroutines at once.
type Bus interface {
	// Publish returns once the record is durable; in a guest, once it is kept,
	// with seq 0 while the host has not numbered it.
	Publish(ctx context.Context, req bus.PublishRequest) (seq uint64, err error)
	// WaitAck returns the guest that acknowledged record seq, or ctx's error.
	WaitAck(ctx context.Context, seq uint64) (vm string, err error)
	// Tail writes records, one a line, until it has shown all that was asked for;
	// then it returns nil. It returns an error if it ends before, as when ctx is
	// done or w fails.
	Tail(ctx context.Context, req bus.TailRequest, w io.Writer) error
	// Status describes the bus and the named VMs, those that there are; with no
	// names, all of them.
	Status(vms []string) bus.Status
	// Watch has fn called after each change of a VM that a person would watch,
	// from one goroutine and under no lock, until cancel is called. A VM without a
	// name says that it is the bus itself that has changed.
	Watch(fn func(vm bus.VM, removed bool)) (cancel func())
}

// Registry is the part of a bus that admits VMs.
type Registry interface {
	AddVM(ctx context.Context, req bus.AddVMRequest) (created bool, key []byte, err error)
	RemoveVM(ctx context.Context, name string) error
	RekeyVM(ctx context.Context, name string) (key []byte, err error)
}

// Options says what is served and where.
type Options struct {
	// Address is a D-Bus server address. Empty: $DBUS_SYSTEM_BUS_ADDRESS, or the
	// system bus where that is empty too.
	Address  string
	Log      *logrus.Entry // nil: nothing is logged
	Bus      Bus
	Registry Registry // nil: VMs are not admitted here
	// Yield gives the name up to whoever else serves the bus here and does not yield,
	// and never takes it from him: a guest's daemon does, castrad does not.
	Yield bool
	// OnState is told, from the server's goroutine, whether the name is owned and
	// if not why: once before Start returns, and then once a change. It may be nil,
	// and must not call Close.
	OnState func(owned bool, err error)
}

// How long the server waits before it tries again to reach a message bus, and how
// long a first contact may take.
const (
	retryMin       = time.Second
	retryMax       = 30 * time.Second
	connectTimeout = 10 * time.Second
)

// stopGrace bounds how long a stop waits for calls that are being carried out. A
// publish is an fsync away from its answer, and five seconds is when a blocked
// disk counts as stalled.
const stopGrace = 5 * time.Second

// Server owns the name, or tries to, until it is closed.
type Server struct {
	opts   Options
	daemon string // what errors call the process
	hooks  hooks
	dirty  *dirtySet

	stop context.CancelFunc
	done chan struct{} // closed when the server's goroutine has ended
}

// hooks is what tests replace.
type hooks struct {
	retry interface {
		Next() time.Duration
		Reset()
	}
	identify func(ctx context.Context, c *busConn, sender string) (identity, error)
	group    string
	grace    time.Duration // see stopGrace
	linked   func(*link)   // called for each connection, before it serves; may be nil
}

// Start connects to the message bus and owns the name. It returns once the name is
// owned or the first attempt failed; failed attempts are repeated in the
// background, and OnState tells of their end. The error is ErrNameTaken if another
// process has the name, and then nothing goes on. The server ends with ctx or with
// Close.
func Start(ctx context.Context, opts Options) (*Server, error) {
	return start(ctx, opts, hooks{retry: backoff.New(retryMin, retryMax), identify: identify, group: adminGroup, grace: stopGrace})
}

func start(ctx context.Context, opts Options, h hooks) (*Server, error) {
	if opts.OnState == nil {
		opts.OnState = func(bool, error) {}
	}
	if opts.Log == nil {
		quiet := logrus.New()
		quiet.SetOutput(io.Discard)
		opts.Log = logrus.NewEntry(quiet)
	}
	if opts.Address == "" {
		opts.Address = os.Getenv("DBUS_SYSTEM_BUS_ADDRESS")
	}
	if opts.Address == "" {
		opts.Address = "unix:path=/run/dbus/system_bus_socket;unix:path=/var/run/dbus/system_bus_socket"
	}
	s := &Server{opts: opts, hooks: h, daemon: "castrad", dirty: newDirtySet(), done: make(chan struct{})}
	if brokerOf(opts.Bus).Kind == "guest" {
		s.daemon = "castra-guestd"
	}
	unwatch := opts.Bus.Watch(func(vm bus.VM, _ bool) { s.dirty.mark(vm.VM) })
	ctx, s.stop = context.WithCancel(ctx)
	first := make(chan error, 1) // one result: the server never waits for Start
	go func() {
		defer close(s.done)
		defer unwatch()
		s.run(ctx, first)
	}()
	if err := <-first; err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// Close ends the server and waits for its goroutines: it takes no more calls,
// ends tails, waits a few seconds for the calls being carried out, and leaves the
// bus. It may be called again, and from several goroutines.
func (s *Server) Close() {
	s.stop()
	<-s.done
}

// run keeps the name owned. It sends to first once.
func (s *Server) run(ctx context.Context, first chan<- error) {
	var last string // why the name is not owned, as it was told last
	report := func(owned bool, err error) {
		now := "owned"
		if !owned {
			now = fmt.Sprint(err)
		}
		if now != last {
			last = now
			s.opts.OnState(owned, err)
		}
	}
	for {
		l, err := s.connect(ctx)
		if errors.Is(err, ErrNameTaken) && first != nil {
			first <- err
			return
		}
		report(err == nil, err)
		if first != nil {
			first <- nil
			first = nil
		}
		if err == nil {
			s.hooks.retry.Reset()
			err = l.serve(ctx)
			if ctx.Err() != nil {
				return
			}
			report(false, err)
		}
		wait := time.NewTimer(s.hooks.retry.Next())
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			return
		}
	}
}

// brokerOf asks a bus about itself and no VM: the empty name is nobody's.
func brokerOf(b Bus) bus.Broker { return b.Status([]string{""}).Broker }
