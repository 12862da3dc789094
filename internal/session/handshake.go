package session

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/castrabus/castra/internal/wire"
)

const (
	nonceBytes  = 16 // contract 2: 32 hex digits
	tokenBytes  = 16 // contract 2: at least 128 random bits
	tokenPrefix = "sess-"

	// lingerFor and lingerBytes bound how much of a peer's last words is read
	// after ours: closing with unread bytes makes the kernel send a reset,
	// which can overtake the line that says why (RFC 2525, section 2.17).
	lingerFor   = time.Second
	lingerBytes = 256 << 10
)

// Handshake is a connection that is no session yet. Like a session it has a goroutine
// only while there is something to do: ten thousand guests that connect at once would
// otherwise have as many stacks, each of which grows and is gone again.
type Handshake struct {
	ctx      context.Context //nolint:containedctx // the broker's: there is no call that takes as long as this does
	conn     Conn
	raw      syscall.RawConn
	broker   Broker
	opts     *Options
	shaken   func(granted bool)
	done     func()
	remote   string
	deadline time.Time
	ended    atomic.Uint32 // how from outside; 0: it was not
	spot     uint64        // see Session

	// Of whoever serves it just now:
	rest  []byte // what has come and is no whole line yet
	hello wire.Hello
	key   []byte // what the guest has to prove that it holds; nil: nothing
	nonce string // what it was asked to prove that with; "": it was not asked so far
}

// How a handshake is ended from outside.
const (
	shakeExpired = 1 + iota
	shakeClosed
)

// NewHandshake prepares to take a connection from greeting to close, which is when done
// is called. shaken is called when the handshake is over, and told whether it granted a
// session. While there is none ctx ends what the broker lets wait, and End and Expire
// end the handshake; from Admit on the session is the broker's to end.
func NewHandshake(ctx context.Context, conn Conn, b Broker, opts *Options, shaken func(granted bool), done func()) *Handshake {
	return &Handshake{
		ctx: ctx, conn: conn, broker: b, opts: opts, shaken: shaken, done: done,
		remote: conn.RemoteAddr().String(), deadline: time.Now().Add(opts.HandshakeTimeout),
	}
}

// Start greets the guest. It does not wait.
func (h *Handshake) Start() {
	var err error
	if h.raw, err = h.conn.SyscallConn(); err != nil || h.conn.SetWriteDeadline(h.deadline) != nil || !h.say(greeting) {
		h.shaken(false)
		_ = h.conn.Close()
		h.done()
		return
	}
	if !h.opts.Idle.add(h) {
		go h.goOn(nil)
	}
}

var greeting = []byte(wire.Greeting + "\n") // fits into the buffer of every new connection

// Remote gives the guest's address.
func (h *Handshake) Remote() string { return h.remote }

// Deadline is when it is to be expired.
func (h *Handshake) Deadline() time.Time { return h.deadline }

// Expire ends the handshake because it has taken too long, and End because there is no
// room for it any more. Neither waits, or does anything to one that is over.
func (h *Handshake) Expire() { h.end(shakeExpired) }

// End is like Expire.
func (h *Handshake) End() { h.end(shakeClosed) }

func (h *Handshake) end(how uint32) {
	if h.ended.CompareAndSwap(0, how) {
		h.opts.Idle.wake(h)
	}
}

// goOn is run when there is something to read, or the handshake was ended. It may run
// for as long as the session that was granted.
func (h *Handshake) goOn(w *courier) {
	w.leave()
	for {
		s, err := h.advance()
		if errors.Is(err, errNothing) {
			if h.opts.Idle.add(h) {
				return
			}
			if !h.over() { // it cannot be waited for
				time.Sleep(restStep)
			}
			continue
		}
		if s == nil {
			linger(h.conn)
			h.shaken(false)
			h.done()
			return
		}
		s.done = h.done
		s.run(h.rest)
		return
	}
}

// advance gives the session that was granted, nil when the connection is done with, or
// errNothing where more is to come.
func (h *Handshake) advance() (*Session, error) {
	for {
		line, err := h.nextLine()
		switch {
		case errors.Is(err, errNothing):
			return nil, err
		case err != nil && (h.nonce == "" || !errors.Is(err, wire.ErrProtocol)):
			h.broken(err)
			return nil, nil
		case h.nonce != "":
			if err != nil || !h.proven(line) {
				h.refuse(wire.ReasonAuthFailed)
				return nil, nil //nolint:nilerr // the guest is told so
			}
			return h.welcome(), nil
		}
		if !h.judge(line) {
			return nil, nil
		}
		if h.key == nil {
			return h.welcome(), nil
		}
		h.nonce = randomHex(nonceBytes)
		if !h.say(wire.AppendChallenge(nil, h.nonce)) {
			return nil, nil
		}
	}
}

// judge tells whether the guest is welcome as far as its first line tells. If it is not
// it is told so.
func (h *Handshake) judge(line []byte) bool {
	var err error
	if h.hello, err = wire.ParseHello(line); err != nil {
		h.refuse(wire.ReasonProtocolError)
		return false
	}
	d := h.broker.Decide(h.hello)
	if d.Refuse != "" {
		h.refuse(d.Refuse)
		return false
	}
	h.key = d.Key
	return true
}

// proven tells whether line is the right answer to the challenge.
func (h *Handshake) proven(line []byte) bool {
	mac, perr := wire.ParseAuth(line)
	got, herr := hex.DecodeString(mac)
	want := wire.ClientMAC(h.key, h.hello.VM, h.hello.Caps, h.hello.Nonce, h.nonce)
	return perr == nil && herr == nil && hmac.Equal(got, want)
}

// welcome lets in a guest that has proved all that it has to.
func (h *Handshake) welcome() *Session {
	if !h.hello.Has(wire.CapBus) {
		h.attend()
		return nil
	}
	return h.grant()
}

// attend answers a guest that only shakes hands.
func (h *Handshake) attend() {
	ctx, stop := context.WithDeadline(h.ctx, h.deadline)
	defer stop()
	if d := h.broker.Attend(ctx, h.hello, h.remote); d.Refuse != "" {
		h.refuse(d.Refuse)
		return
	}
	h.record("denied", wire.ReasonMissingCapability) // no session was granted
	h.say(wire.AppendOK(nil, "", ""))
}

// grant makes the session and tells the guest.
func (h *Handshake) grant() *Session {
	s := newSession(h.conn, h.raw, h.broker, h.opts)
	s.remote, s.vm, s.token = h.remote, h.hello.VM, tokenPrefix+randomHex(tokenBytes)
	s.ordered, s.spot = h.hello.Has(wire.CapOrdered), h.spot
	ctx, stop := context.WithDeadline(h.ctx, h.deadline)
	guest, d := h.broker.Admit(ctx, s, h.hello, h.key)
	stop()
	if d.Refuse != "" {
		h.refuse(d.Refuse)
		return nil
	}
	s.guest = guest
	h.shaken(true)
	// From here on it is a session, and ends or is handed over as one.
	err := h.conn.SetWriteDeadline(time.Now().Add(h.opts.HandshakeTimeout))
	proof := ""
	if h.key != nil {
		proof = hex.EncodeToString(wire.ServerProof(h.key, h.hello.VM, h.hello.Caps, h.hello.Nonce, h.nonce, s.token))
	}
	if err != nil || s.ended.Load() != nil || h.ended.Load() == shakeClosed || !h.say(wire.AppendOK(nil, s.token, proof)) {
		return h.takeBack(s, "the guest left during the handshake")
	}
	if err := h.conn.SetWriteDeadline(time.Time{}); err != nil {
		return h.takeBack(s, err.Error())
	}
	if s.ended.Load() != nil { // ended since Admit, and the deadline that says so just removed
		_ = h.conn.SetDeadline(time.Unix(1, 0))
	}
	return s
}

// takeBack ends a session that was granted and cannot begin. It is seen to have ended
// before the broker releases it: whoever hands sessions over does not wait for it then.
func (h *Handshake) takeBack(s *Session, why string) *Session {
	s.ended.CompareAndSwap(nil, &End{Reason: TroubleIOError, Detail: why})
	h.broker.Release(s, *s.ended.Load())
	return nil
}

// say writes a line and tells whether that worked.
func (h *Handshake) say(line []byte) bool {
	_, err := h.conn.Write(line)
	return err == nil
}

// refuse tells the guest why, and records it.
func (h *Handshake) refuse(reason string) {
	h.record("denied", reason)
	h.say(wire.AppendRefusal(nil, reason))
}

// broken records a handshake that ended without a line to judge.
func (h *Handshake) broken(err error) {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		h.record("timeout", wire.ReasonReadTimeout)
		// The deadline has passed for writing too, and the guest may yet read.
		_ = h.conn.SetWriteDeadline(time.Now().Add(lingerFor))
		h.say(wire.AppendRefusal(nil, wire.ReasonReadTimeout))
	case errors.Is(err, wire.ErrProtocol):
		h.refuse(wire.ReasonProtocolError)
	default:
		h.record("denied", wire.ReasonIOError)
	}
}

func (h *Handshake) record(outcome, reason string) {
	h.broker.Refused(Refusal{VM: h.hello.VM, Capabilities: h.hello.Capabilities(), Remote: h.remote, Outcome: outcome, Reason: reason})
}

// linger closes the connection so that what was written last arrives.
func linger(conn Conn) {
	if conn.CloseWrite() == nil && conn.SetReadDeadline(time.Now().Add(lingerFor)) == nil {
		_, _ = io.CopyN(io.Discard, conn, lingerBytes)
	}
	_ = conn.Close()
}

func randomHex(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails (crypto/rand, Go 1.24)
	return hex.EncodeToString(b)
}

// nextLine gives a line without its end, valid until the next call; errNothing: there is
// none yet.
func (h *Handshake) nextLine() (line []byte, err error) {
	if line, err = h.cutLine(); line != nil || err != nil {
		return line, err
	}
	switch h.ended.Load() {
	case shakeExpired:
		return nil, os.ErrDeadlineExceeded
	case shakeClosed:
		_ = h.conn.Close() // at once: its descriptor may be what is lacking
		return nil, net.ErrClosed
	}
	ws := workspaces.Get().(*workspace)
	defer workspaces.Put(ws)
	n, err := ws.read(h.raw)
	if err != nil {
		return nil, err
	}
	h.rest = append(h.rest, ws.buf[:n]...)
	if line, err = h.cutLine(); line == nil && err == nil {
		err = errNothing
	}
	return line, err
}

// cutLine takes a line off what has come, nil where there is no whole one.
func (h *Handshake) cutLine() ([]byte, error) {
	if i := bytes.IndexByte(h.rest, '\n'); i >= 0 && i < wire.MaxLine {
		line := bytes.TrimSuffix(h.rest[:i], []byte("\r"))
		h.rest = h.rest[i+1:]
		return line, nil
	}
	if len(h.rest) >= wire.MaxLine {
		return nil, fmt.Errorf("%w: a line of more than %d bytes", wire.ErrProtocol, wire.MaxLine)
	}
	return nil, nil
}

// The parts of a waiter.
func (h *Handshake) place() *uint64              { return &h.spot }
func (h *Handshake) connection() syscall.RawConn { return h.raw }
func (h *Handshake) over() bool                  { return h.ended.Load() != 0 }
