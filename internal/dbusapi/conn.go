package dbusapi

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

// errTooLarge is a message that the bus would disconnect us for.
var errTooLarge = errors.New("the answer is larger than a message bus carries in one message")

// busConn is a connection to a message bus, with godbus as the codec.
//
// godbus's own Conn is not used, since a service's peers are strangers: it keeps
// every file descriptor attached to a message open, gives up the whole connection
// on a legal message that it cannot decode, and starts a goroutine for every call
// before anybody can count it, in no particular order.
//
// Any goroutine may send and call; one goroutine, its owner's, reads.
type busConn struct {
	sock   *net.UnixConn
	in     *bufio.Reader
	serial atomic.Uint32 // of the message sent last

	out sync.Mutex // held for the length of one message on the socket

	mu      sync.Mutex
	pending map[uint32]chan answer // by serial; nil once closed
}

// answer is what came back for a call of ours.
type answer struct {
	args []any
	err  error
}

// dialBus connects to the first of address's entries that can be had and
// authenticates. The caller then reads messages and says Hello.
func dialBus(ctx context.Context, address string) (*busConn, error) {
	sock, err := dialAddress(ctx, address)
	if err != nil {
		return nil, fmt.Errorf("connecting to the message bus at %s: %w", address, err)
	}
	stop := context.AfterFunc(ctx, func() { sock.Close() })
	defer stop()
	c := &busConn{sock: sock, in: bufio.NewReaderSize(sock, 64<<10), pending: make(map[uint32]chan answer)}
	if err := c.authenticate(); err != nil {
		sock.Close()
		return nil, fmt.Errorf("authenticating to the message bus at %s: %w", address, err)
	}
	return c, nil
}

// dialAddress tries the entries of a D-Bus server address in their order
// (D-Bus Specification, "Server Addresses").
func dialAddress(ctx context.Context, address string) (*net.UnixConn, error) {
	var failed []error
	for entry := range strings.SplitSeq(address, ";") {
		transport, params, _ := strings.Cut(entry, ":")
		if transport != "unix" {
			failed = append(failed, fmt.Errorf("address %q is not of the form unix:path=…, and nothing else passes file descriptors", entry))
			continue
		}
		var name string
		for param := range strings.SplitSeq(params, ",") {
			key, value, _ := strings.Cut(param, "=")
			value, err := dbus.UnescapeBusAddressValue(value)
			switch {
			case err != nil:
				failed = append(failed, fmt.Errorf("address %q: %w", entry, err))
			case key == "path":
				name = value
			case key == "abstract":
				name = "@" + value
			}
		}
		if name == "" {
			failed = append(failed, fmt.Errorf("address %q has neither path= nor abstract=", entry))
			continue
		}
		var d net.Dialer
		c, err := d.DialContext(ctx, "unix", name)
		if err == nil {
			return c.(*net.UnixConn), nil
		}
		failed = append(failed, err)
	}
	return nil, errors.Join(failed...)
}

// authenticate runs the handshake (D-Bus Specification, "Authentication
// Protocol") in one exchange, as sd-bus does. It names no user: the bus takes the
// socket's, which is right in a user namespace too.
func (c *busConn) authenticate() error {
	if _, err := c.sock.Write([]byte("\x00AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n")); err != nil {
		return err
	}
	for _, want := range []string{"DATA", "OK", "AGREE_UNIX_FD"} {
		line, err := c.in.ReadSlice('\n')
		if err != nil {
			return err
		}
		word, _, _ := bytes.Cut(bytes.TrimSpace(line), []byte(" "))
		if string(word) != want {
			return fmt.Errorf("the bus answered %q where %s was due", bytes.TrimSpace(line), want)
		}
	}
	return nil
}

// read returns the next message that is not an answer to a call of ours. Its
// error is the connection's end.
func (c *busConn) read() (*message, error) {
	for {
		m, err := readMessage(c.in)
		switch {
		case errors.Is(err, errHeader):
			continue
		case err != nil:
			return nil, err
		case m.typ == dbus.TypeMethodCall, m.typ == dbus.TypeSignal:
			return m, nil
		case m.typ == dbus.TypeMethodReply, m.typ == dbus.TypeError:
			c.resolve(m)
		}
	}
}

func (c *busConn) resolve(m *message) {
	c.mu.Lock()
	waiting := c.pending[m.replySerial]
	delete(c.pending, m.replySerial)
	c.mu.Unlock()
	if waiting == nil {
		return // nobody waits any more, or nobody ever did: not decoded
	}
	var a answer
	if a.args, a.err = m.body(); a.err == nil && m.typ == dbus.TypeError {
		a.err = dbus.Error{Name: m.errName, Body: a.args}
	}
	waiting <- a
}

// call calls a method of another service and returns the answer's arguments. The
// error is a dbus.Error if the service gave it.
func (c *busConn) call(ctx context.Context, dest string, path dbus.ObjectPath, iface, member string, args ...any) ([]any, error) {
	m := &dbus.Message{Type: dbus.TypeMethodCall, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldDestination: dbus.MakeVariant(dest),
		dbus.FieldPath:        dbus.MakeVariant(path),
		dbus.FieldInterface:   dbus.MakeVariant(iface),
		dbus.FieldMember:      dbus.MakeVariant(member),
	}, Body: args}
	serial := c.nextSerial()
	waiting := make(chan answer, 1) // the one answer: the reader never waits for us
	c.mu.Lock()
	if c.pending == nil {
		c.mu.Unlock()
		return nil, net.ErrClosed
	}
	c.pending[serial] = waiting
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.pending, serial)
		c.mu.Unlock()
	}()
	if err := c.send(m, serial, nil); err != nil {
		return nil, err
	}
	select {
	case a := <-waiting:
		return a.args, a.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// driver calls a method of the message bus itself.
func (c *busConn) driver(ctx context.Context, member string, args ...any) ([]any, error) {
	return c.call(ctx, driverName, driverPath, ifaceDriver, member, args...)
}

// emit broadcasts a signal.
func (c *busConn) emit(path dbus.ObjectPath, iface, member string, args ...any) error {
	return c.send(&dbus.Message{Type: dbus.TypeSignal, Flags: dbus.FlagNoReplyExpected, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldPath:      dbus.MakeVariant(path),
		dbus.FieldInterface: dbus.MakeVariant(iface),
		dbus.FieldMember:    dbus.MakeVariant(member),
	}, Body: args}, c.nextSerial(), nil)
}

// reply answers a call. Descriptors in args are sent, and stay the caller's. goes is
// called just before the answer goes out.
func (c *busConn) reply(to *header, goes func(), args ...any) error {
	return c.send(&dbus.Message{Type: dbus.TypeMethodReply, Flags: dbus.FlagNoReplyExpected, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldDestination: dbus.MakeVariant(to.sender),
		dbus.FieldReplySerial: dbus.MakeVariant(to.serial),
	}, Body: args}, c.nextSerial(), goes)
}

// refuse answers a call with an error; goes is as with reply.
func (c *busConn) refuse(to *header, goes func(), e dbus.Error) error {
	return c.send(&dbus.Message{Type: dbus.TypeError, Flags: dbus.FlagNoReplyExpected, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldDestination: dbus.MakeVariant(to.sender),
		dbus.FieldReplySerial: dbus.MakeVariant(to.serial),
		dbus.FieldErrorName:   dbus.MakeVariant(e.Name),
	}, Body: e.Body}, c.nextSerial(), goes)
}

// nextSerial numbers a message; nought is not a number.
func (c *busConn) nextSerial() uint32 {
	for {
		if n := c.serial.Add(1); n != 0 {
			return n
		}
	}
}

// send encodes m and writes it; goes, if any, is called when its turn has come. A write
// that fails part of the way leaves the bus waiting for the rest of a message, so it ends
// the connection.
func (c *busConn) send(m *dbus.Message, serial uint32, goes func()) error {
	if len(m.Body) > 0 {
		m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(m.Body...))
		for _, arg := range m.Body {
			if _, ok := arg.(dbus.UnixFD); ok {
				m.Headers[dbus.FieldUnixFDs] = dbus.MakeVariant(uint32(1)) // no method returns more
			}
		}
	}
	var buf bytes.Buffer
	fds, err := m.EncodeToWithFDs(&buf, binary.LittleEndian)
	if err != nil {
		return fmt.Errorf("encoding a message: %w", err)
	}
	raw := buf.Bytes()
	if len(raw) > maxOutgoing {
		return errTooLarge
	}
	// The codec leaves the serial, bytes 8 to 11, to the connection.
	binary.LittleEndian.PutUint32(raw[8:], serial)

	c.out.Lock()
	defer c.out.Unlock()
	if goes != nil {
		goes()
	}
	if len(fds) > 0 {
		var n int
		if n, _, err = c.sock.WriteMsgUnix(raw, unix.UnixRights(fds...), nil); err == nil {
			raw = raw[n:] // the descriptors went with the first byte
		}
	}
	if err == nil && len(raw) > 0 {
		_, err = c.sock.Write(raw)
	}
	if err != nil {
		c.sock.Close()
		return fmt.Errorf("writing to the message bus: %w", err)
	}
	return nil
}

// limitWrites lets no write take longer than d from now, so that a bus that
// stopped reading cannot hold up a shutdown.
func (c *busConn) limitWrites(d time.Duration) { _ = c.sock.SetWriteDeadline(time.Now().Add(d)) }

// close ends the connection, and every call that waits for an answer.
func (c *busConn) close() {
	c.sock.Close()
	c.mu.Lock()
	waiting := c.pending
	c.pending = nil
	c.mu.Unlock()
	for _, w := range waiting {
		w <- answer{err: net.ErrClosed}
	}
}
