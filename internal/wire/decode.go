package wire

import (
	"bytes"
	"fmt"
	"slices"
)

// member is a top-level member that some type of message knows.
type member uint8

const (
	mType member = iota
	mTopic
	mPayload
	mID
	mReply
	mSub
	mFrom
	mCursor
	mSubscription
	mAck
	mSeq
	mStatus
	mCode
	mReason
	mVM
	mTime
	mTo
	mRetryAfter
	mUnknown
)

func memberOf(key []byte) member {
	switch string(key) {
	case "type":
		return mType
	case "topic":
		return mTopic
	case "payload":
		return mPayload
	case "id":
		return mID
	case "reply":
		return mReply
	case "sub":
		return mSub
	case "from":
		return mFrom
	case "cursor":
		return mCursor
	case "subscription":
		return mSubscription
	case "ack":
		return mAck
	case "seq":
		return mSeq
	case "status":
		return mStatus
	case "code":
		return mCode
	case "reason":
		return mReason
	case "vm":
		return mVM
	case "time":
		return mTime
	case "to":
		return mTo
	case "retry_after_ms":
		return mRetryAfter
	}
	return mUnknown
}

// value is where a known member's value lies in the frame.
type value struct {
	span
	escaped bool // a string with escapes in it
	spaced  bool // white space lies between its tokens
}

// span is a half-open range of the frame's bytes.
type span struct{ start, end uint32 }

func (s span) of(frame []byte) []byte { return frame[s.start:s.end] }

// Decoder decodes one message after another. The zero value is ready. It is for
// one goroutine at a time.
type Decoder struct {
	unknown []span // keys that no type knows, without quotes and escapes
}

const (
	// linearKeys is how many unknown keys are compared with each other one by
	// one; of more, which only a hostile or very new peer sends, the keys are
	// sorted once the frame is read, so that the work stays in proportion to it.
	linearKeys = 16
	// keptKeys is for how many unknown keys a Decoder keeps memory between
	// frames: thousands of sessions each have one.
	keptKeys = 64
)

// Decode checks frame, without its length prefix, and takes it apart into m,
// which it resets first. An error wraps ErrProtocol, says what is wrong and at
// which byte, and is fatal for the connection: frame is no single JSON object
// within MaxFrame and MaxDepth, is not UTF-8, escapes half a surrogate pair, or
// has a key twice. What a session survives is in m.Bad and m.TooLarge.
//
// Decode removes escapes and white space in place: frame's bytes are not to be
// used afterwards, but through m.
func (d *Decoder) Decode(frame []byte, m *Message) error {
	*m = Message{}
	if len(frame) == 0 || len(frame) > MaxFrame {
		return fmt.Errorf("%w: %d", ErrFrameSize, len(frame))
	}
	s := scan{b: frame, maxLevel: MaxDepth}
	f := members{frame: frame}
	i := d.object(&s, &f)
	if i >= 0 {
		if i = s.space(i); i < len(frame) {
			i = s.fail(i, "bytes after the object")
		}
	}
	if i >= 0 && len(d.unknown) > linearKeys {
		i = d.sortUnknown(&s)
	}
	d.unknown = d.unknown[:0]
	if cap(d.unknown) > keptKeys {
		d.unknown = nil
	}
	if i < 0 {
		return s.err()
	}
	f.fill(m)
	return nil
}

// object checks the frame's own object and notes where its members lie. What
// they mean is decided later, since "type" may come last.
func (d *Decoder) object(s *scan, f *members) int {
	b := s.b
	i := s.space(0)
	if i >= len(b) || b[i] != '{' {
		return s.fail(i, "no JSON object")
	}
	if i = s.space(i + 1); i < len(b) && b[i] == '}' {
		return i + 1
	}
	for {
		if i >= len(b) || b[i] != '"' {
			return s.fail(i, "no key")
		}
		start := i + 1
		end, escaped := s.str(start)
		if end < 0 {
			return end
		}
		key := span{uint32(start), uint32(end - 1)}
		if escaped {
			key.end = key.start + uint32(len(unescape(key.of(b))))
		}
		known := memberOf(key.of(b))
		if known == mUnknown {
			if !d.note(b, key) {
				return s.fail(start, "duplicate key")
			}
		} else if f.has(known) {
			return s.fail(start, "duplicate key")
		}
		if i = s.colon(end); i < 0 {
			return i
		}
		v := value{span: span{start: uint32(i)}}
		if i < len(b) && b[i] == '"' {
			i, v.escaped = s.str(i + 1)
		} else {
			spaces := s.spaces
			i = s.value(i, 1)
			v.spaced = s.spaces != spaces
		}
		if i < 0 {
			return i
		}
		if known != mUnknown {
			v.end = uint32(i)
			f.at[known] = v
			f.seen |= 1 << known
		}
		switch i = s.space(i); {
		case i >= len(b):
			return s.fail(i, "unexpected end")
		case b[i] == '}':
			return i + 1
		case b[i] != ',':
			return s.fail(i, "neither , nor } after a member")
		}
		i = s.space(i + 1)
	}
}

// note keeps an unknown key and reports whether it is new, as far as that can be
// told in bounded time.
func (d *Decoder) note(frame []byte, key span) bool {
	if len(d.unknown) < linearKeys {
		for _, k := range d.unknown {
			if bytes.Equal(k.of(frame), key.of(frame)) {
				return false
			}
		}
	}
	d.unknown = append(d.unknown, key)
	return true
}

// sortUnknown finds duplicates among many unknown keys.
func (d *Decoder) sortUnknown(s *scan) int {
	slices.SortFunc(d.unknown, func(a, b span) int { return bytes.Compare(a.of(s.b), b.of(s.b)) })
	for i, k := range d.unknown[1:] {
		if bytes.Equal(k.of(s.b), d.unknown[i].of(s.b)) {
			return s.fail(int(max(k.start, d.unknown[i].start)), "duplicate key")
		}
	}
	return 0
}

// Compact checks that payload is one JSON value by the rules of Decode, nested
// so deep at most that a frame can hold it, and gives a copy without white space
// outside strings. Errors wrap ErrProtocol and say what is wrong and where. The
// payload's length is the caller's to limit.
func Compact(payload []byte) ([]byte, error) {
	s := scan{b: payload, maxLevel: MaxDepth - 1}
	i := s.value(s.space(0), 0)
	if i >= 0 {
		if i = s.space(i); i < len(payload) {
			i = s.fail(i, "bytes after the value")
		}
	}
	if i < 0 {
		return nil, s.err()
	}
	return compact(make([]byte, 0, len(payload)-s.spaces), payload), nil
}

// compact appends the checked JSON in src to dst without white space outside
// strings. The two may share their first byte.
func compact(dst, src []byte) []byte {
	from := 0 // what lies before is appended, or was white space
	for i := 0; i < len(src); i++ {
		switch c := src[i]; {
		case c == '"':
			for i++; src[i] != '"'; i++ {
				if src[i] == '\\' {
					i++ // whatever is escaped, it does not end the string
				}
			}
		case c <= ' ':
			dst = append(dst, src[from:i]...)
			from = i + 1
		}
	}
	return append(dst, src[from:]...)
}
