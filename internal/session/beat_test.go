package session

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/eventlog"
)

// beating is the account of a guest that beats.
type beating struct {
	Guest
	rest time.Duration
}

func (beating) Heard()                                    {}
func (beating) Heartbeat()                                {}
func (beating) Allow(int, time.Time) (wait time.Duration) { return 0 }
func (b beating) Spend(int) (r time.Duration)             { return b.rest }

// releasing is a broker for sessions that end.
type releasing struct {
	Broker
	released chan End // room for one a session
}

func (b releasing) Release(_ *Session, e End) { b.released <- e }

// silentDisk is a broker with a disk that does not answer before goOn is closed.
type silentDisk struct {
	Broker
	goOn chan struct{}
}

func (b silentDisk) AppendHere(context.Context, *eventlog.Batch, func(error)) error {
	<-b.goOn
	return eventlog.ErrStalled
}

// A heartbeat is answered by whom all others wait for. Where that takes long it is not
// waited for, whatever the reason.
func TestBeatHoldsNobodyUp(t *testing.T) {
	const frame = "\x00\x00\x00\x14" + `{"type":"heartbeat"}`
	for name, slow := range map[string]func(t *testing.T, s *Session, peer net.Conn){
		"its guest reads nothing": func(t *testing.T, s *Session, _ net.Conn) {
			err := rawConn{s.conn.(*conn)}.Write(func(fd uintptr) bool {
				for {
					if _, err := syscall.Write(int(fd), make([]byte, 1)); err != nil {
						return errors.Is(err, syscall.EAGAIN)
					}
				}
			})
			if err != nil {
				t.Fatal(err)
			}
		},
		"many answers wait for another's writing": func(t *testing.T, s *Session, _ net.Conn) {
			s.writer <- struct{}{}
			s.waiting = make([]byte, maxWaiting)
			t.Cleanup(func() { <-s.writer })
		},
		"it has had its share": func(_ *testing.T, s *Session, _ net.Conn) { s.guest = beating{rest: time.Hour} },
		"its guest leaves": func(t *testing.T, s *Session, peer net.Conn) {
			s.reading <- struct{}{} // somebody searches the log for it
			t.Cleanup(func() { <-s.reading })
			if err := peer.Close(); err != nil {
				t.Fatal(err)
			}
		},
		"it publishes, and the disk stands still": func(t *testing.T, s *Session, peer net.Conn) {
			goOn := make(chan struct{})
			t.Cleanup(func() { close(goOn) })
			s.broker = silentDisk{s.broker, goOn}
			if err := write(peer, "\x00\x00\x00\x12"+`{"type":"publish"}`); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := idle(t)
			log, _, err := eventlog.Open(eventlog.Options{Dir: t.TempDir(), SegmentSize: 1 << 20})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = log.Close() })
			b := releasing{released: make(chan End, 2)}
			opts := &Options{Log: log, Idle: l, WriteTimeout: time.Hour}
			wait := func() (s *Session, peer net.Conn, ended chan struct{}) {
				c, peer := pair(t)
				s, ended = newSession(c, rawConn{c}, b, opts), make(chan struct{})
				s.guest, s.done = beating{}, func() { close(ended) }
				if !l.add(s) {
					t.Fatal("it cannot wait")
				}
				return s, peer, ended
			}
			s, peer, ended := wait()
			t.Cleanup(func() { end(s, peer, ended) })
			slow(t, s, peer)
			_, _ = peer.Write([]byte(frame))
			for l.Len() > 0 { // until it is served
				time.Sleep(time.Millisecond)
			}
			o, other, otherEnded := wait()
			t.Cleanup(func() { end(o, other, otherEnded) })
			for range 3 {
				if err := errors.Join(other.SetDeadline(time.Now().Add(20*time.Second)), write(other, frame)); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, 256)
				if n, err := other.Read(got); err != nil || !strings.Contains(string(got[:n]), `"ack":"heartbeat"`) {
					t.Fatalf("another one's is answered with %q, %v", got[:n], err)
				}
			}
		})
	}
}

// end ends a session whose guest has nothing to say to that.
func end(s *Session, peer net.Conn, ended chan struct{}) {
	_ = peer.Close()
	s.End("", "")
	<-ended
}

func write(c net.Conn, s string) error { _, err := c.Write([]byte(s)); return err }

// Only what can be answered without waiting is answered by whom all others wait for.
func TestOnlyBeatsKeepTheTurn(t *testing.T) {
	beat := "\x00\x00\x00\x16" + `{"type": "heartbeat" }`
	goOn := make(chan struct{})
	close(goOn)
	for frames, want := range map[string]struct {
		left    bool
		answers int
	}{
		beat:                      {false, 1},
		beat[:10]:                 {false, 0},
		beat + beat:               {false, 2},
		beat + "\x00":             {false, 1},
		"\x00\x00\x00\x00" + beat: {true, 0},
		"\x00\x00\x00\x02{]":      {true, 0},
		beat + "\x00\x00\x00\x21" + `{"type":"publish","id":"\u0061b"}`:            {true, 1},
		"\x00\x00\x00\x50" + `{"type":"heartbeat"` + strings.Repeat(" ", 60) + `}`: {true, 1},
	} {
		conn, peer := pair(t)
		s := newSession(conn, rawConn{conn}, silentDisk{goOn: goOn}, &Options{})
		s.guest = beating{}
		c := &courier{away: func() {}}
		ws := workspaces.New().(*workspace)
		left, err := s.burst(c, &ws, ws.buf[:copy(ws.buf, frames)])
		if c.left != want.left {
			t.Errorf("%q: left is %v, with %q to go, %v", frames, c.left, left, err)
		}
		_ = conn.Close()
		if got, err := io.ReadAll(peer); strings.Count(string(got), `"ack":"heartbeat"`) != want.answers {
			t.Errorf("%q is answered with %q, %v", frames, got, err)
		}
	}
}

// To wait again allocates nothing, since it is done for each heartbeat.
func TestIdleAddAllocatesNothing(t *testing.T) {
	l, err := NewIdle()
	if err != nil {
		t.Fatal(err)
	}
	c, _ := pair(t)
	f := &fake{conn: c}
	if n := testing.AllocsPerRun(1000, func() {
		if !l.add(f) || l.take(f.spot) != f {
			t.Error("it cannot wait")
		}
	}); n > 1 { // the race detector has some of what was lent thrown away
		t.Errorf("it allocates %v times", n)
	}
	if err := l.poll.Close(); err != nil {
		t.Error(err)
	}
}
