package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"
)

// lawful says by other means, slowly and with encoding/json, whether b is what
// the protocol lets a frame, or with object unset a payload, be.
func lawful(b []byte, object bool, depth int) bool {
	if !json.Valid(b) || !utf8.Valid(b) || loneSurrogate(b) {
		return false
	}
	if object && !bytes.HasPrefix(bytes.TrimLeft(b, " \t\r\n"), []byte("{")) {
		return false
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	keys := map[string]bool{}
	isKey := false // the next token at level 1 is a key
	for level := 0; ; {
		token, err := d.Token()
		if err != nil {
			return true
		}
		switch token {
		case json.Delim('{'), json.Delim('['):
			level++
			isKey = object && level == 1
		case json.Delim('}'), json.Delim(']'):
			level--
			isKey = object && level == 1
		default:
			if !object || level != 1 {
				break
			}
			if key, ok := token.(string); ok && isKey {
				if keys[key] {
					return false
				}
				keys[key] = true
				isKey = false
			} else {
				isKey = true
			}
		}
		if level > depth {
			return false
		}
	}
}

// loneSurrogate looks for one in valid JSON, in which backslashes stand in
// strings alone.
func loneSurrogate(b []byte) bool {
	s := strings.ReplaceAll(string(b), `\\`, "x")
	high := false
	for len(s) > 0 {
		unit := ""
		if strings.HasPrefix(s, `\u`) {
			unit, s = strings.ToLower(s[2:6]), s[6:]
		} else {
			s = s[1:]
		}
		isLow := unit >= "dc00" && unit <= "dfff"
		if isLow != high {
			return true
		}
		high = unit >= "d800" && unit < "dc00"
	}
	return high
}

func FuzzDecode(f *testing.F) {
	for _, tt := range fatalTests {
		if len(tt.frame) < 1000 {
			f.Add([]byte(tt.frame))
		}
	}
	for _, frame := range []string{
		string(publish256()),
		`{"payload":[ 1.5e-7, {"a":"\u00e4\ud83d\ude00 größe"} ],"id":"\u0000","reply":"r","topic":"vm:web1/x","type":"publish"}`,
		`{"type":"subscribe","topic":"a.>","sub":"s","from":"2026-11-23T21:03:00Z","cursor":"c"}`,
		`{"type":"ack","ack":"publish","status":"ok","topic":"t","id":"i","seq":18446744073709551615}`,
		`{"type":"gap","subscription":"s","from":1,"to":2}`,
		manyKeys(linearKeys+2, "last"),
	} {
		f.Add([]byte(frame))
	}
	var d Decoder // one for all, to see whether a frame leaves anything behind
	f.Fuzz(func(t *testing.T, frame []byte) {
		if len(frame) > MaxFrame {
			return
		}
		var m, again Message
		err := d.Decode(bytes.Clone(frame), &m)
		if want := lawful(frame, true, MaxDepth); (err == nil) != want {
			t.Fatalf("lawful: %v, but Decode: %v", want, err)
		}
		if cap(d.unknown) > keptKeys {
			t.Fatal("the decoder keeps too much")
		}
		if err != nil {
			if !errors.Is(err, ErrProtocol) {
				t.Fatal(err)
			}
			return
		}
		if err := new(Decoder).Decode(bytes.Clone(frame), &again); err != nil || !reflect.DeepEqual(m, again) {
			t.Fatalf("a new decoder gives %+v, %v, not %+v", again, err, m)
		}
		checkMembers(t, frame, &m)
	})
}

// checkMembers compares m with what encoding/json finds in the frame.
func checkMembers(t *testing.T, frame []byte, m *Message) {
	t.Helper()
	var top map[string]json.RawMessage
	if err := json.Unmarshal(frame, &top); err != nil {
		t.Fatal(err)
	}
	text := func(key string) []byte {
		var s *string
		if json.Unmarshal(top[key], &s) != nil || s == nil {
			return nil
		}
		return []byte(*s)
	}
	number := func(key string) uint64 {
		var n uint64
		if json.Unmarshal(top[key], &n) != nil {
			return 0
		}
		return n
	}
	want := Message{TypeName: text("type")}
	switch string(want.TypeName) {
	case "publish":
		want.Type, want.Topic, want.ID, want.Reply = TypePublish, text("topic"), text("id"), text("reply")
		want.Subscription, want.VM, want.Time, want.Seq = text("subscription"), text("vm"), text("time"), number("seq")
		if raw, ok := top["payload"]; ok {
			var b bytes.Buffer
			if err := json.Compact(&b, raw); err != nil {
				t.Fatal(err)
			}
			want.Payload = b.Bytes()
		}
		want.TooLarge = len(want.Payload) > MaxPayload
	case "subscribe":
		want.Type, want.Topic, want.Sub, want.Cursor = TypeSubscribe, text("topic"), text("sub"), text("cursor")
	case "unsubscribe":
		want.Type, want.Topic, want.Subscription = TypeUnsubscribe, text("topic"), text("subscription")
	case "heartbeat":
		want.Type = TypeHeartbeat
	case "ack":
		want.Type, want.Ack, want.Subscription, want.Seq = TypeAck, text("ack"), text("subscription"), number("seq")
		want.Topic, want.ID, want.Status = text("topic"), text("id"), text("status")
		want.Code, want.Reason = text("code"), text("reason")
	case "gap":
		want.Type, want.Subscription, want.GapFrom, want.GapTo = TypeGap, text("subscription"), number("from"), number("to")
	case "error":
		want.Type, want.Code, want.Reason = TypeError, text("code"), text("reason")
	}
	got := *m
	got.Bad, got.From, got.HasFrom, got.HasSeq, got.RetryAfterMS = "", From{}, false, false, 0 // the tables' business
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("got %+v\nwant %+v", got, want)
	}
	if m.TypeName == nil && m.Bad == "" || m.Topic == nil && top["topic"] != nil && m.Type == TypePublish && m.Bad == "" {
		t.Fatalf("nothing bad in %+v", m)
	}
}

func FuzzCompact(f *testing.F) {
	for _, payload := range []string{` [ 1 , "a \" b" , { "c" : null } ] `, `"\ud83d\ude00"`, nested(MaxDepth - 1), nested(MaxDepth), "1 2", "\"\xff\""} {
		f.Add([]byte(payload))
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		before := bytes.Clone(payload)
		got, err := Compact(payload)
		if !bytes.Equal(payload, before) {
			t.Fatal("Compact changed the payload")
		}
		if want := lawful(payload, false, MaxDepth-1); (err == nil) != want {
			t.Fatalf("lawful: %v, but Compact: %v", want, err)
		}
		if err != nil {
			return
		}
		var want bytes.Buffer
		if err := json.Compact(&want, payload); err != nil || !bytes.Equal(got, want.Bytes()) {
			t.Fatalf("%q, want %q, %v", got, want.Bytes(), err)
		}
		// What D-Bus takes must come out of a frame as it went in.
		if len(got) <= MaxPayload {
			m, err := decode(string(AppendPublishFrame(nil, "t", "", "", got)[prefixLen:]))
			if err != nil || !bytes.Equal(m.Payload, got) {
				t.Fatalf("in a frame: %q, %v", m.Payload, err)
			}
		}
	})
}
