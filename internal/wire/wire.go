// Package wire is bus-v1 as bytes: the handshake's lines, frames, the messages
// in them, names, topics and patterns. It knows no sockets, no clocks and no
// rights; docs/PROTOCOL.md describes the same in words.
//
// Everything that parses here takes bytes from an untrusted peer: it never
// panics, and what it keeps is bounded by MaxFrame.
package wire

import (
	"errors"
	"fmt"
)

// Greeting is the line, without its "\n", with which a broker opens every
// connection. Guests in the field compare it byte for byte.
const Greeting = "castra-broker 0.1 ready"

// The protocol's limits. Each counts bytes, but for MaxDepth.
const (
	MaxLine    = 512   // a handshake line, its "\n" included
	MaxFrame   = 65536 // a frame's JSON, its length prefix not included
	MaxPayload = 61440 // a payload without insignificant white space: a delivery with all its members still fits a frame
	MaxDepth   = 32    // levels of nesting in a frame; the frame's own object is level 1
	MaxName    = 128   // a VM's name
	MaxTopic   = 255   // a topic or pattern
	MaxID      = 128   // a publish's id
	MaxSubName = 64    // the name of a subscription or cursor
)

// ReservedName is the sender of what the host publishes. No VM may bear it, in
// any case.
const ReservedName = "host"

// The capabilities this protocol gives a meaning to. They are compared without
// regard to case.
const (
	CapBus     = "bus-v1"       // frames follow the handshake
	CapAuth    = "auth-hmac-v1" // the guest can answer a challenge
	CapOrdered = "ordered-v1"   // behind a publish refused for now later ones are refused, too
	CapHostBus = "host-bus"     // host rights, which are never granted over this protocol
)

// The errors of this package, to be matched with errors.Is.
var (
	// ErrProtocol says that the peer broke the protocol; the connection cannot
	// go on. The wrapping error says how, and where in its bytes.
	ErrProtocol = errors.New("protocol error")
	// ErrFrameSize says that a frame's length is outside 1 to MaxFrame. It is an
	// ErrProtocol.
	ErrFrameSize = fmt.Errorf("%w: frame length outside 1 to %d", ErrProtocol, MaxFrame)
	// ErrIncomplete says that the stream ended within a frame.
	ErrIncomplete = errors.New("stream ended within a frame")
)
