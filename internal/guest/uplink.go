package guest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/logging"
	"github.com/castrabus/castra/internal/token"
)

const (
	// dialTimeout bounds the wait for a host that answers nothing at all.
	dialTimeout = 10 * time.Second
	// Attempts to reach the host are retryMin to retryMax apart.
	retryMin = time.Second
	retryMax = 30 * time.Second
	// returnWithin spreads the guests of a host whose castrad was killed.
	returnWithin = time.Second
	// lastedFor is from when on a session counts as one that worked: its end is
	// news, and not the same trouble again, so the next attempt need not wait long.
	lastedFor = 10 * time.Second
)

// pacer spaces attempts; *backoff.Backoff is the real one.
type pacer interface {
	Next() time.Duration
	Reset()
}

// uplink keeps a session with the host. Its one goroutine decides; whatever may
// block, dialling, the handshake and the session, has goroutines of its own that it
// starts and awaits.
type uplink struct {
	id     identity
	log    *logrus.Entry
	dial   func(ctx context.Context, address string) (net.Conn, error)
	pace   pacer
	outbox *outbox
	subs   *table
	seen   func(seq uint64)
	note   func() // the state has changed; must not block

	// probes is unbuffered: whoever manages to send knows that the goroutine runs.
	probes chan struct{}
	// moved has room for one: there is another address, whichever is newest.
	moved chan struct{}

	mu    sync.Mutex
	state linkState
	sess  *session // nil: none
	said  string   // why there is no session, as last logged
}

// linkState is what is known of the way to the host.
type linkState struct {
	address string
	token   string    // of the session; empty: there is none
	local   string    // our end's address
	err     error     // why there is none; nil: not known yet
	next    time.Time // of the next attempt; zero: one is under way

	failed time.Time // when err became known

	handshake, heartbeat time.Time // the last granted, the last answered; zero: never
}

// refused gives why the host does not take this guest, nil if that is not so.
func (s *linkState) refused() *refusal {
	r, _ := errors.AsType[*refusal](s.err)
	return r
}

// outcome is how an attempt to be connected ended.
type outcome struct {
	err    error
	lasted bool // there was a session, for long enough
}

var errMoved = errors.New("the host's address was changed")

// run keeps a session until ctx is done.
func (u *uplink) run(ctx context.Context) {
	for {
		out := u.attempt(ctx)
		if ctx.Err() != nil {
			return
		}
		var wait time.Duration
		if out.lasted || errors.Is(out.err, errMoved) {
			u.pace.Reset()
		}
		switch {
		case errors.Is(out.err, errMoved):
		case out.lasted: // at once, but not with all the other guests at once
			wait = rand.N(returnWithin)
		default:
			wait = u.pace.Next()
		}
		u.failed(out.err, wait)
		if !u.rest(ctx, wait) {
			return
		}
	}
}

// attempt dials, shakes hands and serves the session to its end.
func (u *uplink) attempt(ctx context.Context) outcome {
	select {
	case <-u.moved: // the address read below is the new one
	default:
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan outcome, 1) // room for its one result
	go func() { ended <- u.serve(ctx, u.snapshot().address) }()
	for {
		select {
		case <-u.probes:
		case <-u.moved:
			cancel()
			<-ended
			return outcome{err: errMoved}
		case out := <-ended:
			return out
		}
	}
}

// rest waits until the next attempt is due.
func (u *uplink) rest(ctx context.Context, wait time.Duration) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
			return true
		case <-u.probes:
		case <-u.moved:
			return true
		case <-ctx.Done():
			return false
		}
	}
}

// serve runs one connection from dialling to its end.
func (u *uplink) serve(ctx context.Context, address string) outcome {
	u.update(func(s *linkState) { s.next = time.Time{} })
	dialing, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	conn, err := u.dial(dialing, address)
	if err != nil {
		return outcome{err: plain(err)}
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	token, r, err := shake(conn, u.id)
	if err != nil {
		return outcome{err: err}
	}
	begun := time.Now()
	sess := newSession(conn, r, u)
	u.mu.Lock()
	u.sess, u.said = sess, ""
	u.state.token, u.state.local, u.state.handshake, u.state.err = token, conn.LocalAddr().String(), begun, nil
	u.mu.Unlock()
	u.note()
	logging.HostConnected.On(u.log).WithFields(logrus.Fields{"address": address, "session": token}).Info("connected to the host")
	err = sess.run(ctx)
	u.mu.Lock()
	u.sess = nil
	u.state.token, u.state.err = "", err
	u.mu.Unlock()
	u.note()
	return outcome{err: err, lasted: time.Since(begun) >= lastedFor}
}

// failed notes why there is no session and when the next attempt is, and logs the
// reason unless it is the one logged last.
func (u *uplink) failed(err error, wait time.Duration) {
	u.mu.Lock()
	address := u.state.address
	text := address + ": " + err.Error()
	news := text != u.said
	u.said = text
	now := time.Now()
	u.state.err, u.state.failed, u.state.next = err, now, now.Add(wait)
	u.mu.Unlock()
	u.note()
	if !news {
		return
	}
	log := u.log.WithField("address", address)
	switch r, refused := errors.AsType[*refusal](err); {
	case refused:
		logging.HostRefused.On(log).WithField("reason", r.reason).Warnf("the host does not take this VM: %s; trying again at times", r.advice())
	case errors.Is(err, errMoved):
		logging.HostMoved.On(log).Info("going to the host at its new address")
	default:
		logging.HostUnreachable.On(log).WithField("reason", err.Error()).Warn("not connected to the host; trying again at times")
	}
}

// move makes the uplink go to another address, at once.
func (u *uplink) move(address string) {
	u.mu.Lock()
	same := u.state.address == address
	u.state.address = address
	u.mu.Unlock()
	if !same {
		token.Leave(u.moved)
	}
}

func (u *uplink) snapshot() linkState {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.state
}

func (u *uplink) update(f func(*linkState)) {
	u.mu.Lock()
	f(&u.state)
	u.mu.Unlock()
	u.note()
}

// session gives the live one, nil if there is none.
func (u *uplink) session() *session {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.sess
}

// beat notes that the host answered a heartbeat.
func (u *uplink) beat() {
	u.mu.Lock()
	u.state.heartbeat = time.Now()
	u.mu.Unlock()
}

// nudge says that there is something to send.
func (u *uplink) nudge() {
	if s := u.session(); s != nil {
		s.nudge()
	}
}

// probe returns once the goroutine has shown that it runs.
func (u *uplink) probe(ctx context.Context) error {
	select {
	case u.probes <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the uplink does not answer: %w", context.Cause(ctx))
	}
}

// describe says in a line how things stand, for STATUS= and for people.
func (s *linkState) describe(name string) string {
	r := s.refused()
	switch {
	case s.token != "":
		return fmt.Sprintf("connected to %s as %s, session %s", s.address, name, s.token)
	case r != nil:
		return fmt.Sprintf("%s — %s", r, r.advice())
	case s.err == nil:
		return "connecting to " + s.address
	case s.next.IsZero():
		return fmt.Sprintf("connecting to %s (%s)", s.address, s.err)
	default:
		wait := max(time.Second, time.Until(s.next)+time.Second-1).Truncate(time.Second)
		return fmt.Sprintf("connecting to %s (%s), next try within %s", s.address, s.err, wait)
	}
}

// notConnected is the refusal of what cannot be done without a session.
func (s *linkState) notConnected(name string) *bus.Error {
	return bus.Errorf(CodeNotConnected, "the host is not to be had: %s", s.describe(name))
}

// plain takes the addresses out of a network error: with a port that differs from
// attempt to attempt no two of them would be the same news.
func plain(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		err = op.Err
	}
	if call, ok := errors.AsType[*os.SyscallError](err); ok {
		err = call.Err
	}
	if late, ok := errors.AsType[net.Error](err); ok && late.Timeout() {
		return errTimedOut
	}
	return err
}

var errTimedOut = errors.New("timed out")
