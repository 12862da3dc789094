package broker

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/castrabus/castra/internal/bus"
)

// settled waits until n sessions have no goroutine.
func (r *running) settled(n int) {
	eventually(r.t, "sessions go idle", func() bool { return r.idle.Len() == n })
}

// An idle session has no goroutine, and nobody can tell: it answers, hears, is
// replaced and is closed as any other.
func TestIdleSession(t *testing.T) {
	b := start(t, testOptions(t, t.TempDir()))
	g := connect(t, b.addr, "g")
	g.send(`{"type":"subscribe","topic":"t"}`)
	g.expect(`{"ack":"subscribe","status":"ok"}`)
	b.settled(1)

	// Nothing but a heartbeat: it goes without again at once.
	for range 3 {
		g.send(`{"type":"heartbeat"}`)
		g.expect(`{"ack":"heartbeat","status":"ok"}`)
	}
	b.settled(1)

	if _, err := b.Publish(t.Context(), bus.PublishRequest{Topic: "t", Payload: []byte("1")}); err != nil {
		t.Fatal(err)
	}
	g.expect(`{"type":"publish","topic":"t","vm":"host"}`)
	b.settled(1)

	g.send(`{"type":"publish","topic":"u","id":"a"}`, `{"type":"heartbeat"}`)
	g.expect(`{"ack":"publish","status":"ok","id":"a"}`, `{"ack":"heartbeat","status":"ok"}`)
	b.settled(1)

	// A frame in pieces: what has come of it is kept.
	frame := []byte(`{"type":"publish","topic":"u","id":"b"}`)
	frame = append(binary.BigEndian.AppendUint32(nil, uint32(len(frame))), frame...)
	half := len(frame) / 2
	g.say("%s", frame[:half])
	eventually(t, "the session reads", func() bool { return b.idle.Len() == 0 })
	g.say("%s", frame[half:])
	g.expect(`{"ack":"publish","status":"ok","id":"b"}`)
	b.settled(1)

	// A newer session ends it.
	newer := connect(t, b.addr, "g")
	g.expect(`{"type":"error","code":"superseded"}`)
	b.settled(1)

	// Its guest leaves.
	_ = newer.conn.Close()
	eventually(t, "the session has ended", func() bool {
		sessions, _ := b.Counts()
		return sessions == 0 && b.idle.Len() == 0
	})

	// castrad ends.
	last := connect(t, b.addr, "g")
	b.settled(1)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	last.expect(`{"type":"error","code":"shutting-down"}`)
}

// Whoever is waited for longest is not forgotten: sessions that go idle and are
// woken at once from both sides answer every frame.
func TestIdleSessionsUnderLoad(t *testing.T) {
	b := start(t, testOptions(t, t.TempDir()))
	const n = 50
	var guests []*guest
	for i := range n {
		g := connect(t, b.addr, string(append([]byte("g"), byte('a'+i%26), byte('a'+i/26))))
		g.send(`{"type":"subscribe","topic":"t"}`)
		g.expect(`{"ack":"subscribe","status":"ok"}`)
		guests = append(guests, g)
	}
	b.settled(n)
	for round := range 100 {
		for _, g := range guests {
			g.send(`{"type":"heartbeat"}`)
		}
		if _, err := b.Publish(t.Context(), bus.PublishRequest{Topic: "t", Payload: []byte("1")}); err != nil {
			t.Fatal(err)
		}
		for i, g := range guests {
			got := g.next() + g.next()
			if !bytes.Contains([]byte(got), []byte(`"ack":"heartbeat"`)) || !bytes.Contains([]byte(got), []byte(`"topic":"t"`)) {
				t.Fatalf("round %d: guest %d was sent %s", round, i, got)
			}
		}
	}
	b.settled(n)
}
