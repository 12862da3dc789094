package wire

import (
	"bytes"
	"math"
	"time"
)

// members are the known top-level members of a frame that has been checked.
type members struct {
	frame []byte
	seen  uint32 // bit k: member k is there
	at    [mUnknown]value
}

func (f *members) has(k member) bool { return f.seen&(1<<k) != 0 }

// raw gives the member's JSON; nil: it is absent.
func (f *members) raw(k member) []byte {
	if !f.has(k) {
		return nil
	}
	return f.at[k].of(f.frame)
}

// text gives the string that the member is; nil: it is none, or absent. The
// escapes are removed in place, so it is called once a member.
func (f *members) text(k member) []byte {
	b := f.raw(k)
	if len(b) == 0 || b[0] != '"' {
		return nil
	}
	b = b[1 : len(b)-1]
	if f.at[k].escaped {
		b = unescape(b)
	}
	return b[:len(b):len(b)]
}

// number gives the member if it is an integer of 0 or more within 64 bits.
func (f *members) number(k member) (n uint64, ok bool) {
	return parseUint(f.raw(k))
}

// known gives the string that the member is, and calls m bad where it is there
// and is none.
func (f *members) known(m *Message, k member, bad string) []byte {
	b := f.text(k)
	if b == nil && f.has(k) {
		m.bad(bad)
	}
	return b
}

// bad notes the first thing that is wrong.
func (m *Message) bad(what string) {
	if m.Bad == "" {
		m.Bad = what
	}
}

// fill gives the members their meaning. What a guest sends is checked, since the
// broker must answer it; what a broker sends is taken where it is right.
func (f *members) fill(m *Message) {
	m.TypeName = f.text(mType)
	if m.TypeName == nil {
		m.bad("type must be a string")
		m.ID = f.text(mID)
		return
	}
	switch string(m.TypeName) {
	case "publish":
		m.Type = TypePublish
		f.fillPublish(m)
	case "subscribe":
		m.Type = TypeSubscribe
		f.fillSubscribe(m)
	case "unsubscribe":
		m.Type = TypeUnsubscribe
		m.Subscription = f.known(m, mSubscription, "subscription must be a string")
		m.Topic = f.known(m, mTopic, "topic must be a string")
	case "heartbeat":
		m.Type = TypeHeartbeat
	case "ack":
		m.Type = TypeAck
		f.fillAck(m)
	case "gap":
		m.Type = TypeGap
		m.Subscription = f.text(mSubscription)
		m.GapFrom, _ = f.number(mFrom)
		m.GapTo, _ = f.number(mTo)
	case "error":
		m.Type = TypeError
		m.Code, m.Reason = f.text(mCode), f.text(mReason)
	}
	if m.Type != TypePublish && m.Type != TypeAck { // which have taken it
		m.ID = f.text(mID)
	}
}

func (f *members) fillPublish(m *Message) {
	m.Topic = f.known(m, mTopic, "topic must be a string")
	m.ID = f.known(m, mID, "id must be a string")
	if m.ID != nil && (len(m.ID) == 0 || len(m.ID) > MaxID) {
		m.bad("id must be 1 to 128 bytes long")
	}
	m.Reply = f.known(m, mReply, "reply must be a string")
	m.Payload = f.raw(mPayload)
	if f.has(mPayload) && f.at[mPayload].spaced {
		m.Payload = compact(m.Payload[:0], m.Payload)
	}
	m.Payload = m.Payload[:len(m.Payload):len(m.Payload)]
	m.TooLarge = len(m.Payload) > MaxPayload

	// A delivery's own. In a guest's publish they are members like any other
	// that the broker does not know.
	m.Subscription, m.VM, m.Time = f.text(mSubscription), f.text(mVM), f.text(mTime)
	m.Seq, m.HasSeq = f.number(mSeq)
}

func (f *members) fillSubscribe(m *Message) {
	m.Topic = f.known(m, mTopic, "topic must be a string")
	m.Sub = f.known(m, mSub, "sub must be a string")
	if m.Sub != nil && !ValidSubName(m.Sub) {
		m.bad("sub must be 1 to 64 of A-Za-z0-9._- and begin with a letter or digit")
	}
	m.Cursor = f.known(m, mCursor, "cursor must be a string")
	if m.Cursor != nil && !ValidSubName(m.Cursor) {
		m.bad("cursor must be 1 to 64 of A-Za-z0-9._- and begin with a letter or digit")
	}
	if m.HasFrom = f.has(mFrom); m.HasFrom && !f.from(&m.From) {
		m.bad(`from must be "now", "start", a sequence number, -N or an RFC 3339 time`)
	}
}

// from reads where a subscription begins.
func (f *members) from(from *From) bool {
	raw := f.raw(mFrom)
	switch raw[0] {
	case '"':
		text := f.text(mFrom)
		switch string(text) {
		case "now":
			from.Kind = FromNow
			return true
		case "start":
			from.Kind = FromStart
			return true
		}
		from.Kind = FromTime
		return parseTime(text, &from.Time)
	case '-':
		from.Kind = FromLast
		raw = raw[1:]
	default:
		from.Kind = FromSeq
	}
	var ok bool
	from.N, ok = parseUint(raw)
	return ok
}

func (f *members) fillAck(m *Message) {
	m.Ack = f.known(m, mAck, "ack must be a string")
	m.Subscription = f.known(m, mSubscription, "subscription must be a string")
	if m.Seq, m.HasSeq = f.number(mSeq); f.has(mSeq) && !m.HasSeq {
		m.bad("seq must be an integer of 0 or more within 64 bits")
	}

	// Only a broker's acks have these.
	m.Topic, m.ID, m.Status = f.text(mTopic), f.text(mID), f.text(mStatus)
	m.Code, m.Reason = f.text(mCode), f.text(mReason)
	if n, ok := f.number(mRetryAfter); ok {
		m.RetryAfterMS = int64(min(n, math.MaxInt64))
	}
}

// parseTime reads an RFC 3339 time, whose T and Z may be lower-case (section
// 5.6). Package time takes neither, and it takes a one-digit hour, a comma for the
// point and offsets of a day and more, which other implementations of the protocol
// would not. b is changed.
func parseTime(b []byte, t *time.Time) bool {
	const minLen = len("2026-11-23T21:03:00Z")
	if len(b) < minLen || b[len("2026-11-23T21")] != ':' || bytes.IndexByte(b, ',') >= 0 {
		return false
	}
	for _, at := range []int{len("2026-11-23"), len(b) - 1} {
		if b[at] == 't' || b[at] == 'z' {
			b[at] -= 'a' - 'A'
		}
	}
	if offset := b[len(b)-len("+23:59"):]; b[len(b)-1] != 'Z' && (string(offset[1:3]) > "23" || string(offset[4:]) > "59") {
		return false
	}
	return t.UnmarshalText(b) == nil
}

// parseUint reads a JSON number that is an integer of 0 or more within 64 bits.
func parseUint(b []byte) (n uint64, ok bool) {
	if len(b) == 0 {
		return 0, false
	}
	for i, c := range b {
		if c == '.' || c == 'e' || c == 'E' {
			return parseScaled(b, i)
		}
		if n, ok = appendDigit(n, c); !ok {
			return 0, false
		}
	}
	return n, true
}

// maxScale is more than a frame has room to make up for with digits.
const maxScale = 2 * MaxFrame

// parseScaled reads what some languages write for an integer, 5.0 or 1e3. b is a
// JSON number that is not negative, point its first byte that is no digit.
func parseScaled(b []byte, point int) (n uint64, ok bool) {
	digits, scale := b, 0 // the number is digits times ten to the scale
	if e := bytes.IndexAny(b, "eE"); e >= 0 {
		exponent := b[e+1:]
		negative := exponent[0] == '-'
		for _, c := range bytes.TrimLeft(exponent, "+-") {
			scale = min(10*scale+int(c-'0'), maxScale)
		}
		if negative {
			scale = -scale
		}
		digits = b[:e]
	}
	if point < len(digits) {
		scale -= len(digits) - point - 1
	}
	zeros := 0 // held back until a digit shows that they count
	for i, c := range digits {
		switch {
		case i == point:
			continue
		case c == '0':
			zeros++
			continue
		}
		for ; zeros > 0 && n > 0; zeros-- {
			if n, ok = appendDigit(n, '0'); !ok {
				return 0, false
			}
		}
		zeros = 0
		if n, ok = appendDigit(n, c); !ok {
			return 0, false
		}
	}
	if n == 0 {
		return 0, true
	}
	if scale += zeros; scale < 0 {
		return 0, false // a fraction
	}
	for ; scale > 0; scale-- {
		if n, ok = appendDigit(n, '0'); !ok {
			return 0, false
		}
	}
	return n, true
}

// appendDigit writes a digit behind those of n; ok is false where c is none, or the
// number no longer fits.
func appendDigit(n uint64, c byte) (_ uint64, ok bool) {
	digit := uint64(c - '0')
	if !isDigit(c) || n > (math.MaxUint64-digit)/10 {
		return 0, false
	}
	return n*10 + digit, true
}
