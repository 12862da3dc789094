package guest

import (
	"bufio"
	"crypto/hmac"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/castrabus/castra/internal/wire"
)

// handshakeTimeout bounds the whole handshake. The host's own bound is 5 s by
// default (contract 2); ours leaves it room to say why it gave up.
const handshakeTimeout = 10 * time.Second

const nonceBytes = 16 // contract 2: 32 hex digits

// identity is who this guest says it is.
type identity struct {
	name string
	key  []byte // nil: none
}

func (id identity) capabilities() string {
	if id.key != nil {
		return wire.CapBus + "," + wire.CapOrdered + "," + wire.CapAuth
	}
	return wire.CapBus + "," + wire.CapOrdered
}

// list is capabilities, one by one.
func (id identity) list() []string { return strings.Split(id.capabilities(), ",") }

// refusal is a host that does not take this guest.
type refusal struct {
	reason string // one word of contract 2, or reasonUnproven
	name   string
	hasKey bool // this guest's own
}

func (r *refusal) Error() string { return "refused: " + r.reason }

// reasonUnproven is our own: the host granted a session without showing that it has
// this VM's key.
const reasonUnproven = "host-unproven"

// advice says what lets this guest in.
func (r *refusal) advice() string {
	const host = "on the host run: castractl "
	switch r.reason {
	case wire.ReasonUnknownVM:
		if r.hasKey { // another than the host will make
			return "start this VM with the key that this makes: " + host + "vm add " + r.name
		}
		return host + "vm add " + r.name + " --no-key; or give it a key, and start it with that: castractl vm add " + r.name
	case wire.ReasonAuthRequired:
		return "start this VM with its key, or with a new one: " + host + "vm rekey " + r.name
	case wire.ReasonAuthFailed:
		return "this VM's key is not the host's; start it with a new one: " + host + "vm rekey " + r.name
	case reasonUnproven:
		return "the host did not prove that it has this VM's key; register it with one: " + host + "vm rekey " + r.name
	case wire.ReasonInvalidName, wire.ReasonReservedIdentity:
		return "give this VM another name: the credential castra.vm, or vm under [identity] in guestd.toml"
	case wire.ReasonMissingCapability, wire.ReasonForbidden:
		return "the host's castrad and this castra-guestd do not fit together; install the same version of both"
	default:
		return "see why: " + host + "logs " + r.name
	}
}

// shake runs the handshake on a new connection and gives the session's token and
// the reader that the frames are to be read from. A *refusal says that the host
// does not take this guest.
func shake(conn net.Conn, id identity) (token string, r *bufio.Reader, err error) {
	if err := conn.SetDeadline(time.Now().Add(handshakeTimeout)); err != nil {
		return "", nil, err
	}
	h := handshake{conn: conn, id: id, r: bufio.NewReaderSize(conn, readBuffer)}
	if token, err = h.run(); err != nil {
		return "", nil, err
	}
	return token, h.r, conn.SetDeadline(time.Time{})
}

type handshake struct {
	conn net.Conn
	id   identity
	r    *bufio.Reader
}

func (h *handshake) run() (token string, err error) {
	line, err := h.line("greeting")
	if err != nil {
		return "", err
	}
	if string(line) != wire.Greeting {
		return "", fmt.Errorf("what answers there is no Castra broker: it says %.64q", line)
	}
	caps, nonce := h.id.capabilities(), ""
	if h.id.key != nil {
		nonce = newNonce()
	}
	if err := h.say(wire.AppendHello(nil, h.id.name, caps, nonce)); err != nil {
		return "", err
	}
	reply, err := h.reply("answer to hello")
	if err != nil {
		return "", err
	}
	challenge := reply.Challenge
	if challenge != "" {
		if h.id.key == nil {
			return "", fmt.Errorf("%w: a challenge to a guest that did not offer %s", wire.ErrProtocol, wire.CapAuth)
		}
		mac := wire.ClientMAC(h.id.key, h.id.name, caps, nonce, challenge)
		if err := h.say(wire.AppendAuth(nil, hex.EncodeToString(mac))); err != nil {
			return "", err
		}
		if reply, err = h.reply("answer to auth"); err != nil {
			return "", err
		}
	}
	if !reply.OK {
		return "", fmt.Errorf("%w: a second challenge", wire.ErrProtocol)
	}
	if h.id.key != nil {
		// Whoever answers without the key could be anything that listens there.
		got, err := hex.DecodeString(reply.Proof)
		want := wire.ServerProof(h.id.key, h.id.name, caps, nonce, challenge, reply.Token)
		if challenge == "" || err != nil || !hmac.Equal(got, want) {
			return "", &refusal{reason: reasonUnproven, name: h.id.name, hasKey: true}
		}
	}
	if reply.Token == "" {
		return "", fmt.Errorf("%w: the host granted no session though %s was asked for", wire.ErrProtocol, wire.CapBus)
	}
	return reply.Token, nil
}

// reply reads the host's next line; one that refuses is an error.
func (h *handshake) reply(what string) (wire.Reply, error) {
	line, err := h.line(what)
	if err != nil {
		return wire.Reply{}, err
	}
	reply, err := wire.ParseReply(line)
	if err != nil {
		return wire.Reply{}, fmt.Errorf("reading the host's %s: %w", what, err)
	}
	if reply.Refusal != "" {
		// The first word alone: the rest is for people, of whatever length.
		reason, _, _ := strings.Cut(reply.Refusal, " ")
		return wire.Reply{}, &refusal{reason: wire.Clip([]byte(reason)), name: h.id.name, hasKey: h.id.key != nil}
	}
	return reply, nil
}

// line reads one line without its end.
func (h *handshake) line(what string) ([]byte, error) {
	line, err := h.r.ReadSlice('\n')
	switch {
	case errors.Is(err, io.EOF):
		return nil, fmt.Errorf("the host closed the connection before its %s", what)
	case err != nil && !errors.Is(err, bufio.ErrBufferFull):
		return nil, fmt.Errorf("waiting for the host's %s: %w", what, plain(err))
	case err != nil || len(line) > wire.MaxLine:
		return nil, fmt.Errorf("%w: the host's %s is longer than %d bytes", wire.ErrProtocol, what, wire.MaxLine)
	}
	line = line[:len(line)-1]
	if n := len(line); n > 0 && line[n-1] == '\r' {
		line = line[:n-1]
	}
	return line, nil
}

func (h *handshake) say(line []byte) error {
	if _, err := h.conn.Write(line); err != nil {
		return fmt.Errorf("writing to the host: %w", plain(err))
	}
	return nil
}

func newNonce() string {
	b := make([]byte, nonceBytes)
	_, _ = rand.Read(b) // never fails (crypto/rand, Go 1.24)
	return hex.EncodeToString(b)
}
