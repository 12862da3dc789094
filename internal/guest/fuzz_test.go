package guest

import (
	"bytes"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/wire"
)

// FuzzSocket says whatever bytes to the local socket, as any program of the guest
// may. Each line is answered with a line, in order, or ends the connection; and
// nothing reaches the host that would end the guest's session, or that the host
// would have to refuse.
func FuzzSocket(f *testing.F) {
	for _, lines := range []string{
		`{"type":"publish"}`, `{"type":"publish","topic":"vm:self/x","payload":{"a":[1.50,"\u00e4"]},"id":"\u0001\"","reply":"vm:self"}`,
		`{"type":"publish","topic":"vm:other","payload":1}` + "\n" + `{"type":"publish","topic":"castra.presence"}`,
		`{"type":"publish","topic":""}` + "\r\n" + `{"type":"publish","reply":""}`,
		`{"type":"subscribe","topic":"a.>","from":-3}` + "\n" + `{"type":"ack","ack":"publish","subscription":"a.>","seq":7}` + "\n" + `{"type":"unsubscribe","topic":"a.>"}`,
		`{"type":"subscribe","topic":"vm:self/>","sub":"s","cursor":"c","from":"2026-11-23T21:03:00Z"}` + "\n" + `{"type":"subscribe","topic":"b","sub":"s","from":18446744073709551615}`,
		`{"type":"unsubscribe"}` + "\n" + `{"type":"heartbeat"}` + "\n" + `{"type":"gap","subscription":"s","from":1,"to":2}`,
		`{"type":"heartbeat"}` + "\n\n", "\xff", `{"type":"error"}{`, `{"type":"publish","payload":` + strings.Repeat("[", 40),
		`{"type":"subscribe","topic":"castra.>"}` + "\n" + `{"type":"subscribe","topic":"vm:*"}` + "\n" + `{"type":"subscribe","topic":"*"}`,
	} {
		f.Add([]byte(lines))
	}
	path := filepath.Join(f.TempDir(), "bus.sock")
	a := runAgent(f, func(o *Options) { o.Socket = path })
	host := &lawfulHost{peer: a.net.accept(f)}
	var work sync.WaitGroup
	work.Go(host.serve)
	f.Cleanup(func() {
		_ = host.conn.Close()
		work.Wait()
	})
	a.until(f, a.connected)
	f.Fuzz(func(t *testing.T, said []byte) {
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(hang)); err != nil {
			t.Fatal(err)
		}
		work := make(chan struct{})
		go func() { // the answers to a long input do not fit the socket's buffer
			defer close(work)
			_, _ = conn.Write(said)
			_ = conn.CloseWrite()
		}()
		heard, err := io.ReadAll(conn)
		if err != nil {
			t.Fatalf("behind %.200q: %v", heard, err)
		}
		<-work
		var dec wire.Decoder
		var m wire.Message
		answers := 0
		for line := range bytes.Lines(heard) {
			text := bytes.Clone(line)
			if err := dec.Decode(bytes.TrimSuffix(line, []byte("\n")), &m); err != nil || text[len(text)-1] != '\n' {
				t.Fatalf("%q is answered with %q: %v", said, text, err)
			}
			switch {
			case m.Type == wire.TypeError && string(m.Code) == codeSlowConsumer: // which a long input may well be
			case m.Type == wire.TypeAck, m.Type == wire.TypeError:
				answers++
			case m.Type == wire.TypePublish && !bytes.Contains(text, []byte(lawfulPayload)):
				t.Errorf("%q is answered with the delivery %q", said, text)
			}
		}
		if lines := bytes.Count(said, []byte("\n")) + 1; answers > lines {
			t.Errorf("%d lines have %d answers", lines, answers)
		}
		if complaint := host.complaint(); complaint != "" {
			t.Fatalf("the host was said %s", complaint)
		}
	})
}

const lawfulPayload = `"from the host"`

// lawfulHost answers everything that a guest may say, delivers a record on each
// subscription, and notes what castrad would refuse.
type lawfulHost struct {
	*peer

	mu  sync.Mutex
	bad string
}

func (h *lawfulHost) complaint() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.bad
}

func (h *lawfulHost) complain(frame []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.bad = string(frame)
}

func (h *lawfulHost) serve() {
	var out, frame []byte
	var m wire.Message
	for seq := uint64(1); ; seq++ {
		var err error
		if frame, err = wire.ReadFrame(h.r, frame); err != nil {
			return
		}
		text := bytes.Clone(frame)
		if err := h.dec.Decode(frame, &m); err != nil || m.Bad != "" || m.TooLarge {
			h.complain(text)
			return
		}
		owner, owned := wire.TopicVM(string(m.Topic))
		out = out[:0]
		switch m.Type {
		case wire.TypePublish:
			if !wire.ValidTopic(m.Topic) || owned && owner != "web1" || bytes.HasPrefix(m.Topic, []byte(wire.BrokerPrefix)) {
				h.complain(text)
			}
			out = wire.AppendAckFrame(out, &wire.Ack{Kind: "publish", ID: m.ID, Seq: seq})
		case wire.TypeSubscribe:
			if _, err := wire.ParsePattern(string(m.Topic)); err != nil || owned && owner != "web1" || bytes.HasPrefix(m.Topic, []byte(wire.BrokerPrefix)) {
				h.complain(text)
			}
			out = wire.AppendAckFrame(out, &wire.Ack{Kind: "subscribe", Topic: m.Topic, Seq: seq})
			out = wire.AppendFrame(out, append(append([]byte(`{"type":"publish","topic":"t","subscription":"`), m.Sub...),
				`","vm":"host","seq":9000000000000000000,"time":"2026-11-23T21:03:00.000000Z","payload":`+lawfulPayload+`}`...))
		case wire.TypeUnsubscribe:
			out = wire.AppendAckFrame(out, &wire.Ack{Kind: "unsubscribe"})
		case wire.TypeHeartbeat:
			out = wire.AppendAckFrame(out, &wire.Ack{Kind: "heartbeat"})
		case wire.TypeAck:
		default:
			h.complain(text)
		}
		if _, err := h.conn.Write(out); err != nil {
			return
		}
	}
}

// FuzzHost lets whatever answers at the host's address say whatever it likes, from
// the greeting on. castra-guestd outlives it, and is taken in by the next host.
func FuzzHost(f *testing.F) {
	frames := func(all ...string) []byte {
		out := []byte(wire.Greeting + "\nok session=sess-1\n")
		for _, frame := range all {
			out = wire.AppendFrame(out, []byte(frame))
		}
		return out
	}
	for _, said := range [][]byte{
		nil, []byte("HTTP/1.1 400 Bad Request\r\n\r\n"), []byte(wire.Greeting + "\nerror: unknown-vm\n"), []byte(wire.Greeting + "\r\nchallenge alg=hmac-sha256 nonce=00\n"),
		[]byte(wire.Greeting + "\nok\n"), frames(), frames(okSubscribe), frames(okSubscribe, okSubscribe),
		frames(okSubscribe, `{"type":"publish","topic":"a","subscription":"s1","vm":"host","seq":1,"time":"T","payload":[]}`, `{"type":"gap","subscription":"s1","from":9,"to":3}`),
		frames(okSubscribe, `{"type":"gap","subscription":"s1","from":0,"to":18446744073709551615}`, `{"type":"publish","topic":"a","subscription":"s1","seq":5}`),
		frames(`{"type":"ack","ack":"publish","status":"ok","id":"x","seq":18446744073709551615}`), frames(`{"type":"ack","ack":"heartbeat"}`, `{"type":"ack","ack":"unsubscribe"}`),
		frames(`{"type":"ack","ack":"subscribe","status":"error","code":"forbidden","reason":"\u001b[31m","retry_after_ms":18446744073709551615}`),
		frames(`{"type":"error","code":"superseded","reason":"x"}`), append(frames(), 0, 0, 0, 0), append(frames(), 0xff, 0xff, 0xff, 0xff),
	} {
		f.Add(said)
	}
	a := runAgent(f, func(o *Options) { o.Subscribe = []string{"a", "vm:self"} })
	a.pace.pause = 0 // the next attempt is at once
	f.Fuzz(func(t *testing.T, said []byte) {
		conn := <-a.net.dials
		if err := conn.SetDeadline(time.Now().Add(hang)); err != nil {
			t.Fatal(err)
		}
		read := make(chan struct{})
		go func() { // a pipe has no buffer: what it says is to be taken
			defer close(read)
			_, _ = io.Copy(io.Discard, conn)
		}()
		_, err := conn.Write(said)
		if os.IsTimeout(err) {
			t.Fatalf("%q is not read to its end", said)
		}
		_ = conn.Close()
		<-read
	})
}

// FuzzReleased reads whatever bytes as the note of how far the spool is released.
func FuzzReleased(f *testing.F) {
	for _, text := range []string{`{"seq":7}`, `{"seq":-1}`, `{"seq":18446744073709551616}`, `{}`, `null`, `[`, `{"seq":1}x`, "", "\x00", `{"seq":7` + strings.Repeat(" ", 64) + "}"} {
		f.Add([]byte(text))
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(filepath.Join(dir, releasedFile), data, 0o600); err != nil {
			t.Fatal(err)
		}
		n, err := readReleased(eventlog.OS, dir)
		if err != nil && n != 0 {
			t.Errorf("%q releases up to %d beside %v", data, n, err)
		}
	})
}
