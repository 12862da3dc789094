package broker

import (
	"encoding/json"
	"os"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bus"
)

const (
	lastTen   = `{"type":"subscribe","topic":"u","sub":"u","from":-10}`
	searching = `{"ack":"subscribe","status":"error","code":"storage-stalled"}`
)

// A search that was given up on goes on, and who asks again, under whatever name, has what
// it has come to, and all that has come since: a log that takes longer than a guest may
// wait would never be searched.
func TestSearchGivenUp(t *testing.T) {
	disk, b, goOn := unreadable(t)
	publish := func() uint64 {
		t.Helper()
		seq, err := b.Publish(t.Context(), bus.PublishRequest{Topic: "u", Payload: []byte("1")})
		if err != nil {
			t.Fatal(err)
		}
		return seq
	}
	first := publish()
	g := connect(t, b.addr, "g")
	g.send(lastTen)
	g.expect(searching)
	second := publish()
	goOn()
	eventually(t, "the search ends", func() bool { return len(b.topics.subscribers("u")) == 0 })
	third := publish()
	goOn = disk.stop("read")
	t.Cleanup(goOn)
	eventually(t, "it has its place without another", func() bool {
		g.send(`{"type":"subscribe","topic":"u","sub":"again","from":-10}`)
		return has(g.next(), `{"ack":"subscribe","status":"ok"}`)
	})
	goOn()
	for _, seq := range []uint64{first, second, third} {
		var d struct {
			Subscription string
			Seq          uint64
		}
		if err := json.Unmarshal([]byte(g.next()), &d); err != nil {
			t.Fatal(err)
		}
		if d.Seq != seq || d.Subscription != "again" {
			t.Errorf("delivered %+v and not %d", d, seq)
		}
	}
}

// Neither a restart nor an end waits for those who wait to search the log.
func TestSearchEnds(t *testing.T) {
	for name, end := range map[string]func(*running) error{
		"castrad ends": func(b *running) error { return b.Close() },
		"castrad restarts": func(b *running) error {
			var kept *os.File
			if _, err := b.HandOver(keep(b.t, &kept)); err != nil {
				return err
			}
			return b.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			b, _ := queued(t)
			done := make(chan error, 1)
			go func() { done <- end(b) }()
			select {
			case err := <-done:
				if err != nil {
					t.Error(err)
				}
			case <-time.After(hang):
				t.Error("it waits for a search that nobody waits for")
				<-b.scans
			}
		})
	}
}

// Who has left does not search the log.
func TestSearchLeft(t *testing.T) {
	b, g := queued(t)
	if err := g.conn.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "nobody waits any more", func() bool { return len(b.topics.subscribers("u")) == 0 })
}

// queued starts a broker with a guest that waits for its turn to search the log, which
// never comes.
func queued(t *testing.T) (*running, *guest) {
	t.Helper()
	b := start(t, testOptions(t, t.TempDir()))
	for range cap(b.scans) {
		b.scans <- struct{}{}
	}
	g := connect(t, b.addr, "g")
	g.send(lastTen)
	eventually(t, "it waits for its turn", func() bool { return len(b.topics.subscribers("u")) == 1 })
	return b, g
}
