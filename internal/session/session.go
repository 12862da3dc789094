// Package session serves one guest connection: the handshake, then frames in
// and deliveries out.
//
// A session has one goroutine, which reads, and none while there is nothing to read;
// couriers, who serve all sessions, deliver. The right to write to the connection is a
// token, and so is the right to touch what the session is subscribed to.
package session

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/wire"
)

// Broker is what a session needs of the broker. Its methods may be called by
// any number of sessions at once.
type Broker interface {
	// Decide says what to answer to a hello: whether it is to be refused, and
	// with which key it must prove its name, if any.
	Decide(h wire.Hello) Decision
	// Attend notes the ok given to a handshake-only guest. Like Admit it may make
	// the guest wait, until ctx is done at most.
	Attend(ctx context.Context, h wire.Hello, remote string) Decision
	// Admit makes s the session of its VM, which ends the one before. proven is
	// the key that the guest has proved to hold, nil if none was asked for. The broker
	// that has admitted s ends it when it ends itself.
	Admit(ctx context.Context, s *Session, h wire.Hello, proven []byte) (Guest, Decision)
	// Release notes that s has ended, and why.
	Release(s *Session, end End)
	// Park takes in a session that has stopped to be handed over, and returns once
	// it is decided whether it is: then nothing more is to be done with it, not
	// even to be released.
	Park(s *Session) (handedOver bool)
	// Refused records a handshake that granted nothing. It may hold its answer back
	// for a moment.
	Refused(r Refusal)

	// Append commits a batch of s's records, see [eventlog.Log.Append].
	Append(ctx context.Context, b *eventlog.Batch) error
	// AppendHere is Append that may keep the caller for as long as a disk or another
	// guest takes. Before it does, heldUp is called with what Append would have
	// returned; the first call counts. It may come from any goroutine, and must not wait.
	AppendHere(ctx context.Context, b *eventlog.Batch, heldUp func(error)) error
	// Subscribe makes sub hear what is committed from now on.
	Subscribe(sub *Subscription)
	// Unsubscribe ends that.
	Unsubscribe(sub *Subscription)
	// Subscribed notes what s is subscribed to now.
	Subscribed(s *Session, topics []string)
	// Visible gives what a guest may hear, whatever it is subscribed to. What it gives
	// must not keep the record.
	Visible(vm string) func(*eventlog.Record) bool
	// OpenCursor gives the position of a durable cursor, making it at start
	// where there is none.
	OpenCursor(sub *Subscription, start uint64) (uint64, error)
	// Acknowledged notes that sub's guest has processed what it was sent up to
	// and including seq.
	Acknowledged(sub *Subscription, seq uint64)
	// Trouble records what befell s, for bus-events.jsonl.
	Trouble(s *Session, reason, action, detail string)
}

// Decision is the broker's answer to a hello.
type Decision struct {
	Refuse string // the reason; empty: welcome
	Key    []byte // what the guest must prove to hold; nil: nothing
}

// Guest is one VM's account, kept across its sessions.
type Guest interface {
	// Heard notes that frames arrived, Heartbeat that one was a heartbeat.
	Heard()
	Heartbeat()
	// Allow takes a record with a payload of n bytes, which came at now, off the VM's
	// share; where there is none left it gives how long until there is.
	Allow(n int, now time.Time) (wait time.Duration)
	// Published notes n records stored.
	Published(n int)
	// Spend takes the work that n small frames make off the VM's share, and gives
	// how long to read nothing of it.
	Spend(n int) (rest time.Duration)
	// Search tells whether the VM may search the log backwards, which it may do
	// once at a time. SearchDone must follow.
	Search() bool
	SearchDone()
}

// Refusal is a handshake that granted nothing.
type Refusal struct {
	VM           string // as far as it is known
	Capabilities []string
	Remote       string
	Outcome      string // "denied" or "timeout"
	Reason       string // one of wire's
}

// End tells why a session ended: one of the reasons of bus-events.jsonl, or
// empty where the guest closed the connection in good order.
type End struct {
	Reason string
	Detail string
}

// The reasons and actions of bus-events.jsonl (contract 4).
const (
	TroubleSlowConsumer     = "slow_consumer"
	TroubleQueueFull        = "queue_full"
	TroubleRateLimited      = "rate_limited"
	TroubleHeartbeatTimeout = "heartbeat_timeout"
	TroubleIOError          = "io_error"
	TroubleProtocolError    = "protocol_error"
	TroubleSuperseded       = "superseded"

	// Not recorded: castrad ends, or an operator took the name away.
	TroubleShutdown = "shutdown"
	TroubleRevoked  = "revoked"

	ActionReject     = "reject"
	ActionThrottle   = "throttle"
	ActionDisconnect = "disconnect"
)

// Options are what the configuration says of sessions. They may differ from
// session to session, never within one.
type Options struct {
	HandshakeTimeout time.Duration
	// WriteTimeout is how long a guest may leave a delivery unread.
	WriteTimeout     time.Duration
	MaxSubscriptions int
	// Scans has room for as many subscribers as may search the log backwards at
	// once: such a search reads at disk speed for as long as it takes.
	Scans    chan struct{}
	Lazy     bool // acks are given before records are durable, and say so
	Log      *eventlog.Log
	Idle     *Idle     // where sessions wait that have nothing to do
	Couriers *Couriers // who delivers
}

// Conn is what a session runs over: a TCP or Unix stream connection.
type Conn interface {
	net.Conn
	syscall.Conn
	CloseWrite() error
}

// Session is one guest's granted connection.
type Session struct {
	opts   *Options
	broker Broker
	conn   Conn
	raw    syscall.RawConn
	remote string
	vm     string
	token  string
	guest  Guest

	// Two tokens, each a channel with room for one: whoever put it there has it.
	// reading is the right to change subs and what they have read; it may be held
	// for as long as a disk takes. writer is the right to write to the connection.
	// Who needs both takes reading first.
	reading chan struct{}
	writer  chan struct{}
	subs    atomic.Pointer[[]*Subscription] // replaced, never changed in place
	turn    int                             // which of them delivers first; with reading

	// waiting are answers that found the writer taken. Whoever has it writes them
	// before giving it back, so that reading frames does not wait for a guest
	// that is slow to read.
	waitMu  sync.Mutex
	waiting []byte
	torn    bool // part of a frame went out last; with writer

	ordered bool  // the guest has CapOrdered
	held    *Held // the reader's; nil: none

	lost      <-chan struct{}                    // the reader's: closed when a search of the log ends that was given up; nil: none was
	found     *found                             // of who searches: what the last one came to that was given up; nil: there is none
	searching atomic.Pointer[context.CancelFunc] // stops the one under way; nil: none is

	// What a session that is handed over takes with it, see Frozen.
	unread []byte // the reader's
	unsent []byte // with writer

	stuck      atomic.Int64 // bytes that wait for the guest to read; 0: none do
	deliveries delivering
	up         *readingUp     // of who delivers; nil: it is not far behind
	background sync.WaitGroup // searches of the log
	ended      atomic.Pointer[End]
	done       func()                // called once, when all of it has ended
	spent      int                   // frames of the burst that is being read
	gaveUp     bool                  // one of them has waited in vain for who delivers
	noted      atomic.Pointer[notes] // what was recorded last of the limits that it runs into; nil: none so far

	// Of whoever reads: when frames came last, until when reading waits before it is
	// seen whether the session is idle, and whether it was, and has heard nothing but
	// heartbeats since.
	heardAt, checkAt time.Time
	woken            bool
	spot             uint64 // in Idle, under its lock; 0: none yet
}

// VM gives the name of the guest.
func (s *Session) VM() string { return s.vm }

// Token gives the session's token.
func (s *Session) Token() string { return s.token }

// Remote gives the guest's address.
func (s *Session) Remote() string { return s.remote }

// Account gives what Admit returned.
func (s *Session) Account() Guest { return s.guest }

// End closes the session from outside, for one of the reasons above. The first
// reason stands. It does not wait.
func (s *Session) End(reason, detail string) {
	if s.ended.CompareAndSwap(nil, &End{Reason: reason, Detail: detail}) {
		// A deadline in the past wakes reader and writer; the reader then says
		// good-bye and closes.
		_ = s.conn.SetDeadline(time.Unix(1, 0))
		s.stopSearch()
		s.opts.Idle.wake(s)
	}
}

// Expire ends the session because nothing was heard of its guest for too long. Where
// something waits to be read by the guest, that is why: nobody listens to it meanwhile.
func (s *Session) Expire() {
	if unread := s.stuck.Load(); unread > 0 {
		s.End(TroubleSlowConsumer, s.slowness(int(unread), s.opts.WriteTimeout))
		return
	}
	s.End(TroubleHeartbeatTimeout, "no frame for too long")
}

// Lag gives how many committed records the slowest subscription has still to
// pass. It may be called by anybody and waits for nobody.
func (s *Session) Lag() uint64 {
	var lag uint64
	committed := s.opts.Log.Committed()
	for _, sub := range s.subscriptions() {
		lag = max(lag, sub.lag(committed))
	}
	return lag
}

func (s *Session) subscriptions() []*Subscription {
	if p := s.subs.Load(); p != nil {
		return *p
	}
	return nil
}

var errEnded = errors.New("the session was ended")
