package guest

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bubble"
	"github.com/castrabus/castra/internal/wire"
)

var testKey = bytes.Repeat([]byte{7}, 32)

// scriptedHost is one end of a handshake, told line by line what to do.
type scriptedHost struct {
	t    *testing.T
	conn net.Conn
	r    *bufio.Reader
}

func (h *scriptedHost) say(line string) { _, _ = io.WriteString(h.conn, line) }

func (h *scriptedHost) hear() string {
	line, err := h.r.ReadString('\n')
	if err != nil {
		h.t.Errorf("the guest said %q: %v", line, err)
	}
	return strings.TrimSuffix(line, "\n")
}

func TestHandshake(t *testing.T) {
	const (
		greeting = wire.Greeting + "\n"
		token    = "sess-0123456789abcdef0123456789abcdef"
		sn       = "00112233445566778899aabbccddeeff"
	)
	hello := func(h *scriptedHost, want string) wire.Hello {
		line := h.hear()
		if !strings.HasPrefix(line, want) {
			h.t.Errorf("hello is %q, want %q…", line, want)
		}
		hello, err := wire.ParseHello([]byte(line))
		if err != nil {
			h.t.Error(err)
		}
		return hello
	}
	plainHello := func(h *scriptedHost) { hello(h, "hello vm:web1 capabilities=bus-v1") }
	// challenge runs the host's side with its own idea of the key.
	challenge := func(h *scriptedHost, key []byte) (proof string) {
		got := hello(h, "hello vm:web1 capabilities=bus-v1,ordered-v1,auth-hmac-v1 nonce=")
		h.say("challenge alg=hmac-sha256 nonce=" + sn + "\n")
		mac, err := wire.ParseAuth([]byte(h.hear()))
		if want := hex.EncodeToString(wire.ClientMAC(testKey, "web1", got.Caps, got.Nonce, sn)); err != nil || mac != want {
			h.t.Errorf("mac is %q (%v), want %q", mac, err, want)
		}
		return hex.EncodeToString(wire.ServerProof(key, "web1", got.Caps, got.Nonce, sn, token))
	}
	tests := []struct {
		name    string
		key     []byte
		host    func(h *scriptedHost)
		want    string // part of the error; empty: a session
		refused string // the reason, if the error is a refusal
	}{
		{name: "granted", host: func(h *scriptedHost) {
			h.say(greeting)
			plainHello(h)
			h.say("ok session=" + token + "\n")
		}},
		{name: "carriage returns", host: func(h *scriptedHost) {
			h.say(wire.Greeting + "\r\n")
			plainHello(h)
			h.say("ok session=" + token + "\r\n")
		}},
		{name: "granted with proof", key: testKey, host: func(h *scriptedHost) {
			h.say(greeting)
			proof := challenge(h, testKey)
			h.say("ok session=" + token + " proof=" + proof + "\n")
		}},
		{name: "proof by another key", key: testKey, refused: reasonUnproven, want: "host-unproven", host: func(h *scriptedHost) {
			h.say(greeting)
			proof := challenge(h, bytes.Repeat([]byte{8}, 32))
			h.say("ok session=" + token + " proof=" + proof + "\n")
		}},
		{name: "no proof", key: testKey, refused: reasonUnproven, want: "host-unproven", host: func(h *scriptedHost) {
			h.say(greeting)
			challenge(h, testKey)
			h.say("ok session=" + token + "\n")
		}},
		{name: "cut proof", key: testKey, want: "proof is not", host: func(h *scriptedHost) {
			h.say(greeting)
			proof := challenge(h, testKey)
			h.say("ok session=" + token + " proof=" + proof[:62] + "\n")
		}},
		{name: "no challenge", key: testKey, refused: reasonUnproven, want: "host-unproven", host: func(h *scriptedHost) {
			h.say(greeting)
			h.hear()
			h.say("ok session=" + token + "\n")
		}},
		{name: "proof without a challenge", key: testKey, refused: reasonUnproven, want: "host-unproven", host: func(h *scriptedHost) {
			h.say(greeting)
			got := hello(h, "hello vm:web1")
			proof := wire.ServerProof(testKey, "web1", got.Caps, got.Nonce, "", token)
			h.say("ok session=" + token + " proof=" + hex.EncodeToString(proof) + "\n")
		}},
		{name: "challenge without a key", want: "did not offer", host: func(h *scriptedHost) {
			h.say(greeting)
			plainHello(h)
			h.say("challenge alg=hmac-sha256 nonce=" + sn + "\n")
		}},
		{name: "second challenge", key: testKey, want: "second challenge", host: func(h *scriptedHost) {
			h.say(greeting)
			challenge(h, testKey)
			h.say("challenge alg=hmac-sha256 nonce=" + sn + "\n")
		}},
		{name: "unknown", refused: wire.ReasonUnknownVM, want: "refused: unknown-vm", host: func(h *scriptedHost) {
			h.say(greeting)
			plainHello(h)
			h.say("error: unknown-vm\n")
		}},
		{name: "refused in words", refused: "no", want: "refused: no", host: func(h *scriptedHost) {
			h.say(greeting)
			plainHello(h)
			h.say("error: no such luck\n")
		}},
		{name: "refused after auth", key: testKey, refused: wire.ReasonAuthFailed, want: "auth-failed", host: func(h *scriptedHost) {
			h.say(greeting)
			challenge(h, testKey)
			h.say("error: auth-failed\n")
		}},
		{name: "bare ok", want: "granted no session", host: func(h *scriptedHost) {
			h.say(greeting)
			plainHello(h)
			h.say("ok\n")
		}},
		{name: "something else listens", want: `no Castra broker: it says "SSH-2.0-OpenSSH"`, host: func(h *scriptedHost) {
			h.say("SSH-2.0-OpenSSH\r\n")
		}},
		{name: "another greeting", want: "no Castra broker", host: func(h *scriptedHost) {
			h.say("castra-broker 0.1 ready \n")
		}},
		{name: "greeting without an end", want: "longer than", host: func(h *scriptedHost) {
			h.say(strings.Repeat("x", 20_000))
		}},
		{name: "long greeting", want: "longer than", host: func(h *scriptedHost) {
			h.say(strings.Repeat("x", wire.MaxLine) + "\n")
		}},
		{name: "closed at once", want: "closed the connection before its greeting", host: func(h *scriptedHost) {
			h.say("") // until the guest reads: a pipe closed before takes no deadline
		}},
		{name: "closed after hello", want: "closed the connection before its answer to hello", host: func(h *scriptedHost) {
			h.say(greeting)
			h.hear()
		}},
		{name: "escape sequence", want: "printable", host: func(h *scriptedHost) {
			h.say(greeting)
			h.hear()
			h.say("error: \x1b[31mred\n")
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ours, theirs := net.Pipe()
			defer ours.Close()
			granted, done := make(chan struct{}), make(chan struct{})
			go func() {
				defer close(done)
				defer theirs.Close()
				tt.host(&scriptedHost{t: t, conn: theirs, r: bufio.NewReader(theirs)})
				if tt.want == "" {
					<-granted
				}
			}()
			got, _, err := shake(ours, identity{name: "web1", key: tt.key})
			close(granted)
			_ = ours.Close()
			<-done
			if tt.want == "" {
				if err != nil || got != token {
					t.Fatalf("got %q, %v", got, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v, want %q", err, tt.want)
			}
			r, refused := errors.AsType[*refusal](err)
			if refused != (tt.refused != "") || refused && r.reason != tt.refused {
				t.Errorf("refusal %+v, want %q", r, tt.refused)
			}
		})
	}
}

// A nonce that comes again would let a recorded proof pass for the host's.
func TestHandshakeNonceIsFresh(t *testing.T) {
	if a, b := newNonce(), newNonce(); a == b || len(a) != 32 {
		t.Errorf("nonces %q and %q", a, b)
	}
}

func TestHandshakeSilentHost(t *testing.T) {
	for name, greet := range map[string]bool{"never greets": false, "never answers": true} {
		t.Run(name, func(t *testing.T) {
			bubble.Test(t, func(t *testing.T) {
				ours, theirs := net.Pipe()
				defer ours.Close()
				defer theirs.Close()
				go func() {
					if greet {
						_, _ = io.WriteString(theirs, wire.Greeting+"\n")
					}
					_, _ = io.Copy(io.Discard, theirs)
				}()
				begun := time.Now()
				_, _, err := shake(ours, identity{name: "web1"})
				if !errors.Is(err, errTimedOut) || time.Since(begun) != handshakeTimeout {
					t.Errorf("after %v: %v", time.Since(begun), err)
				}
			})
		})
	}
}

func TestRefusalAdvice(t *testing.T) {
	for reason, want := range map[string]string{
		wire.ReasonUnknownVM:        "on the host run: castractl vm add web1 --no-key; or give it a key, and start it with that: castractl vm add web1",
		wire.ReasonAuthRequired:     "castractl vm rekey web1",
		wire.ReasonAuthFailed:       "castractl vm rekey web1",
		reasonUnproven:              "castractl vm rekey web1",
		wire.ReasonInvalidName:      "castra.vm",
		wire.ReasonReservedIdentity: "castra.vm",
		wire.ReasonStorageError:     "castractl logs web1",
		"something-new":             "castractl logs web1",
	} {
		if got := (&refusal{reason: reason, name: "web1"}).advice(); !strings.Contains(got, want) {
			t.Errorf("%s: %q lacks %q", reason, got, want)
		}
	}
	// Without a key the host would not be believed.
	if got := (&refusal{reason: wire.ReasonUnknownVM, name: "web1", hasKey: true}).advice(); strings.Contains(got, "--no-key") || !strings.Contains(got, "castractl vm add web1") {
		t.Errorf("a guest with a key is told %q", got)
	}
}
