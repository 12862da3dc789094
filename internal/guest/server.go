package guest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/castrabus/castra/internal/backoff"
	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/logging"
	"github.com/castrabus/castra/internal/wire"
)

const (
	// maxClients bounds the programs connected to the socket at a time, and with it
	// what their buffers take.
	maxClients = 64
	// socketMode lets the owner and the group of the socket in.
	socketMode = 0o660
	// farewell bounds how long a client that is to go may take to read the rest.
	farewell = time.Second
	// acceptPause is how long to wait when there are no descriptors left.
	acceptPause = 100 * time.Millisecond
)

// server is the local bus: a Unix socket on which programs of this machine speak
// the frames of contract 2, one JSON object a line.
type server struct {
	agent *Agent
	path  string // as the listener has it
	ln    *net.UnixListener
	// room has one token for each client, maxClients in all.
	room chan struct{}
}

// listen takes the socket. One that a process left behind is replaced; one that
// somebody serves is not.
func listen(path string, a *Agent) (*server, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("making the local socket's directory: %w", err)
	}
	if err := removeStale(path); err != nil {
		return nil, fmt.Errorf("serving the local socket: %w", err)
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("serving the local socket: %w", err)
	}
	if err := os.Chmod(path, socketMode); err != nil {
		_ = ln.Close() // nobody has connected
		return nil, fmt.Errorf("serving the local socket: %w", err)
	}
	return newServer(ln, a), nil
}

// newServer serves a socket that listens already. Closing one that was passed in
// leaves its path to whoever made it.
func newServer(ln *net.UnixListener, a *Agent) *server {
	return &server{agent: a, path: ln.Addr().String(), ln: ln, room: make(chan struct{}, maxClients)}
}

// removeStale removes a socket that nobody serves any more, and nothing else.
func removeStale(path string) error {
	switch info, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("%s is there and is no socket; remove it, or set another path under [bus]", path)
	}
	conn, err := net.DialTimeout("unix", path, farewell)
	if err == nil {
		_ = conn.Close() // it was only to be seen that it can be made
		return fmt.Errorf("%s is served by another process; stop that, or set another path under [bus]", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("looking whether %s is still served: %w", path, err)
	}
	return os.Remove(path)
}

// run serves clients until ctx is done and all of them are gone.
func (v *server) run(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { _ = v.ln.Close() }) // removes the socket that listen made
	defer stop()
	var clients sync.WaitGroup
	defer clients.Wait()
	troubled := false
	for {
		conn, err := v.ln.AcceptUnix()
		if ctx.Err() != nil {
			if err == nil {
				_ = conn.Close()
			}
			return
		}
		if err != nil {
			if !troubled {
				logging.AcceptFailed.On(v.agent.opts.Log).WithField("reason", plain(err).Error()).Error("cannot take clients of the local socket; trying on")
			}
			troubled = true
			backoff.Sleep(ctx, acceptPause)
			continue
		}
		troubled = false
		select {
		case v.room <- struct{}{}:
			clients.Go(func() {
				newClient(v.agent, conn).run(ctx)
				<-v.room
			})
		default:
			turnAway(conn)
		}
	}
}

// turnAway tells one client too many why it is. The line fits the buffer of a new
// connection, so this does not wait.
func turnAway(conn net.Conn) {
	if conn.SetWriteDeadline(time.Now().Add(farewell)) == nil {
		_, _ = conn.Write(appendError(nil, codeTooManyClients, fmt.Sprintf("%d programs are connected already, the most there may be", maxClients)))
	}
	_ = conn.Close()
}

// probe returns nil once the server has answered a client.
func (v *server) probe(ctx context.Context) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", v.path)
	if err != nil {
		return fmt.Errorf("the local socket does not answer: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	// Whatever the line says, somebody wrote it. One that turns us away may be there
	// already, and the connection closed behind it: writing fails then.
	_, _ = conn.Write([]byte("{\"type\":\"heartbeat\"}\n"))
	if _, err := bufio.NewReader(conn).ReadSlice('\n'); err != nil {
		return fmt.Errorf("the local socket does not answer: %w", err)
	}
	return nil
}

// What ends a client's connection beside the wire's own reasons.
const (
	codeProtocol       = "protocol-error" // as castrad calls it
	codeTooManyClients = "too-many-clients"
	codeSlowConsumer   = "slow-consumer"
)

// appendError appends the line that ends a client's connection.
func appendError(dst []byte, code, reason string) []byte {
	dst = append(dst, `{"type":"error","code":`...)
	dst = wire.AppendString(dst, code)
	dst = append(dst, `,"reason":`...)
	dst = wire.AppendString(dst, reason)
	return append(dst, "}\n"...)
}

// appendDelivery appends a delivery as a line, under the client's own name for the
// subscription. The members stand as the host sends them, the payload last.
func appendDelivery(dst []byte, subscription string, m *wire.Message) []byte {
	dst = append(dst, `{"type":"publish","topic":`...)
	dst = wire.AppendString(dst, m.Topic)
	dst = append(dst, `,"subscription":`...)
	dst = wire.AppendString(dst, subscription)
	dst = append(dst, `,"vm":`...)
	dst = wire.AppendString(dst, m.VM)
	dst = fmt.Appendf(dst, `,"seq":%d,"time":`, m.Seq)
	dst = wire.AppendString(dst, m.Time)
	return appendRest(dst, m)
}

// appendRest appends the members that a delivery and a record of a tail end with.
func appendRest(dst []byte, m *wire.Message) []byte {
	if len(m.ID) > 0 {
		dst = append(dst, `,"id":`...)
		dst = wire.AppendString(dst, m.ID)
	}
	if len(m.Reply) > 0 {
		dst = append(dst, `,"reply":`...)
		dst = wire.AppendString(dst, m.Reply)
	}
	dst = append(dst, `,"payload":`...)
	if len(m.Payload) == 0 {
		dst = append(dst, "null"...)
	}
	dst = append(dst, m.Payload...)
	return append(dst, "}\n"...)
}

// appendGap appends a gap as a line.
func appendGap(dst []byte, subscription string, from, to uint64) []byte {
	dst = append(dst, `{"type":"gap","subscription":`...)
	dst = wire.AppendString(dst, subscription)
	return fmt.Appendf(dst, `,"from":%d,"to":%d}`+"\n", from, to)
}

// refusalOf gives the refusal that a client is to see for an error.
func refusalOf(err error) *bus.Error {
	if refusal, ok := errors.AsType[*bus.Error](err); ok {
		return refusal
	}
	return bus.Errorf(bus.CodeInternal, "%v", err)
}
