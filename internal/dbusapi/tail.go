package dbusapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

// lingerFor is how long a tail that is over waits for its caller to close its end.
const lingerFor = time.Second

// tailBuffer is the kernel's buffer for a tail, in bytes each way (it doubles
// that for its own book-keeping, socket(7)). It is all that a caller who never
// reads can make us keep, since the broker writes no faster than it is read.
const tailBuffer = 64 << 10

// tail hands out one end of a socket pair and writes records to the other.
func tail(ctx context.Context, c *call, args []any) ([]any, error) {
	req, err := tailRequest(args[0].(map[string]dbus.Variant))
	if err != nil {
		return nil, err
	}
	if c.flags&dbus.FlagNoReplyExpected != 0 {
		return nil, bus.Errorf(bus.CodeInvalidArg, "a tail is in its answer; await one")
	}
	held, release, err := c.link.hold(ctx, c)
	if err != nil {
		return nil, err
	}
	ours, theirs, err := socketPair()
	if err != nil {
		release()
		return nil, err
	}
	// Not before the answer is out: closing our copy of their end any sooner would
	// send whatever the number stands for by then.
	c.after = func() {
		c.link.calls.Go(func() {
			defer release()
			c.link.runTail(held, req, ours, theirs)
		})
	}
	return []any{dbus.UnixFD(theirs.Fd())}, nil
}

// socketPair makes a stream socket pair: ours is watched by the runtime, so that
// closing it ends reads and writes; theirs blocks, as a plain program expects.
func socketPair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("making the tail's socket pair: %w", err)
	}
	for _, fd := range fds {
		// Best effort: the default is a few times as much.
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, tailBuffer)
	}
	theirs = os.NewFile(uintptr(fds[1]), "tail, the caller's end")
	if err := unix.SetNonblock(fds[0], true); err != nil {
		_ = unix.Close(fds[0])
		theirs.Close()
		return nil, nil, fmt.Errorf("making the tail's socket pair: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "tail"), theirs, nil
}

// runTail writes records until all are written, the caller closes its end or leaves the
// bus, or the link ends. The answer is out.
func (l *link) runTail(ctx context.Context, req bus.TailRequest, ours, theirs *os.File) {
	defer ours.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = ours.SetDeadline(time.Unix(1, 0)) // ends the reads and writes under way
		close(interrupted)
	})
	// Their end lives in the answer, wherever that is, and then with the caller (unix(7),
	// SCM_RIGHTS). Were our copy kept, nobody would be told when the last of them is gone.
	theirs.Close()

	// Nothing is expected to be read, but the end. Some callers write a byte when they
	// have theirs.
	var gone sync.WaitGroup
	gone.Go(func() {
		_, _ = io.Copy(io.Discard, ours)
		cancel()
	})
	w := &tailWriter{w: ours}
	err := l.srv.opts.Bus.Tail(ctx, req, w)
	if !stop() {
		<-interrupted // or it would interrupt the last line too
	}
	if l.soft.Err() != nil && (err != nil || req.Follow) {
		err = bus.Errorf(bus.CodeShuttingDown, "%s is stopping or lost the message bus; tail again", l.srv.daemon)
	} else if ctx.Err() != nil {
		err = nil // nobody is there to be told
	}
	if err != nil && !w.inLine {
		writeLast(ours, errorLine(err))
	}
	hangUp(ctx, ours)
	gone.Wait()
}

// hangUp ends the stream. What the caller has written by then has to be read, and what it
// writes soon: it would get ECONNRESET in place of the end.
func hangUp(ctx context.Context, ours *os.File) {
	defer ours.Close()
	raw, err := ours.SyscallConn()
	if err != nil {
		return // it is closed
	}
	_ = raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_WR) })
	t := time.NewTimer(lingerFor)
	defer t.Stop()
	select {
	case <-ctx.Done(): // the caller has closed its end, or nothing is waited for any more
	case <-t.C:
	}
	_ = raw.Control(func(fd uintptr) { _, _ = unix.Read(int(fd), make([]byte, 64)) })
}

// writeLast writes the line that says why a tail ends early. It must not get lost
// where the caller lags behind, for then the tail would seem complete; so there is
// more room for it than for records, and nothing to wait for.
func writeLast(ours *os.File, line []byte) {
	if raw, err := ours.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, 2*tailBuffer)
		})
	}
	_ = ours.SetWriteDeadline(time.Now().Add(time.Second)) // only if there were none after all
	_, _ = ours.Write(line)
}

// tailWriter keeps in mind whether the last write ended with a line, since nothing
// must be written after one that was cut off.
type tailWriter struct {
	w      io.Writer
	inLine bool
}

func (t *tailWriter) Write(p []byte) (int, error) {
	n, err := t.w.Write(p)
	if n > 0 {
		t.inLine = p[n-1] != '\n'
	}
	return n, err
}

// errorLine tells the reader of a tail why it ends early, in the form that a
// guest's session ends in.
func errorLine(err error) []byte {
	e, ok := errors.AsType[*bus.Error](err)
	if !ok {
		e = bus.Errorf(bus.CodeInternal, "%s", err)
	}
	line, _ := json.Marshal(struct { // of strings alone: cannot fail
		Type   string   `json:"type"`
		Code   bus.Code `json:"code"`
		Reason string   `json:"reason"`
	}{"error", e.Code, e.Reason})
	return append(line, '\n')
}

// tailRequest reads the options of Tail.
func tailRequest(args map[string]dbus.Variant) (req bus.TailRequest, err error) {
	opts := options(args)
	begin := 0
	for _, key := range []string{"lines", "all", "from", "since"} {
		if _, ok := opts[key]; ok {
			begin++
		}
	}
	var since, until uint64
	_, hasFrom := opts["from"]
	_, hasSince := opts["since"]
	_, hasUntil := opts["until"]
	err = errors.Join(
		take(opts, "topics", &req.Topics), take(opts, "vm", &req.VM),
		take(opts, "lines", &req.Lines), take(opts, "all", &req.All), take(opts, "from", &req.From),
		take(opts, "since", &since), take(opts, "until", &until),
		take(opts, "follow", &req.Follow), opts.done())
	if err != nil {
		return req, err
	}
	const maxTopics = 64 // patterns; each record is matched with each
	switch {
	case begin > 1:
		return req, bus.Errorf(bus.CodeInvalidArg, "give one of lines, all, from and since, not several")
	case req.VM != "" && !wire.ValidName(req.VM):
		return req, bus.Errorf(bus.CodeInvalidName, "%.*q is no VM's name", wire.MaxName, req.VM)
	case len(req.Topics) > maxTopics:
		return req, bus.Errorf(bus.CodeInvalidArg, "%d topics are too many; at most %d", len(req.Topics), maxTopics)
	case since > math.MaxInt64 || until > math.MaxInt64:
		return req, bus.Errorf(bus.CodeInvalidArg, "since and until are microseconds since 1970, and end with the year 294246")
	}
	for _, topic := range req.Topics {
		if _, err := wire.ParsePattern(topic); err != nil {
			return req, bus.Errorf(bus.CodeBadTopic, "topic %.*q: %s", wire.MaxTopic, topic, err)
		}
	}
	if hasFrom && req.From == 0 {
		req.From = 1 // the first that there is, and not the next: 0 means that no number is given
	}
	if hasSince {
		req.Since = time.UnixMicro(int64(since))
	}
	if hasUntil {
		req.Until = time.UnixMicro(int64(until))
	}
	return req, nil
}
