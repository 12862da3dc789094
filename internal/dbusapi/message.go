package dbusapi

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/godbus/dbus/v5"
)

const (
	// maxIncoming bounds one message that we take in, in bytes. The largest that
	// anybody needs to send is a Publish of maxRawPayload.
	maxIncoming = 2 << 20
	// maxFields bounds the header fields that we take in: names of 255 bytes at
	// most and a path.
	maxFields = 64 << 10
	// maxOutgoing is the most that a system bus carries in one message
	// (dbus-daemon(1), max_message_size); it disconnects who sends more.
	maxOutgoing = 32 << 20

	fixedHeader = 16 // bytes before the header fields, their length included
)

// errHeader is a header that the specification allows and that nobody sends for
// a good reason; the message is ignored.
var errHeader = errors.New("unusual message header")

// header is what is known of a message before its body is decoded.
type header struct {
	typ         dbus.Type
	flags       dbus.Flags
	serial      uint32
	replySerial uint32
	path        dbus.ObjectPath
	iface       string
	member      string
	errName     string
	sender      string
	signature   string
}

// message is one message as it came. frame is nil if it was larger than
// maxIncoming: then its body was thrown away.
type message struct {
	header
	frame []byte
}

// readMessage reads one message, and only its header if it is too large. An
// error other than errHeader means that the connection is of no more use.
//
// File descriptors that somebody attached are closed by the kernel, because r
// reads without a control buffer. No method takes one, and kept open they would
// let any local user use up our descriptor table.
func readMessage(r *bufio.Reader) (*message, error) {
	var fixed [fixedHeader]byte
	if _, err := io.ReadFull(r, fixed[:]); err != nil {
		return nil, err
	}
	var order binary.ByteOrder
	switch fixed[0] {
	case 'l':
		order = binary.LittleEndian
	case 'B':
		order = binary.BigEndian
	default:
		return nil, fmt.Errorf("message of unknown byte order %q", fixed[0])
	}
	m := &message{header: header{
		typ:    dbus.Type(fixed[1]),
		flags:  dbus.Flags(fixed[2]),
		serial: order.Uint32(fixed[8:]),
	}}
	bodyLen, fieldsLen := int64(order.Uint32(fixed[4:])), int64(order.Uint32(fixed[12:]))
	padded := (fieldsLen + 7) &^ 7 // the body begins at a multiple of eight
	if fieldsLen > maxFields {
		return nil, discard(r, padded+bodyLen, errHeader)
	}
	if fixedHeader+padded+bodyLen > maxIncoming {
		fields := make([]byte, padded)
		if _, err := io.ReadFull(r, fields); err != nil {
			return nil, err
		}
		return m, discard(r, bodyLen, m.parseFields(fields[:fieldsLen], order))
	}
	m.frame = make([]byte, fixedHeader+padded+bodyLen)
	copy(m.frame, fixed[:])
	if _, err := io.ReadFull(r, m.frame[fixedHeader:]); err != nil {
		return nil, err
	}
	return m, m.parseFields(m.frame[fixedHeader:fixedHeader+fieldsLen], order)
}

// discard skips n bytes and returns result, unless skipping failed.
func discard(r *bufio.Reader, n int64, result error) error {
	if _, err := io.CopyN(io.Discard, r, n); err != nil {
		return err
	}
	return result
}

// parseFields reads the header fields, an array of (byte, variant), out of b,
// which begins at a multiple of eight. Only the types that the specification's
// own fields have are understood.
func (h *header) parseFields(b []byte, order binary.ByteOrder) error {
	for off := 0; off < len(b); off = (off + 7) &^ 7 {
		if len(b)-off < 4 || b[off+1] != 1 || b[off+3] != 0 {
			return errHeader
		}
		field, typ := dbus.HeaderField(b[off]), b[off+2]
		off += 4
		var text string
		var number uint32
		switch typ {
		case 's', 'o', 'u':
			if len(b)-off < 4 {
				return errHeader
			}
			number = order.Uint32(b[off:])
			off += 4
			if typ == 'u' {
				break
			}
			if int64(len(b)-off) < int64(number)+1 {
				return errHeader
			}
			text = string(b[off : off+int(number)])
			off += int(number) + 1
		case 'g':
			if len(b)-off < 1 || len(b)-off-1 < int(b[off])+1 {
				return errHeader
			}
			text = string(b[off+1 : off+1+int(b[off])])
			off += int(b[off]) + 2
		default:
			return errHeader
		}
		h.set(field, text, number)
	}
	return nil
}

func (h *header) set(field dbus.HeaderField, text string, number uint32) {
	switch field {
	case dbus.FieldPath:
		h.path = dbus.ObjectPath(text)
	case dbus.FieldInterface:
		h.iface = text
	case dbus.FieldMember:
		h.member = text
	case dbus.FieldErrorName:
		h.errName = text
	case dbus.FieldReplySerial:
		h.replySerial = number
	case dbus.FieldSender:
		h.sender = text
	case dbus.FieldSignature:
		h.signature = text
	}
}

// body decodes the arguments. It must be called only once signature is known to
// be one that is expected: what godbus refuses to decode, such as a{bs}, is legal
// on the bus and must not cost more than an error to who sent it.
func (m *message) body() (args []any, err error) {
	// The decoder reports most trouble by panics of its own; one that escapes it
	// would take every guest's session down for one caller's message.
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("decoding a message: %v", r)
		}
	}()
	decoded, err := dbus.DecodeMessage(bytes.NewReader(m.frame))
	if err != nil {
		return nil, fmt.Errorf("decoding a message: %w", err)
	}
	return decoded.Body, nil
}
