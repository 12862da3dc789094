package broker

import (
	"net"
	"time"

	"github.com/castrabus/castra/internal/backoff"
	"github.com/castrabus/castra/internal/presence"
)

// lobby is where connections of one listener are that have been accepted and not greeted.
//
// They are accepted before it is their turn, since a greeting takes several times as
// long. When castrad is back all its guests connect within a fifth of a second; the
// kernel's queue would be full, whose guests try again a second later, or, if only their
// last word was not heard, hold themselves connected and wait for a greeting that never
// comes (tcp_abort_on_overflow in tcp(7)).
type lobby struct {
	room      chan struct{}      // a token for each that is in one of the lobbies, all together
	seats     chan net.Conn      // room for as many; closed behind the last
	next      chan net.Conn      // no room: who has no seat comes in when the lobby is empty
	questions chan chan struct{} // of the watchdog, which has one at a time
}

func newLobby(room chan struct{}) *lobby {
	return &lobby{room: room, seats: make(chan net.Conn, cap(room)), next: make(chan net.Conn), questions: make(chan chan struct{}, 1)}
}

// early are connections that are accepted before their turn and got no session so far: as
// many as a host may have guests, once in a minute. Those that keep coming without getting
// anywhere wait in the kernel's queue, and not in two.
var early = presence.Rate{Records: 10000. / 60, Burst: 10000, Bytes: 1}

// usher has a connection greeted in its turn.
func (b *Broker) usher(l *listener, to *lobby, conn net.Conn) {
	room, next := to.room, chan<- net.Conn(nil)
	if b.early.Take(early, 0, time.Now()) > 0 {
		room, next = nil, to.next
	}
	for {
		select {
		case room <- struct{}{}:
			to.seats <- conn
			return
		case next <- conn:
			return
		case asked := <-l.asked:
			to.questions <- asked
		}
	}
}

// greet serves who is in the lobby until nobody is to come any more.
func (b *Broker) greet(l *listener, from *lobby) {
	ended := b.guests.Done // one for all of them
	for {
		conn, ok := from.first()
		switch {
		case !ok:
			return
		case conn == nil: // it was a question
		case l.closed.Load(): // nothing is owed to who has no session
			_ = conn.Close()
			ended()
		default:
			b.serve(conn, ended)
			if rest := b.acceptTurn(); rest > 0 {
				backoff.Sleep(b.ctx, rest) // a millisecond or so: nobody notices
			}
		}
	}
}

// first waits for somebody to greet, or answers a question and gives nil. At the end ok is
// false.
func (l *lobby) first() (conn net.Conn, ok bool) {
	select { // a question does not wait behind thousands
	case asked := <-l.questions:
		close(asked)
		return nil, true
	default:
	}
	select { // who has a seat was there before
	case conn, ok = <-l.seats:
		return l.rise(conn, ok)
	default:
	}
	select {
	case conn, ok = <-l.seats:
		return l.rise(conn, ok)
	case conn = <-l.next:
		return conn, true
	case asked := <-l.questions:
		close(asked)
		return nil, true
	}
}

// rise makes room for another.
func (l *lobby) rise(conn net.Conn, ok bool) (net.Conn, bool) {
	if ok {
		<-l.room
	}
	return conn, ok
}
