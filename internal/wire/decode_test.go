package wire

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"
)

func decode(frame string) (Message, error) {
	var d Decoder
	var m Message
	err := d.Decode([]byte(frame), &m)
	return m, err
}

func nested(levels int) string {
	return strings.Repeat("[", levels) + strings.Repeat("]", levels)
}

func manyKeys(n int, last string) string {
	var b strings.Builder
	b.WriteString(`{"type":"heartbeat"`)
	for i := range n {
		fmt.Fprintf(&b, `,"k%d":0`, i)
	}
	return b.String() + `,"` + last + `":0}`
}

// fatalTests are what the protocol calls fatal for a session, and where.
var fatalTests = []struct{ name, frame, want string }{
	{"white space alone", " ", "no JSON object at byte 1"},
	{"a string", `"x"`, "no JSON object at byte 0"},
	{"an array", `[]`, "no JSON object at byte 0"},
	{"null", `null`, "no JSON object at byte 0"},
	{"a byte order mark", "\xef\xbb\xbf{}", "no JSON object at byte 0"},
	{"two objects", `{}{}`, "bytes after the object at byte 2"},
	{"a NUL behind", "{}\x00", "bytes after the object at byte 2"},

	{"cut off: brace", `{`, "no key at byte 1"},
	{"cut off: key", `{"a`, "unexpected end at byte 3"},
	{"cut off: colon", `{"a"`, "no : after a key at byte 4"},
	{"cut off: value", `{"a":`, "unexpected end at byte 5"},
	{"cut off: object", `{"a":1`, "unexpected end at byte 6"},
	{"cut off: comma", `{"a":1,`, "no key at byte 7"},
	{"cut off: array", `{"a":[1`, "unexpected end at byte 7"},
	{"cut off: element", `{"a":[`, "unexpected end at byte 6"},
	{"cut off: inner object", `{"a":{"b":1`, "unexpected end at byte 11"},
	{"cut off: literal", `{"a":tru`, "no JSON value at byte 5"},
	{"cut off: escape", `{"a":"\`, "bad escape at byte 6"},

	{"trailing comma", `{"a":1,}`, "no key at byte 7"},
	{"trailing comma inside", `{"a":[1,]}`, "no JSON value at byte 8"},
	{"trailing comma inside an object", `{"a":{"b":1,}}`, "no key at byte 12"},
	{"no comma", `{"a":1 "b":2}`, "neither , nor } after a member at byte 7"},
	{"no comma inside", `{"a":[1 2]}`, "neither , nor ] after a value at byte 8"},
	{"wrong bracket", `{"a":[1}`, "neither , nor ] after a value at byte 7"},
	{"wrong brace", `{"a":{"b":1]}`, "neither , nor } after a member at byte 11"},
	{"bare key", `{a:1}`, "no key at byte 1"},
	{"single quotes", `{'a':1}`, "no key at byte 1"},
	{"a comment", `{/**/}`, "no key at byte 1"},
	{"NaN", `{"a":NaN}`, "no JSON value at byte 5"},
	{"True", `{"a":True}`, "no JSON value at byte 5"},
	{"no-break space", "{\u00a0}", "no key at byte 1"},

	{"number 01", `{"a":01}`, "neither , nor } after a member at byte 6"},
	{"number -", `{"a":-}`, "bad number at byte 6"},
	{"number +1", `{"a":+1}`, "no JSON value at byte 5"},
	{"number .5", `{"a":.5}`, "no JSON value at byte 5"},
	{"number 1.", `{"a":1.}`, "bad number at byte 7"},
	{"number 1e", `{"a":1e}`, "bad number at byte 7"},
	{"number 1e+", `{"a":[1e+]}`, "bad number at byte 9"},
	{"number 0x1", `{"a":0x1}`, "neither , nor } after a member at byte 6"},
	{"number -.1", `{"a":-.1}`, "bad number at byte 6"},

	{"control byte in a key", "{\"a\n\":1}", "control byte in a string at byte 3"},
	{"control byte in a string", "{\"a\":\"long enough\x1f\"}", "control byte in a string at byte 17"},
	{"bad escape", `{"a":"\x41"}`, "bad escape at byte 6"},
	{"short escape", `{"a":"\u12"}`, "bad escape at byte 6"},
	{"bad digit", `{"a":"\u12g4"}`, "bad escape at byte 6"},
	{"cut escape", `{"a":"\u12`, "bad escape at byte 6"},

	{"UTF-8: a lone byte", "{\"a\":\"\xff\"}", "invalid UTF-8 at byte 6"},
	{"UTF-8: in a key", "{\"\x80\":1}", "invalid UTF-8 at byte 2"},
	{"UTF-8: deep inside", "{\"a\":[{\"b\":\"ok so far \xc3(\"}]}", "invalid UTF-8 at byte 22"},
	{"UTF-8: overlong", "{\"a\":\"\xc0\x80\"}", "invalid UTF-8 at byte 6"},
	{"UTF-8: a surrogate", "{\"a\":\"\xed\xa0\x80\"}", "invalid UTF-8 at byte 6"},
	{"UTF-8: beyond Unicode", "{\"a\":\"\xf4\x90\x80\x80\"}", "invalid UTF-8 at byte 6"},
	{"UTF-8: cut off", "{\"a\":\"\xe2\x82\"}", "invalid UTF-8 at byte 6"},
	{"UTF-8: outside strings", "{\"a\":\xff}", "no JSON value at byte 5"},

	{"surrogate: high alone", `{"a":"\ud800"}`, "lone surrogate escape at byte 6"},
	{"surrogate: low alone", `{"a":"\udc00"}`, "lone surrogate escape at byte 6"},
	{"surrogate: the wrong way round", `{"a":"\udc00\ud800"}`, "lone surrogate escape at byte 6"},
	{"surrogate: two high", `{"a":"\uD800\uD800"}`, "lone surrogate escape at byte 6"},
	{"surrogate: high and a letter", `{"a":"\ud800x12345"}`, "lone surrogate escape at byte 6"},
	{"surrogate: high and a newline", `{"a":"\ud800\ndc00"}`, "lone surrogate escape at byte 6"},
	{"surrogate: high and no low", `{"a":"\ud800\u0041"}`, "lone surrogate escape at byte 6"},
	{"surrogate: in a key", `{"\udfff":1}`, "lone surrogate escape at byte 2"},
	{"surrogate: deep inside", `{"a":[["\udbff"]]}`, "lone surrogate escape at byte 8"},

	{"twice: type", `{"type":"heartbeat","type":"heartbeat"}`, "duplicate key at byte 21"},
	{"twice: payload", `{"payload":1,"type":"publish","payload":1}`, "duplicate key at byte 31"},
	{"twice: unknown", `{"a":1,"b":1,"a":2}`, "duplicate key at byte 14"},
	{"twice: empty", `{"":1,"":2}`, "duplicate key at byte 7"},
	{"twice: escaped", `{"type":"heartbeat","\u0074ype":1}`, "duplicate key at byte 21"},
	{"twice: unknown, escaped", `{"\u00e4":1,"ä":1}`, "duplicate key at byte 13"},
	{"twice: unknown, both escaped", `{"\/":1,"\u002f":1}`, "duplicate key at byte 9"},
	{"twice: surrogates", `{"\ud83d\ude00":1,"😀":1}`, "duplicate key at byte 19"},
	{"twice: the last of few", manyKeys(linearKeys, "k0"), "duplicate key at byte "},
	{"twice: the last of many", manyKeys(2000, "k1234"), "duplicate key at byte "},

	{"too deep: arrays", `{"a":` + nested(MaxDepth) + `}`, "nesting too deep at byte 36"},
	{"too deep: objects", strings.Repeat(`{"a":`, MaxDepth+1) + `1` + strings.Repeat(`}`, MaxDepth+1), "nesting too deep at byte 160"},
	{"too deep: far too", `{"a":` + nested(30000) + `}`, "nesting too deep at byte 36"},
}

func TestDecodeFatal(t *testing.T) {
	for _, tt := range fatalTests {
		t.Run(tt.name, func(t *testing.T) {
			m, err := decode(tt.frame)
			if !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
			if !reflect.DeepEqual(m, Message{}) {
				t.Errorf("the message holds %+v", m)
			}
		})
	}
	for _, size := range []int{0, MaxFrame + 1} {
		if _, err := decode(strings.Repeat(" ", size)); !errors.Is(err, ErrFrameSize) {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}

func TestDecode(t *testing.T) {
	b := func(s string) []byte { return []byte(s) }
	publish := func(m Message) Message {
		m.Type, m.TypeName = TypePublish, b("publish")
		return m
	}
	subscribe := func(m Message) Message {
		m.Type, m.TypeName = TypeSubscribe, b("subscribe")
		return m
	}
	ack := func(m Message) Message {
		m.Type, m.TypeName = TypeAck, b("ack")
		return m
	}
	at := time.Date(2026, 11, 23, 21, 3, 0, 500, time.UTC)
	for _, tt := range []struct {
		frame string
		want  Message
	}{
		{`{"type":"heartbeat"}`, Message{Type: TypeHeartbeat, TypeName: b("heartbeat")}},
		{" {\t\"type\" :\r\n\"heartbeat\" } \n", Message{Type: TypeHeartbeat, TypeName: b("heartbeat")}},
		{`{"type":"heart\u0062eat","topic":5,"payload":{}}`, Message{Type: TypeHeartbeat, TypeName: b("heartbeat")}},
		{`{"type":"dance","topic":5,"x":{"x":1,"x":2}}`, Message{TypeName: b("dance")}},
		{`{"type":""}`, Message{TypeName: b("")}},
		{`{"type":"Publish"}`, Message{TypeName: b("Publish")}},
		{`{}`, Message{Bad: "type must be a string"}},
		{`{"type":5,"topic":"t"}`, Message{Bad: "type must be a string"}},
		{`{"type":null}`, Message{Bad: "type must be a string"}},
		{`{"Type":"publish"}`, Message{Bad: "type must be a string"}},

		{`{"type":"publish"}`, publish(Message{})},
		{`{"payload":null,"topic":"t","type":"publish"}`, publish(Message{Topic: b("t"), Payload: b("null")})},
		{
			`{"type":"publish","topic":"t","payload":{"a":1.50e+07},"id":"i","reply":"r"}`,
			publish(Message{Topic: b("t"), Payload: b(`{"a":1.50e+07}`), ID: b("i"), Reply: b("r")}),
		},
		{`{"type":"publish","topic":"","reply":""}`, publish(Message{Topic: b(""), Reply: b("")})},
		{
			`{"type":"publish","topic":"\u0061\/\t","id":"\ud83d\ude00\"\\","\u0072eply":"\b\f\n\r"}`,
			publish(Message{Topic: b("a/\t"), ID: b(`😀"\`), Reply: b("\b\f\n\r")}),
		},
		{
			`{"type":"publish","payload": [ 1 , { "a b" : "c \" d" , "e":[ ] } , "\\" ] }`,
			publish(Message{Payload: b(`[1,{"a b":"c \" d","e":[]},"\\"]`)}),
		},
		{`{"type":"publish","payload":` + "\n\t" + `"a  b\u0020"` + "\r" + `}`, publish(Message{Payload: b(`"a  b\u0020"`)})},
		{`{"type":"publish","payload":{"a":1,"a":2}}`, publish(Message{Payload: b(`{"a":1,"a":2}`)})},
		{`{"type":"publish","payload":123456789012345678901234567890.10}`, publish(Message{Payload: b(`123456789012345678901234567890.10`)})},
		{`{"type":"publish","payload":` + nested(MaxDepth-1) + `}`, publish(Message{Payload: b(nested(MaxDepth - 1))})},
		{`{"type":"publish","topic":5,"id":"i"}`, publish(Message{ID: b("i"), Bad: "topic must be a string"})},
		{`{"type":"publish","topic":null}`, publish(Message{Bad: "topic must be a string"})},
		{`{"type":"publish","id":7}`, publish(Message{Bad: "id must be a string"})},
		{`{"type":"publish","id":""}`, publish(Message{ID: b(""), Bad: "id must be 1 to 128 bytes long"})},
		{`{"type":"publish","reply":["r"]}`, publish(Message{Bad: "reply must be a string"})},
		{
			// Of a guest the broker knows none of these; of a broker a guest does.
			`{"type":"publish","seq":"x","vm":1,"time":{},"subscription":[],"from":{},"sub":1,"cursor":1,"ack":1,"status":1}`,
			publish(Message{}),
		},
		{
			`{"type":"publish","topic":"t","subscription":"s","vm":"web1","seq":42,"time":"2026-11-23T21:03:00.123456Z","payload":1}`,
			publish(Message{
				Topic: b("t"), Subscription: b("s"), VM: b("web1"), Seq: 42, HasSeq: true,
				Time: b("2026-11-23T21:03:00.123456Z"), Payload: b("1"),
			}),
		},

		{`{"type":"subscribe","topic":"t"}`, subscribe(Message{Topic: b("t")})},
		{
			`{"type":"subscribe","topic":"t","sub":"s","from":"start","cursor":"c","payload":1}`,
			subscribe(Message{Topic: b("t"), Sub: b("s"), HasFrom: true, From: From{Kind: FromStart}, Cursor: b("c")}),
		},
		{`{"type":"subscribe","topic":{}}`, subscribe(Message{Bad: "topic must be a string"})},
		{`{"type":"subscribe","sub":1}`, subscribe(Message{Bad: "sub must be a string"})},
		{
			`{"type":"subscribe","sub":""}`,
			subscribe(Message{Sub: b(""), Bad: "sub must be 1 to 64 of A-Za-z0-9._- and begin with a letter or digit"}),
		},
		{`{"type":"subscribe","cursor":true}`, subscribe(Message{Bad: "cursor must be a string"})},
		{
			`{"type":"subscribe","cursor":"a/b"}`,
			subscribe(Message{Cursor: b("a/b"), Bad: "cursor must be 1 to 64 of A-Za-z0-9._- and begin with a letter or digit"}),
		},
		{`{"type":"subscribe","from":"now"}`, subscribe(Message{HasFrom: true})},
		{`{"type":"subscribe","from":"\u006eow"}`, subscribe(Message{HasFrom: true})},
		{`{"type":"subscribe","from":0}`, subscribe(Message{HasFrom: true, From: From{Kind: FromSeq}})},
		{`{"type":"subscribe","from":18446744073709551615}`, subscribe(Message{HasFrom: true, From: From{Kind: FromSeq, N: 1<<64 - 1}})},
		{`{"type":"subscribe","from":-10}`, subscribe(Message{HasFrom: true, From: From{Kind: FromLast, N: 10}})},
		{`{"type":"subscribe","from":"2026-11-23T21:03:00.0000005Z"}`, subscribe(Message{HasFrom: true, From: From{Kind: FromTime, Time: at}})},

		{
			`{"type":"unsubscribe","subscription":"vm:web1/>","topic":"t"}`,
			Message{Type: TypeUnsubscribe, TypeName: b("unsubscribe"), Subscription: b("vm:web1/>"), Topic: b("t")},
		},
		{
			`{"type":"unsubscribe","subscription":1,"topic":2}`,
			Message{Type: TypeUnsubscribe, TypeName: b("unsubscribe"), Bad: "subscription must be a string"},
		},
		{`{"type":"unsubscribe","topic":2}`, Message{Type: TypeUnsubscribe, TypeName: b("unsubscribe"), Bad: "topic must be a string"}},

		{
			`{"type":"ack","ack":"publish","subscription":"s","seq":18446744073709551615}`,
			ack(Message{Ack: b("publish"), Subscription: b("s"), Seq: 1<<64 - 1, HasSeq: true}),
		},
		{
			`{"type":"ack","ack":"publish","status":"error","code":"c","reason":"r","retry_after_ms":20,"topic":"t","id":"i"}`,
			ack(Message{Ack: b("publish"), Status: b("error"), Code: b("c"), Reason: b("r"), RetryAfterMS: 20, Topic: b("t"), ID: b("i")}),
		},
		{`{"type":"ack","status":1,"code":1,"reason":1,"retry_after_ms":-1,"topic":1,"id":1}`, ack(Message{})},
		{`{"type":"ack","retry_after_ms":18446744073709551615}`, ack(Message{RetryAfterMS: 1<<63 - 1})},
		{`{"type":"ack","ack":1}`, ack(Message{Bad: "ack must be a string"})},
		{`{"type":"ack","subscription":1}`, ack(Message{Bad: "subscription must be a string"})},
		{`{"type":"ack","seq":7.0e1}`, ack(Message{Seq: 70, HasSeq: true})},
		{`{"type":"ack","seq":7.5}`, ack(Message{Bad: "seq must be an integer of 0 or more within 64 bits"})},
		{`{"type":"ack","seq":"1"}`, ack(Message{Bad: "seq must be an integer of 0 or more within 64 bits"})},

		{
			`{"type":"gap","subscription":"s","from":3,"to":9}`,
			Message{Type: TypeGap, TypeName: b("gap"), Subscription: b("s"), GapFrom: 3, GapTo: 9},
		},
		{`{"type":"gap","from":"now","to":-1}`, Message{Type: TypeGap, TypeName: b("gap")}},
		{`{"type":"error","code":"c","reason":"r"}`, Message{Type: TypeError, TypeName: b("error"), Code: b("c"), Reason: b("r")}},
		{`{"type":"error","code":1,"reason":2}`, Message{Type: TypeError, TypeName: b("error")}},

		{manyKeys(linearKeys, "last"), Message{Type: TypeHeartbeat, TypeName: b("heartbeat")}},
		{manyKeys(5000, "last"), Message{Type: TypeHeartbeat, TypeName: b("heartbeat")}},
		// encoding/json would take these for "type" and "topic" as well.
		{`{"type":"publish","TYPE":1,"Topic":2,"topic ":3}`, publish(Message{})},
	} {
		got, err := decode(tt.frame)
		if err != nil || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%.200s: %v\n got %+v\nwant %+v", tt.frame, err, got, tt.want)
		}
	}
}

// An integer is one however it is written, and a time's letters may be small.
func TestDecodeFromForms(t *testing.T) {
	at := time.Date(2026, 11, 23, 21, 3, 0, 0, time.UTC)
	for from, want := range map[string]From{
		`5.0`:                      {Kind: FromSeq, N: 5},
		`1e3`:                      {Kind: FromSeq, N: 1000},
		`1.25E+2`:                  {Kind: FromSeq, N: 125},
		`1200e-2`:                  {Kind: FromSeq, N: 12},
		`10.0200e2`:                {Kind: FromSeq, N: 1002},
		`0e99999999999999999999`:   {Kind: FromSeq},
		`0.00`:                     {Kind: FromSeq},
		`0.05e2`:                   {Kind: FromSeq, N: 5},
		`1.8446744073709551615e19`: {Kind: FromSeq, N: 1<<64 - 1},
		`-2.0`:                     {Kind: FromLast, N: 2},
		`-1e1`:                     {Kind: FromLast, N: 10},
		`"2026-11-23t21:03:00z"`:   {Kind: FromTime, Time: at},
		`"2026-11-23t21:03:00Z"`:   {Kind: FromTime, Time: at},
	} {
		m, err := decode(`{"type":"subscribe","topic":"t","from":` + from + `}`)
		if err != nil || m.Bad != "" || !reflect.DeepEqual(m.From, want) {
			t.Errorf("from %s: %v, %q, %+v, want %+v", from, err, m.Bad, m.From, want)
		}
	}
}

func TestDecodeBadFrom(t *testing.T) {
	for _, from := range []string{
		`null`, `true`, `{}`, `[1]`, `""`, `"later"`, `"NOW"`, `"5"`, `"-5"`, `1.5`, `15e-1`, `-1.5`, `1e-2`, `1e20`, `1e999999999999999999999`, `1844674407370955161.6e1`, `5e-99999999999999999999`,
		`18446744073709551616`, `99999999999999999999`, `100000000000000000000`, `-18446744073709551616`,
		`"2026-11-23"`, `"2026-11-23T21:03:00"`, `"2026-11-23 21:03:00Z"`, `"2026-11-23T21:03:00,5Z"`, `"2026-02-30T00:00:00Z"`,
		`"2026-11-23T1:03:00Z"`, `"2026-11-23T21:03:00+24:00"`, `"2026-11-23T21:03:00+01:60"`, `"2026-11-23T21:03:00.Z"`, `"2026-11-23x21:03:00Z"`,
	} {
		m, err := decode(`{"type":"subscribe","topic":"t","from":` + from + `}`)
		if err != nil || !strings.HasPrefix(m.Bad, "from must be ") {
			t.Errorf("from %s: %v, %q", from, err, m.Bad)
		}
	}
}

func TestDecodeSizes(t *testing.T) {
	quoted := func(n int) string { return `"` + strings.Repeat("x", n-2) + `"` }
	for _, tt := range []struct {
		name, frame   string
		bad, tooLarge bool
	}{
		{"id of 128", `{"type":"publish","id":` + quoted(130) + `}`, false, false},
		{"id of 129", `{"type":"publish","id":` + quoted(131) + `}`, true, false},
		{"id of 128 with escapes", `{"type":"publish","id":"` + strings.Repeat(`\n`, 128) + `"}`, false, false},
		{"id of 65 letters in two bytes", `{"type":"publish","id":"` + strings.Repeat(`ö`, 65) + `"}`, true, false},
		{"sub of 64", `{"type":"subscribe","sub":` + quoted(66) + `}`, false, false},
		{"sub of 65", `{"type":"subscribe","sub":` + quoted(67) + `}`, true, false},
		{"cursor of 64", `{"type":"subscribe","cursor":` + quoted(66) + `}`, false, false},
		{"cursor of 65", `{"type":"subscribe","cursor":` + quoted(67) + `}`, true, false},
		{"topic of 300: the topic's validity is not the frame's", `{"type":"publish","topic":` + quoted(302) + `}`, false, false},
		{"payload at the limit", `{"type":"publish","payload":` + quoted(MaxPayload) + `}`, false, false},
		{"payload beyond it", `{"type":"publish","payload":` + quoted(MaxPayload+1) + `}`, false, true},
		{"payload within it without white space", `{"type":"publish","payload":[` + quoted(MaxPayload-2) + strings.Repeat(" ", 99) + `]}`, false, false},
		{"payload beyond it for white space in a string", `{"type":"publish","payload":["` + strings.Repeat(" ", MaxPayload-3) + `"]}`, false, true},
		{"payload that is ignored", `{"type":"heartbeat","payload":` + quoted(MaxPayload+1) + `}`, false, false},
	} {
		m, err := decode(tt.frame)
		if err != nil || (m.Bad != "") != tt.bad || m.TooLarge != tt.tooLarge {
			t.Errorf("%s: %v, bad %q, too large %v", tt.name, err, m.Bad, m.TooLarge)
		}
	}
}

// The scanner looks at eight bytes at a time; every byte must count wherever it
// stands in them, and whatever its neighbours are.
func TestStringBytes(t *testing.T) {
	for c := range 256 {
		want := 0x20 <= c && c < 0x80 && c != '"' && c != '\\'
		for before := range 18 {
			for _, fill := range []string{" ", "!", "#", "\x7f", "[", "]"} {
				text := strings.Repeat(fill, before) + string([]byte{byte(c)}) + strings.Repeat(fill, 9)
				m, err := decode(`{"type":"publish","payload":"` + text + `"}`)
				if got := err == nil; got != want || got && string(m.Payload) != `"`+text+`"` {
					t.Fatalf("byte %#02x behind %d of %q: %v", c, before, fill, err)
				}
			}
		}
	}
}

// What one frame held must not show in the next, nor be reached by appending to
// what a message points at.
func TestDecoderReuse(t *testing.T) {
	var d Decoder
	m := Message{Topic: []byte("old"), Seq: 9, HasSeq: true, Bad: "old", TooLarge: true, HasFrom: true}
	for range 2 {
		for _, frame := range []string{`{"type":"heartbeat","k1":0}`, manyKeys(40, "x"), `{"type":"heartbeat"}`} {
			if err := d.Decode([]byte(frame), &m); err != nil || m.Bad != "" || m.Topic != nil || m.HasSeq || m.TooLarge || m.HasFrom {
				t.Fatalf("%v, %+v", err, m)
			}
		}
		if err := d.Decode([]byte(`{"k1":0,"k1":0}`), &m); err == nil {
			t.Fatal("a duplicate passed")
		}
	}
	if err := d.Decode([]byte(`{"type":"publish","topic":"t","payload":[ 1 ],"id":"i"}`), &m); err != nil {
		t.Fatal(err)
	}
	for _, b := range [][]byte{m.Topic, m.ID, m.Payload} {
		if len(b) != cap(b) {
			t.Errorf("%s has room for more", b)
		}
	}
}

func TestDecoderMemory(t *testing.T) {
	var d Decoder
	var m Message
	if err := d.Decode([]byte(manyKeys(5000, "x")), &m); err != nil {
		t.Fatal(err)
	}
	if cap(d.unknown) > keptKeys {
		t.Errorf("the decoder keeps room for %d keys", cap(d.unknown))
	}
	frames := []string{
		string(publish256()),
		`{"type":"publish","topic":"\u0074","payload":[ 1, 2 ],"id":"\n","k1":1,"k2":2}`,
		`{"type":"subscribe","topic":"t","from":"2026-11-23T21:03:00Z"}`,
		`{"type":"ack","ack":"publish","subscription":"s","seq":5}`,
	}
	buf := make([]byte, 0, 4096)
	if n := testing.AllocsPerRun(100, func() {
		for _, frame := range frames {
			buf = append(buf[:0], frame...)
			if err := d.Decode(buf, &m); err != nil || m.Bad != "" {
				t.Fatal(err, m.Bad)
			}
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestCompact(t *testing.T) {
	for payload, want := range map[string]string{
		` null `: `null`, `1`: `1`, `"a b"`: `"a b"`, "\t[ 1 , { \"a\" : \" \" } ]\n": `[1,{"a":" "}]`,
		`{"a":1,"a":2}`:      `{"a":1,"a":2}`,
		nested(MaxDepth - 1): nested(MaxDepth - 1),
	} {
		src := []byte(payload)
		got, err := Compact(src)
		if err != nil || string(got) != want {
			t.Errorf("Compact(%q) = %q, %v", payload, got, err)
		}
		if string(src) != payload {
			t.Errorf("Compact changed %q to %q", payload, src)
		}
	}
	for _, payload := range []string{
		"", " ", "1 2", "{}x", "nul", `"`, `"\ud800"`, "\"\xff\"", "01", "[1,]", nested(MaxDepth), "{} \x00",
	} {
		if got, err := Compact([]byte(payload)); !errors.Is(err, ErrProtocol) || got != nil {
			t.Errorf("Compact(%q) = %q, %v", payload, got, err)
		}
	}
}
