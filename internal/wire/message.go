package wire

import "time"

// Type is what a message does.
type Type uint8

// The types of bus-v1. A message of any other is answered with the code
// unsupported-type.
const (
	TypeUnknown Type = iota
	TypePublish
	TypeSubscribe
	TypeUnsubscribe
	TypeHeartbeat
	TypeAck
	TypeGap
	TypeError
)

// FromKind is the way in which a subscription says where it begins.
type FromKind uint8

// The places where a subscription may begin.
const (
	FromNow   FromKind = iota // with what is published from now on
	FromStart                 // with the oldest record kept
	FromSeq                   // with record From.N
	FromLast                  // with the last From.N records
	FromTime                  // with the first record at or after From.Time
)

// From says where a subscription begins.
type From struct {
	Kind FromKind
	N    uint64
	Time time.Time
}

// Message is one frame, of either direction, taken apart. Its byte slices alias
// the frame and are valid until the next Decode or until the frame's bytes are
// reused; nil means that the member is absent.
//
// A member that its type does not know is ignored, whatever it holds. Of the
// members that only a broker sends, one of the wrong type or size counts as
// absent; those that a guest sends set Bad.
type Message struct {
	Type     Type
	TypeName []byte // the type as sent; as long as the peer made it

	Topic, ID, Reply, Sub, Subscription, Cursor []byte // without quotes and escapes

	// Payload is a publish's JSON as it was sent, digit for digit, but for white
	// space outside strings, which is gone. Absent means null.
	Payload []byte
	From    From
	HasFrom bool

	Ack, Status, Code, Reason []byte
	VM, Time                  []byte
	Seq                       uint64
	HasSeq                    bool
	RetryAfterMS              int64
	GapFrom, GapTo            uint64 // 0: absent; sequence numbers begin with 1

	// Bad says which known member is of the wrong type or size: answer with the
	// code bad-frame; the session lives on. Empty: none is.
	Bad string
	// TooLarge says that the payload is longer than MaxPayload: answer with the
	// code too-large; the session lives on.
	TooLarge bool
}

// AckKind is the word that an answer to m carries: its type, clipped where it is none
// that is known here.
func (m *Message) AckKind() string {
	switch m.Type {
	case TypePublish:
		return "publish"
	case TypeSubscribe:
		return "subscribe"
	case TypeUnsubscribe:
		return "unsubscribe"
	case TypeHeartbeat:
		return "heartbeat"
	case TypeAck:
		return "ack"
	default:
		return Clip(m.TypeName)
	}
}
