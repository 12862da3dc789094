package broker

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bus"

	"github.com/castrabus/castra/internal/wire"
)

// FuzzCursors reads whatever bytes as a VM's file of cursors.
func FuzzCursors(f *testing.F) {
	for _, text := range []string{
		`{"c":{"topic":"t","next":7}}`, `{}`, `null`, `{"c":null}`, `{"../x":{"topic":"t","next":1}}`, `{"c":{"topic":"t","next":-1}}`,
		`{"c":{"topic":"t","next":18446744073709551616}}`, `{"c":{"next":1,"next":2}}`, `[`, "\xff", `{"c":{"topic":7}}`,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		all, err := parseCursors(data)
		if err == nil && all == nil {
			t.Fatal("a map is awaited")
		}
		for name, cur := range all {
			if cur == nil || !wire.ValidSubName(name) {
				t.Errorf("%q gives %q: %v", data, name, cur)
			}
		}
	})
}

// FuzzReachable reads whatever bytes as the list of those who were reachable.
func FuzzReachable(f *testing.F) {
	for _, text := range []string{`{"seq":7,"reachable":["web1"]}`, `{}`, `null`, `{"reachable":["../x","host","web1","web1"]}`, `{"seq":-1}`, `{"reachable":[7]}`, `[`, `{"reachable":["\ud800"]}`} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		names, _, _ := parseReachable(data)
		if names == nil {
			t.Fatal("a map is awaited")
		}
		for name := range names {
			if !wire.ValidName(name) || wire.Reserved(name) {
				t.Errorf("%q gives %q", data, names)
			}
		}
	})
}

// FuzzSession says whatever frames, one a line, in a session of the VM g. What comes
// back is lawful, each frame at most once answered, and nothing of what another VM
// was sent; and the broker goes on for everybody else.
func FuzzSession(f *testing.F) {
	for _, frames := range []string{
		`{"type":"publish","topic":"vm:g/x","payload":{"a":1.50},"id":"i","reply":"vm:g"}`, `{"type":"heartbeat"}` + "\n" + `{"type":"dance"}`,
		`{"type":"subscribe","topic":"a.>","from":"start"}` + "\n" + `{"type":"publish","topic":"a.b"}` + "\n" + `{"type":"ack","ack":"publish","subscription":"a.>","seq":7}`,
		`{"type":"subscribe","topic":"vm:g","sub":"s","cursor":"c","from":-3}` + "\n" + `{"type":"subscribe","topic":"b","sub":"s"}` + "\n" + `{"type":"unsubscribe","subscription":"s"}`,
		`{"type":"subscribe","topic":">","from":1}` + "\n" + `{"type":"subscribe","topic":"*","from":"2026-11-23T21:03:00Z"}` + "\n" + `{"type":"subscribe","topic":"*.*","from":18446744073709551615}`,
		`{"type":"subscribe","topic":"vm:other/>","from":"start"}` + "\n" + `{"type":"subscribe","topic":"vm:*"}` + "\n" + `{"type":"subscribe","topic":"castra.presence","from":"start"}`,
		`{"type":"publish","topic":"vm:other","payload":1}` + "\n" + `{"type":"publish","topic":"castra.presence"}` + "\n" + `{"type":"publish","topic":""}`,
		`{"type":"subscribe","topic":"t","cursor":"../../x"}` + "\n" + `{"type":"unsubscribe"}` + "\n" + `{"type":"ack"}`,
		"", "\xff", `[]`, `{"type":"publish","payload":"` + strings.Repeat("x", 62_000) + `"}`,
	} {
		f.Add([]byte(frames))
	}
	dir := f.TempDir()
	o := testOptions(f, dir)
	o.SyncEvery, o.SyncName, o.SegmentSize, o.HostRetention, o.VMRetention = -1, "never", 64<<10, 1<<20, 512<<10
	o.HandshakeRate.Records = 0 // each input takes one
	o.UnsentBytes = 64 << 10
	b, err := Open(o)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = b.Close() })
	path := filepath.Join(dir, "bus.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		f.Fatal(err)
	}
	b.Serve(ln)
	const secret = "for-other-alone"
	secrets := func(t testing.TB) {
		for _, topic := range []string{"vm:other", "vm:other/x"} {
			if _, err := b.Publish(t.Context(), bus.PublishRequest{Topic: topic, Payload: []byte(`"` + secret + `"`)}); err != nil {
				t.Fatal(err)
			}
		}
	}
	inputs := 0
	f.Fuzz(func(t *testing.T, said []byte) {
		if inputs%100 == 0 { // what is kept goes
			secrets(t)
		}
		inputs++
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(hang))
		out := []byte("hello vm:g capabilities=bus-v1\n")
		frames := 0
		for line := range bytes.SplitSeq(said, []byte("\n")) {
			if len(line) <= wire.MaxFrame {
				out = wire.AppendFrame(out, line) // an empty line is a length of 0
				frames++
			}
		}
		go func() { // ends with the connection
			_, _ = conn.Write(out)
			_ = conn.(*net.UnixConn).CloseWrite()
		}()
		heard, err := io.ReadAll(conn)
		if err != nil && !isReset(err) {
			t.Fatal(err)
		}
		rest, greeted := bytes.CutPrefix(heard, []byte(wire.Greeting+"\nok session=sess-"))
		if !greeted {
			t.Fatalf("greeted with %.80q", heard)
		}
		checkHeard(t, rest[33:], frames, secret)
	})
}

// isReset tells whether the broker closed while something was still to be read.
func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// checkHeard looks at what the broker said to the VM g.
func checkHeard(t *testing.T, heard []byte, frames int, secret string) {
	t.Helper()
	var dec wire.Decoder
	var m wire.Message
	answers := 0
	for len(heard) > 0 {
		frame, rest, err := wire.NextFrame(heard)
		if err != nil || frame == nil {
			t.Fatalf("%.80q is no frame, %v", heard, err)
		}
		text := bytes.Clone(frame)
		if err := dec.Decode(frame, &m); err != nil || !bytes.HasPrefix(text, []byte(`{"type":"`)) {
			t.Fatalf("%q: %v", text, err)
		}
		owner, owned := wire.TopicVM(string(m.Topic))
		others := owned && owner != "g" || bytes.HasPrefix(m.Topic, []byte(wire.BrokerPrefix))
		switch m.Type {
		case wire.TypeAck:
			answers++
			if others && string(m.Status) == "ok" && string(m.Ack) != "unsubscribe" {
				t.Fatalf("g may: %s", text)
			}
		case wire.TypePublish:
			if others || bytes.Contains(text, []byte(secret)) {
				t.Fatalf("g hears %s", text)
			}
		case wire.TypeGap, wire.TypeError:
		default:
			t.Fatalf("g hears %s", text)
		}
		heard = rest
	}
	if answers > frames {
		t.Errorf("%d frames have %d answers", frames, answers)
	}
}

// FuzzWholeLines takes whatever bytes as an event file that a crash left behind: what
// is kept is its whole lines.
func FuzzWholeLines(f *testing.F) {
	for _, data := range [][]byte{nil, []byte("a\nb\n"), []byte("a\nb"), []byte("a"), make([]byte, 70<<10)} {
		f.Add(data)
	}
	path := filepath.Join(f.TempDir(), "events.jsonl")
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		file, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		size, err := wholeLines(file)
		kept, rerr := os.ReadFile(path)
		if err != nil || rerr != nil || int64(len(kept)) != size || !bytes.HasPrefix(data, kept) || bytes.IndexByte(data[size:], '\n') >= 0 && len(data)-int(size) < 64<<10 {
			t.Errorf("%d of %d bytes are kept, %v, %v", size, len(data), err, rerr)
		}
		if size > 0 && kept[size-1] != '\n' && len(data) <= 64<<10 {
			t.Errorf("what is kept ends with %q", kept[size-1])
		}
	})
}
