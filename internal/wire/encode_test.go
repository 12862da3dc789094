package wire

import (
	"encoding/json"
	"math"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestEncoders(t *testing.T) {
	ack := func(a Ack) string { return string(AppendAckFrame(nil, &a)) }
	for _, tt := range []struct{ got, want string }{
		{
			string(AppendPublishFrame(nil, "t", "", "", nil)),
			`{"type":"publish","topic":"t","payload":null}`,
		},
		{
			string(AppendPublishFrame(nil, "", "i\n", "r", []byte(`{"a":1}`))),
			`{"type":"publish","id":"i\n","reply":"r","payload":{"a":1}}`,
		},
		{
			string(AppendSubscribeFrame(nil, "t", "", "", "")),
			`{"type":"subscribe","topic":"t"}`,
		},
		{
			string(AppendSubscribeFrame(nil, "t", "s", "-10", "c")),
			`{"type":"subscribe","topic":"t","sub":"s","from":-10,"cursor":"c"}`,
		},
		{string(AppendUnsubscribeFrame(nil, "s")), `{"type":"unsubscribe","subscription":"s"}`},
		{string(AppendHeartbeatFrame(nil)), `{"type":"heartbeat"}`},
		{
			string(AppendGuestAckFrame(nil, "s", math.MaxUint64)),
			`{"type":"ack","ack":"publish","subscription":"s","seq":18446744073709551615}`,
		},
		{string(AppendGapFrame(nil, "s", 1, 9)), `{"type":"gap","subscription":"s","from":1,"to":9}`},
		{string(AppendErrorFrame(nil, "c", "r")), `{"type":"error","code":"c","reason":"r"}`},
		{ack(Ack{Kind: "heartbeat"}), `{"type":"ack","ack":"heartbeat","status":"ok"}`},
		{
			ack(Ack{Kind: "publish", Topic: []byte("t"), ID: []byte("i"), Seq: 7}),
			`{"type":"ack","ack":"publish","status":"ok","topic":"t","id":"i","seq":7}`,
		},
		{
			ack(Ack{Kind: "publish", Seq: 7, NotDurable: true, Reason: "unused", RetryAfterMS: 5}),
			`{"type":"ack","ack":"publish","status":"ok","seq":7,"durable":false}`,
		},
		{
			ack(Ack{Kind: "publish", Queued: true}),
			`{"type":"ack","ack":"publish","status":"ok","queued":true}`,
		},
		{
			ack(Ack{Kind: "subscribe", Topic: []byte("t"), Subscription: []byte("s")}),
			`{"type":"ack","ack":"subscribe","status":"ok","topic":"t","subscription":"s"}`,
		},
		{
			ack(Ack{Kind: "publish", Code: "rate-limited", Reason: `too "fast"`, RetryAfterMS: 20, Topic: []byte("t"), ID: []byte("i")}),
			`{"type":"ack","ack":"publish","status":"error","code":"rate-limited","reason":"too \"fast\"","retry_after_ms":20,"topic":"t","id":"i"}`,
		},
		{
			// What was refused for its length is not sent back.
			ack(Ack{
				Kind: "publish", Code: "bad-topic", Reason: "r", Topic: []byte(strings.Repeat("\x01", MaxTopic+1)),
				Subscription: []byte(strings.Repeat("s", MaxTopic+1)), ID: []byte(strings.Repeat("i", MaxID+1)),
			}),
			`{"type":"ack","ack":"publish","status":"error","code":"bad-topic","reason":"r"}`,
		},
	} {
		if tt.got != frameOf(tt.want) {
			t.Errorf("got  %q\nwant %q", tt.got, frameOf(tt.want))
		}
		var m Message
		if err := new(Decoder).Decode([]byte(tt.got[prefixLen:]), &m); err != nil || m.Type == TypeUnknown || m.Bad != "" {
			t.Errorf("%s: %v, %q", tt.got, err, m.Bad)
		}
	}
	if got, want := string(AppendAck([]byte("kept"), &Ack{Kind: "heartbeat"})), `kept{"type":"ack","ack":"heartbeat","status":"ok"}`; got != want {
		t.Errorf("AppendAck = %s", got)
	}
}

// Whatever a publish may legally hold, it fits a frame in either direction.
func TestLargestPublishFits(t *testing.T) {
	topic, id := strings.Repeat("t", MaxTopic), strings.Repeat("\x01", MaxID)
	payload := []byte(`"` + strings.Repeat("x", MaxPayload-2) + `"`)
	frame := AppendPublishFrame(nil, topic, id, topic, payload)
	// A delivery adds these to what the publish holds.
	added := `,"subscription":"","vm":"","seq":,"time":"2026-11-23T21:03:00.123456Z"`
	size := len(frame) - prefixLen + len(added) + MaxTopic + MaxName + len("18446744073709551615")
	if size > MaxFrame {
		t.Errorf("the largest delivery takes %d bytes", size)
	}
	var m Message
	if err := new(Decoder).Decode(frame[prefixLen:], &m); err != nil || m.TooLarge || m.Bad != "" {
		t.Errorf("%v, %v, %q", err, m.TooLarge, m.Bad)
	}
}

func TestAppendString(t *testing.T) {
	for s, want := range map[string]string{
		"": `""`, "plain": `"plain"`, `a"b\c/`: `"a\"b\\c/"`,
		"\b\f\n\r\t\x00\x1f\x7f": `"\b\f\n\r\t\u0000\u001f\u007f"`,
		"größe \u2028 😀":         "\"größe \u2028 😀\"",
		"\xff":                   "\"\uFFFD\"", "a\xe2\x82b": "\"a\uFFFD\uFFFDb\"", "\xed\xa0\x80": "\"\uFFFD\uFFFD\uFFFD\"",
		"\xf0\x9f\x98": "\"\uFFFD\uFFFD\uFFFD\"", "\uFFFD": "\"\uFFFD\"", "\xc0\x80": "\"\uFFFD\uFFFD\"",
	} {
		if got := string(AppendString(nil, s)); got != want {
			t.Errorf("AppendString(%q) = %s, want %s", s, got, want)
		}
		if got := string(AppendString([]byte("kept"), []byte(s))); got != "kept"+want {
			t.Errorf("AppendString of the bytes %q = %s", s, got)
		}
	}
}

func FuzzAppendString(f *testing.F) {
	f.Add("a\"\\\x00\xff\u2028😀")
	f.Fuzz(func(t *testing.T, s string) {
		got := AppendString(nil, s)
		var back string
		if err := json.Unmarshal(got, &back); err != nil || !utf8.Valid(got) {
			t.Fatalf("%q became %q: %v", s, got, err)
		}
		if want := string([]rune(s)); back != want {
			t.Fatalf("%q came back as %q", s, back)
		}
	})
}

func TestEncodersDoNotAllocate(t *testing.T) {
	buf := make([]byte, 0, 1024)
	ack := Ack{Kind: "publish", Topic: []byte("größe"), ID: []byte("i\n"), Seq: 7}
	if n := testing.AllocsPerRun(100, func() {
		buf = AppendAckFrame(buf[:0], &ack)
		buf = AppendGapFrame(buf[:0], "s", 1, 2)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
