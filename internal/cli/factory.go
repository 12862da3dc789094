package cli

import (
	"cmp"
	"context"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/dbusclient"
)

// callTimeout bounds each call to the bus that waits for nothing but the daemon
// itself; 25 s is what D-Bus clients wait by default, and leaves systemd time to
// start castrad.
const callTimeout = 25 * time.Second

// dialogTimeout is added where polkit may ask a person for a password.
const dialogTimeout = 2 * time.Minute

// Client is what castractl needs of a bus; *dbusclient.Client is the real one.
// Refusals come back as *bus.Error, the lack of a daemon or of a message bus as
// dbusclient.ErrNotRunning and ErrNoBus, complete sentences both.
type Client interface {
	Publish(ctx context.Context, req bus.PublishRequest) (seq uint64, err error)
	WaitAck(ctx context.Context, seq uint64, timeout time.Duration) (vm string, err error)
	// Tail gives records, one a line; ctx ends the stream too.
	Tail(ctx context.Context, req bus.TailRequest) (io.ReadCloser, error)
	// Describe gives the state of the named VMs, those that there are, or of all.
	Describe(ctx context.Context, vms ...string) (bus.Status, error)
	AddVM(ctx context.Context, req bus.AddVMRequest) (created bool, key []byte, err error)
	RemoveVM(ctx context.Context, name string) error
	RekeyVM(ctx context.Context, name string) (key []byte, err error)
	// WatchVMs gives a value after any change of any VM, until ctx is done; the
	// channel is never closed.
	WatchVMs(ctx context.Context) (<-chan struct{}, error)
	// Absence tells why castrad does not answer.
	Absence(ctx context.Context) dbusclient.Absence
	Close()
}

// Start says whether a command may start castrad where D-Bus can.
type Start bool

// What commands that change or wait may do, and what those that only look may not.
const (
	MayStart Start = true
	NoStart  Start = false
)

// Factory gives commands all they need from outside. The zero values of its
// flags are castractl's defaults.
type Factory struct {
	IO      Streams
	Version string // this build's
	Daemon  string // this machine's, for errors that say what to start; empty: castrad

	// Dial reaches the message bus; it does not fail for lack of a daemon behind it.
	Dial func(ctx context.Context, start Start) (Client, error)
	Now  func() time.Time
	Proc fs.FS                                       // /proc, for the host's sockets
	Exec func(path string, argv, env []string) error // replaces the process; returns on failure alone

	NoPager, NoLegend, Quiet bool // the flags that every command knows

	clients map[Start]Client
}

// NewFactory is the Factory of a real process; version is what the linker was
// told, and empty where `go build` was run by hand.
func NewFactory(version string) *Factory {
	if info, ok := debug.ReadBuildInfo(); ok && version == "" {
		version = info.Main.Version
	}
	f := &Factory{
		IO:      ProcessStreams(),
		Version: version,
		Daemon:  daemonHere(),
		Now:     time.Now,
		Proc:    os.DirFS("/proc"),
		Exec:    syscall.Exec,
	}
	f.Dial = func(ctx context.Context, start Start) (Client, error) {
		return dbusclient.Dial(ctx, dbusclient.Options{Start: bool(start), Interactive: f.IO.Interactive, Daemon: f.Daemon})
	}
	return f
}

func (f *Factory) daemon() string { return cmp.Or(f.Daemon, dbusclient.HostDaemon) }

// daemonHere names the daemon of this machine: castrad, unless only a guest's is
// installed.
func daemonHere() string {
	const host, guest = dbusclient.HostDaemon, dbusclient.GuestDaemon
	installed := func(unit string) bool {
		for _, dir := range []string{"/etc/systemd/system/", "/run/systemd/system/", "/usr/local/lib/systemd/system/", "/usr/lib/systemd/system/"} {
			if _, err := os.Stat(dir + unit + ".service"); err == nil {
				return true
			}
		}
		return false
	}
	if installed(guest) && !installed(host) {
		return guest
	}
	return host
}

// Client gives the connection to the bus, made when first asked for.
func (f *Factory) Client(ctx context.Context, start Start) (Client, error) {
	if c := f.clients[start]; c != nil {
		return c, nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	c, err := f.Dial(ctx, start)
	if err != nil {
		return nil, err
	}
	if f.clients == nil {
		f.clients = make(map[Start]Client)
	}
	f.clients[start] = c
	return c, nil
}

// Close ends the connections; the next Client dials again.
func (f *Factory) Close() {
	for _, c := range f.clients {
		c.Close()
	}
	f.clients = nil
}

// call bounds ctx for one call that needs rights. Calls that need none, and do
// not wait, get callTimeout alone.
func (f *Factory) call(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, f.answerTime())
}

func (f *Factory) answerTime() time.Duration {
	if f.IO.Interactive {
		return callTimeout + dialogTimeout
	}
	return callTimeout
}

// status asks for the state of the named VMs, of all when there are none.
func (f *Factory) status(ctx context.Context, start Start, names []string) (bus.Status, error) {
	client, err := f.Client(ctx, start)
	if err != nil {
		return bus.Status{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return client.Describe(ctx, names...)
}

// broker asks the daemon about itself and of no VM: the empty name is nobody's.
func (f *Factory) broker(ctx context.Context, start Start) (bus.Broker, error) {
	st, err := f.status(ctx, start, []string{""})
	return st.Broker, err
}

// interruptible is ctx, done too when the person presses Ctrl-C or the process
// is told to end. Only commands that treat this as their natural end use it: the
// others die of the signal, as a shell's loop around them expects.
func interruptible(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	// A second Ctrl-C kills: the first cannot end a write to a pipe that nobody reads.
	context.AfterFunc(ctx, stop)
	return ctx, stop
}
