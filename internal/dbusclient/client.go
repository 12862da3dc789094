// Package dbusclient speaks to castrad, or in a guest to castra-guestd, through
// org.castra.Bus1 on the message bus. It is all that castractl knows of either.
package dbusclient

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"github.com/castrabus/castra/internal/bus"
)

const (
	busName = "org.castra.Bus1"
	root    = dbus.ObjectPath("/org/castra/Bus1")
	manager = "org.castra.Bus1.Manager"
)

// The units of the two daemons, without .service.
const (
	HostDaemon  = "castrad"
	GuestDaemon = "castra-guestd"
)

// Options says how the daemon is reached.
type Options struct {
	// Address is a D-Bus server address. Empty: $DBUS_SYSTEM_BUS_ADDRESS, or the
	// system bus where that is empty too.
	Address string
	// Start lets a call start the daemon where D-Bus can. What only looks must not.
	Start bool
	// Interactive lets polkit ask the user for a password.
	Interactive bool
	// Daemon is the name of the daemon's unit, without .service, for messages and
	// for Absence. Empty: castrad.
	Daemon string
}

// Client is a connection to the message bus. Its methods may be called from
// several goroutines at once; errors are *bus.Error where the daemon refused, and
// wrap ErrNoBus or ErrNotRunning where it could not be asked.
type Client struct {
	conn *dbus.Conn
	opts Options
	hub  *hub
}

// Dial connects to the message bus, whether or not the daemon runs. ctx bounds the
// connecting alone.
func Dial(ctx context.Context, opts Options) (*Client, error) {
	if opts.Address == "" {
		opts.Address = os.Getenv("DBUS_SYSTEM_BUS_ADDRESS")
	}
	if opts.Address == "" {
		opts.Address = "unix:path=/run/dbus/system_bus_socket"
	}
	if opts.Daemon == "" {
		opts.Daemon = HostDaemon
	}
	// The connection's context ends the connection, so it is its own, and ends
	// with ctx only until the connection is there: godbus's handshake has no
	// deadline, and a stopped bus would hold us for ever.
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	detach := context.AfterFunc(ctx, end)
	h := &hub{}
	conn, err := dbus.Connect(opts.Address, dbus.WithContext(life), dbus.WithSignalHandler(h))
	if err == nil && !detach() {
		conn.Close()
		err = ctx.Err()
	}
	if err != nil {
		end()
		return nil, &cause{ErrNoBus, fmt.Sprintf("no message bus answers at %s (%s); where systemd runs, start it with: systemctl start dbus", opts.Address, err)}
	}
	return &Client{conn: conn, opts: opts, hub: h}, nil
}

// Close leaves the bus. It ends tails and watches.
func (c *Client) Close() { _ = c.conn.Close() }

// Publish stores a message and returns its number; 0 from a guest's daemon, where
// the host has not numbered it yet.
func (c *Client) Publish(ctx context.Context, req bus.PublishRequest) (seq uint64, err error) {
	opts := make(map[string]dbus.Variant)
	if req.ID != "" {
		opts["id"] = dbus.MakeVariant(req.ID)
	}
	if req.Reply != "" {
		opts["reply"] = dbus.MakeVariant(req.Reply)
	}
	err = c.call(ctx, "Publish", []any{&seq}, req.Topic, string(req.Payload), opts)
	return seq, err
}

// WaitAck returns the guest that acknowledged record seq. The error's code is
// bus.CodeNoAck if none did within timeout.
func (c *Client) WaitAck(ctx context.Context, seq uint64, timeout time.Duration) (vm string, err error) {
	err = c.call(ctx, "WaitAck", []any{&vm}, seq, uint64(max(0, timeout.Microseconds())))
	return vm, err
}

// Describe returns the daemon's status with the VMs named, or all.
func (c *Client) Describe(ctx context.Context, vms ...string) (st bus.Status, err error) {
	var text string
	if vms == nil {
		vms = []string{}
	}
	if err := c.call(ctx, "Describe", []any{&text}, vms); err != nil {
		return st, err
	}
	if err := json.Unmarshal([]byte(text), &st); err != nil {
		return st, fmt.Errorf("reading the status that %s gave: %w", c.opts.Daemon, err)
	}
	return st, nil
}

// AddVM registers a VM. key is empty if it was there already or has none.
func (c *Client) AddVM(ctx context.Context, req bus.AddVMRequest) (created bool, key []byte, err error) {
	opts := make(map[string]dbus.Variant)
	if req.NoKey {
		opts["no-key"] = dbus.MakeVariant(true)
	}
	if req.IfMissing {
		opts["if-missing"] = dbus.MakeVariant(true)
	}
	if len(req.Forwards) > 0 {
		opts["forwards"] = dbus.MakeVariant(req.Forwards)
	}
	err = c.call(ctx, "AddVM", []any{&created, &key}, req.Name, opts)
	return created, key, err
}

// RemoveVM takes a VM's registration away.
func (c *Client) RemoveVM(ctx context.Context, name string) error {
	return c.call(ctx, "RemoveVM", nil, name)
}

// RekeyVM gives a VM a new key.
func (c *Client) RekeyVM(ctx context.Context, name string) (key []byte, err error) {
	err = c.call(ctx, "RekeyVM", []any{&key}, name)
	return key, err
}

// Tail returns the records asked for, one a line (see the contract of Tail on
// D-Bus), as a stream that ends where the request does, and otherwise with ctx,
// Close of either, or the daemon. Where the daemon ends it early, the last line is
// {"type":"error","code":…,"reason":…}; where even that was not possible, the last
// line has no end, or, if the daemon was killed, is any.
func (c *Client) Tail(ctx context.Context, req bus.TailRequest) (io.ReadCloser, error) {
	if !c.conn.SupportsUnixFDs() {
		return nil, fmt.Errorf("the message bus at %s passes no file descriptors, which a tail needs", c.opts.Address)
	}
	var fd dbus.UnixFD
	if err := c.call(ctx, "Tail", []any{&fd}, tailOptions(req)); err != nil {
		return nil, err
	}
	// Watched by the runtime, or a Close would not end a Read.
	if err := unix.SetNonblock(int(fd), true); err != nil {
		_ = unix.Close(int(fd))
		return nil, fmt.Errorf("preparing the tail's descriptor: %w", err)
	}
	f := os.NewFile(uintptr(fd), "tail")
	t := &stream{f: f}
	ctx, t.cancel = context.WithCancel(ctx)
	t.stop = context.AfterFunc(ctx, func() { f.Close() })
	return t, nil
}

// stream is the reading end of a tail.
type stream struct {
	f      *os.File
	cancel context.CancelFunc
	stop   func() bool
}

// Read returns io.EOF at the tail's end, and os.ErrClosed once Close was called or
// the context has ended.
func (t *stream) Read(p []byte) (int, error) { return t.f.Read(p) }

// Close ends the tail.
func (t *stream) Close() error {
	t.stop()
	t.cancel()
	return t.f.Close()
}

// tailOptions spells a request as Tail's options.
func tailOptions(req bus.TailRequest) map[string]dbus.Variant {
	opts := make(map[string]dbus.Variant)
	if len(req.Topics) > 0 {
		opts["topics"] = dbus.MakeVariant(req.Topics)
	}
	if req.VM != "" {
		opts["vm"] = dbus.MakeVariant(req.VM)
	}
	if req.Lines > 0 {
		opts["lines"] = dbus.MakeVariant(req.Lines)
	}
	if req.All {
		opts["all"] = dbus.MakeVariant(true)
	}
	if req.From > 0 {
		opts["from"] = dbus.MakeVariant(req.From)
	}
	if !req.Since.IsZero() {
		opts["since"] = dbus.MakeVariant(uint64(max(0, req.Since.UnixMicro())))
	}
	if !req.Until.IsZero() {
		opts["until"] = dbus.MakeVariant(uint64(max(0, req.Until.UnixMicro())))
	}
	if req.Follow {
		opts["follow"] = dbus.MakeVariant(true)
	}
	return opts
}

// call calls a method of the manager and stores its results.
func (c *Client) call(ctx context.Context, member string, results []any, args ...any) error {
	var flags dbus.Flags
	if !c.opts.Start {
		flags |= dbus.FlagNoAutoStart
	}
	if c.opts.Interactive {
		flags |= dbus.FlagAllowInteractiveAuthorization
	}
	// Not by dbus.Object, which drops the flag that lets polkit ask.
	m := &dbus.Message{Type: dbus.TypeMethodCall, Flags: flags, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldDestination: dbus.MakeVariant(busName),
		dbus.FieldPath:        dbus.MakeVariant(root),
		dbus.FieldInterface:   dbus.MakeVariant(manager),
		dbus.FieldMember:      dbus.MakeVariant(member),
		dbus.FieldSignature:   dbus.MakeVariant(dbus.SignatureOf(args...)),
	}, Body: args}
	done := make(chan *dbus.Call, 1) // the one answer
	reply := <-c.conn.SendWithContext(ctx, m, done).Done
	if reply.Err != nil {
		return c.explain(ctx, reply.Err)
	}
	if err := dbus.Store(reply.Body, results...); err != nil {
		return fmt.Errorf("reading what %s answered to %s: %w", c.opts.Daemon, member, err)
	}
	return nil
}

// Absence is what systemd knows of a daemon that does not answer.
type Absence string

// The kinds of absence.
const (
	Stopped  Absence = "stopped" // or systemd cannot be asked
	Idle     Absence = "idle"    // systemd listens in its place, to start it when a guest connects
	Starting Absence = "starting"
	Failing  Absence = "failing" // systemd starts it again, since it has failed
	Failed   Absence = "failed"
)

// Absence asks systemd why the daemon does not answer.
func (c *Client) Absence(ctx context.Context) Absence {
	service := c.opts.Daemon + ".service"
	switch c.state(ctx, service) {
	case "activating":
		if n, _ := c.unit(ctx, service, "Service", "NRestarts").(uint32); n > 0 {
			return Failing
		}
		return Starting
	case "failed":
		return Failed
	case "inactive":
		// A guest's socket waits for programs: without its daemon the VM is not on the bus.
		if c.opts.Daemon == HostDaemon && c.state(ctx, HostDaemon+".socket") == "active" {
			return Idle
		}
	}
	return Stopped
}

// state is whether a unit is active; "" where systemd cannot be asked.
func (c *Client) state(ctx context.Context, unit string) string {
	state, _ := c.unit(ctx, unit, "Unit", "ActiveState").(string)
	return state
}

// unit gives a property of a unit; nil where systemd cannot be asked.
func (c *Client) unit(ctx context.Context, unit, iface, property string) any {
	const name = "org.freedesktop.systemd1"
	var path dbus.ObjectPath
	systemd := c.conn.Object(name, "/org/freedesktop/systemd1")
	// LoadUnit, since GetUnit knows no unit that is inactive.
	if systemd.CallWithContext(ctx, name+".Manager.LoadUnit", dbus.FlagNoAutoStart, unit).Store(&path) != nil {
		return nil
	}
	var v dbus.Variant
	if c.conn.Object(name, path).CallWithContext(ctx, "org.freedesktop.DBus.Properties.Get", dbus.FlagNoAutoStart, name+"."+iface, property).Store(&v) != nil {
		return nil
	}
	return v.Value()
}
