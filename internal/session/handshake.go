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
	"os"
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

// Serve takes a connection from greeting to close. It may return long before the
// connection is closed, which is when done is called. shaken is called when the
// handshake is over, and told whether it granted a session. While there is none it is
// the caller's to close the connection, and ctx ends what the broker lets wait; from
// Admit on the session is the broker's to end.
func Serve(ctx context.Context, conn Conn, b Broker, opts *Options, shaken func(granted bool), done func()) {
	shaking, stop := context.WithTimeout(ctx, opts.HandshakeTimeout)
	h := handshake{ctx: shaking, conn: conn, broker: b, opts: opts, shaken: shaken, remote: conn.RemoteAddr().String()}
	s, early := h.run()
	stop()
	if s == nil {
		linger(conn)
		shaken(false)
		done()
		return
	}
	s.done = done
	s.run(early)
}

// handshake is one connection before it is a session.
type handshake struct {
	ctx    context.Context
	conn   Conn
	broker Broker
	opts   *Options
	shaken func(granted bool)
	remote string

	hello wire.Hello
	caps  []string
	lines lineReader
}

// run gives the session that was granted and the bytes that the guest sent
// before it knew, or nil when the connection is done with.
func (h *handshake) run() (*Session, []byte) {
	if err := h.conn.SetDeadline(time.Now().Add(h.opts.HandshakeTimeout)); err != nil {
		return nil, nil
	}
	if !h.say(append([]byte(wire.Greeting), '\n')) {
		return nil, nil
	}
	h.lines.r = h.conn
	line, err := h.lines.next()
	if err != nil {
		h.broken(err)
		return nil, nil
	}
	if h.hello, err = wire.ParseHello(line); err != nil {
		h.refuse(wire.ReasonProtocolError)
		return nil, nil
	}
	h.caps = h.hello.Capabilities()
	d := h.broker.Decide(h.hello)
	if d.Refuse != "" {
		h.refuse(d.Refuse)
		return nil, nil
	}
	nonce := ""
	if d.Key != nil {
		if nonce = h.challenge(d.Key); nonce == "" {
			return nil, nil
		}
	}
	if !h.hello.Has(wire.CapBus) {
		h.attend()
		return nil, nil
	}
	return h.grant(d.Key, nonce), h.lines.rest()
}

// challenge makes the guest prove that it holds key and gives the broker's
// nonce, "" where it failed.
func (h *handshake) challenge(key []byte) string {
	nonce := randomHex(nonceBytes)
	if !h.say(wire.AppendChallenge(nil, nonce)) {
		return ""
	}
	line, err := h.lines.next()
	if err != nil && !errors.Is(err, wire.ErrProtocol) {
		h.broken(err)
		return ""
	}
	mac, perr := wire.ParseAuth(line)
	got, herr := hex.DecodeString(mac)
	want := wire.ClientMAC(key, h.hello.VM, h.hello.Caps, h.hello.Nonce, nonce)
	if err != nil || perr != nil || herr != nil || !hmac.Equal(got, want) {
		h.refuse(wire.ReasonAuthFailed)
		return ""
	}
	return nonce
}

// attend answers a guest that only shakes hands.
func (h *handshake) attend() {
	if d := h.broker.Attend(h.ctx, h.hello, h.remote); d.Refuse != "" {
		h.refuse(d.Refuse)
		return
	}
	h.record("denied", wire.ReasonMissingCapability) // no session was granted
	h.say(wire.AppendOK(nil, "", ""))
}

// grant makes the session and tells the guest.
func (h *handshake) grant(key []byte, nonce string) *Session {
	raw, err := h.conn.SyscallConn()
	if err != nil {
		h.record("denied", wire.ReasonIOError)
		return nil
	}
	s := newSession(h.conn, raw, h.broker, h.opts)
	s.remote, s.vm, s.token = h.remote, h.hello.VM, tokenPrefix+randomHex(tokenBytes)
	s.ordered = h.hello.Has(wire.CapOrdered)
	guest, d := h.broker.Admit(h.ctx, s, h.hello, key)
	if d.Refuse != "" {
		h.refuse(d.Refuse)
		return nil
	}
	s.guest = guest
	h.shaken(true)
	// From here on it is a session, and ends or is handed over as one.
	err = h.conn.SetDeadline(time.Time{})
	if err == nil {
		err = h.conn.SetWriteDeadline(time.Now().Add(h.opts.HandshakeTimeout))
	}
	proof := ""
	if key != nil {
		proof = hex.EncodeToString(wire.ServerProof(key, h.hello.VM, h.hello.Caps, h.hello.Nonce, nonce, s.token))
	}
	if err != nil || s.ended.Load() != nil || !h.say(wire.AppendOK(nil, s.token, proof)) {
		end := s.ended.Load()
		if end == nil {
			end = &End{Reason: TroubleIOError, Detail: "the guest left during the handshake"}
		}
		h.broker.Release(s, *end)
		return nil
	}
	if err := h.conn.SetWriteDeadline(time.Time{}); err != nil {
		h.broker.Release(s, End{Reason: TroubleIOError, Detail: err.Error()})
		return nil
	}
	if s.ended.Load() != nil { // ended since Admit, and the deadline that says so just removed
		_ = h.conn.SetDeadline(time.Unix(1, 0))
	}
	return s
}

// say writes a line and tells whether that worked.
func (h *handshake) say(line []byte) bool {
	_, err := h.conn.Write(line)
	return err == nil
}

// refuse tells the guest why, and records it.
func (h *handshake) refuse(reason string) {
	h.record("denied", reason)
	h.say(wire.AppendRefusal(nil, reason))
}

// broken records a handshake that ended without a line to judge.
func (h *handshake) broken(err error) {
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

func (h *handshake) record(outcome, reason string) {
	h.broker.Refused(Refusal{VM: h.hello.VM, Capabilities: h.caps, Remote: h.remote, Outcome: outcome, Reason: reason})
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

// lineReader takes lines of at most wire.MaxLine bytes off a connection and
// keeps what follows them.
type lineReader struct {
	r   io.Reader
	buf []byte
}

// next gives a line without its end, valid until the next call.
func (l *lineReader) next() ([]byte, error) {
	for {
		if i := bytes.IndexByte(l.buf, '\n'); i >= 0 && i < wire.MaxLine {
			line := bytes.TrimSuffix(l.buf[:i], []byte("\r"))
			l.buf = l.buf[i+1:]
			return line, nil
		}
		if len(l.buf) >= wire.MaxLine {
			return nil, fmt.Errorf("%w: a line of more than %d bytes", wire.ErrProtocol, wire.MaxLine)
		}
		room := make([]byte, 2*wire.MaxLine)
		n := copy(room, l.buf)
		m, err := l.r.Read(room[n:])
		l.buf = room[:n+m]
		if m == 0 && err != nil {
			return nil, err
		}
	}
}

// rest gives what came behind the last line.
func (l *lineReader) rest() []byte { return l.buf }
