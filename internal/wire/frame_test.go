package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

func frameOf(body string) string { return string(AppendFrame(nil, []byte(body))) }

func TestNextFrame(t *testing.T) {
	full := strings.Repeat("x", MaxFrame)
	for _, tt := range []struct {
		name, buf, frame, rest string
		whole                  bool
		err                    error
	}{
		{name: "empty"},
		{name: "part of the length", buf: "\x00\x00\x00", rest: "\x00\x00\x00"},
		{name: "length alone", buf: "\x00\x00\x00\x01", rest: "\x00\x00\x00\x01"},
		{name: "part of the body", buf: "\x00\x00\x00\x02a", rest: "\x00\x00\x00\x02a"},
		{name: "one", buf: frameOf("a"), frame: "a", whole: true},
		{name: "one and a part", buf: frameOf("ab") + "\x00", frame: "ab", rest: "\x00", whole: true},
		{name: "two", buf: frameOf("ab") + frameOf("c"), frame: "ab", rest: frameOf("c"), whole: true},
		{name: "the longest", buf: frameOf(full), frame: full, whole: true},
		{name: "length 0", buf: "\x00\x00\x00\x00abc", rest: "\x00\x00\x00\x00abc", err: ErrFrameSize},
		{name: "one too long", buf: "\x00\x01\x00\x01", rest: "\x00\x01\x00\x01", err: ErrFrameSize},
		{name: "negative", buf: "\xff\xff\xff\xff", rest: "\xff\xff\xff\xff", err: ErrFrameSize},
		{name: "text", buf: "GET / HTTP/1.1", rest: "GET / HTTP/1.1", err: ErrFrameSize},
	} {
		t.Run(tt.name, func(t *testing.T) {
			frame, rest, err := NextFrame([]byte(tt.buf))
			if string(frame) != tt.frame || (frame != nil) != tt.whole || string(rest) != tt.rest || !errors.Is(err, tt.err) {
				t.Errorf("%.20q, %.20q, %v", frame, rest, err)
			}
			if tt.err != nil && !errors.Is(err, ErrProtocol) {
				t.Errorf("%v is no ErrProtocol", err)
			}
			if cap(frame) != len(frame) {
				t.Error("appending to the frame would overwrite the next one")
			}
		})
	}
}

func TestReadFrame(t *testing.T) {
	full := strings.Repeat("x", MaxFrame)
	stream := frameOf("a") + frameOf(full) + frameOf("bc")
	var buf []byte
	r := iotest.OneByteReader(strings.NewReader(stream))
	for _, want := range []string{"a", full, "bc"} {
		var err error
		if buf, err = ReadFrame(r, buf); err != nil || string(buf) != want {
			t.Fatalf("%.20q, %v", buf, err)
		}
	}
	if _, err := ReadFrame(r, buf); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}

	for stream, want := range map[string]error{
		"":                   io.EOF,
		"\x00":               ErrIncomplete,
		"\x00\x00\x00\x02":   ErrIncomplete,
		"\x00\x00\x00\x02a":  ErrIncomplete,
		"\x00\x00\x00\x00":   ErrFrameSize,
		"\x00\x01\x00\x01aa": ErrFrameSize,
	} {
		if frame, err := ReadFrame(strings.NewReader(stream), nil); !errors.Is(err, want) || frame != nil {
			t.Errorf("%q: %q, %v", stream, frame, err)
		}
	}
	broken := errors.New("broken")
	for _, r := range []io.Reader{
		iotest.ErrReader(broken),
		io.MultiReader(strings.NewReader("\x00\x00\x00\x02"), iotest.ErrReader(broken)),
	} {
		if _, err := ReadFrame(r, nil); !errors.Is(err, broken) || errors.Is(err, ErrIncomplete) {
			t.Errorf("a failing reader: %v", err)
		}
	}
}

// A peer that announces much and sends nothing must not make its reader pay for
// it, nor one long frame keep the reader from reusing its memory.
func TestReadFrameMemory(t *testing.T) {
	frame, err := ReadFrame(strings.NewReader(frameOf("abc")), make([]byte, 0, 100))
	if err != nil || cap(frame) != 100 {
		t.Errorf("a short frame: cap %d, %v", cap(frame), err)
	}
	if frame, err = ReadFrame(strings.NewReader(frameOf(strings.Repeat("x", 5000))), nil); err != nil || cap(frame) != 5000 {
		t.Errorf("a long frame: cap %d, %v", cap(frame), err)
	}
}

func TestBeginFrame(t *testing.T) {
	dst := []byte("kept")
	dst, mark := BeginFrame(dst)
	dst = append(dst, "body"...)
	EndFrame(dst, mark)
	if want := "kept" + frameOf("body"); string(dst) != want {
		t.Errorf("%q, want %q", dst, want)
	}
}

func FuzzNextFrame(f *testing.F) {
	for _, s := range []string{"", "\x00\x00\x00\x01", frameOf("a") + frameOf("bc"), frameOf("a") + "\x00\x00\x00\x00", "\x00\x01\x00\x01"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, stream []byte) {
		r := bytes.NewReader(stream)
		rest := stream
		var buf []byte
		for {
			frame, next, err := NextFrame(rest)
			var readErr error
			buf, readErr = ReadFrame(r, buf)
			switch {
			case err != nil:
				n := binary.BigEndian.Uint32(rest)
				if !errors.Is(err, ErrFrameSize) || !errors.Is(readErr, ErrFrameSize) || 0 < n && n <= MaxFrame {
					t.Fatalf("length %d: %v, %v", n, err, readErr)
				}
				return
			case frame == nil:
				if want := map[bool]error{true: io.EOF, false: ErrIncomplete}[len(rest) == 0]; !errors.Is(readErr, want) {
					t.Fatalf("%d bytes left: %v", len(rest), readErr)
				}
				return
			}
			if readErr != nil || !bytes.Equal(frame, buf) || len(frame)+prefixLen+len(next) != len(rest) {
				t.Fatalf("%q, %q, %v", frame, buf, readErr)
			}
			if again := AppendFrame(nil, frame); !bytes.HasPrefix(rest, again) {
				t.Fatalf("%q came out as %q", rest, again)
			}
			rest = next
		}
	})
}
