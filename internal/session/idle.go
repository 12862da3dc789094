package session

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// idleAfter is how long a session that publishes waits for its guest's next frame before
// it gives its goroutine up: longer than the pauses of a guest that is at work, which so
// never pays for a new one, and shorter than a heartbeat's interval.
const idleAfter = 2 * time.Second

// Idle is where sessions wait that have nothing to do. A goroutine that waits in a
// read keeps the stack that it needed for its busiest moment, 8 KiB as a rule: ten
// thousand idle guests would cost more for their stacks than for all else. A session
// in here has none, and gets a new one when its connection can be read from or when
// it is ended from outside.
type Idle struct {
	poll  *os.File // an epoll instance, itself waited for by the runtime's (epoll(7))
	ready syscall.RawConn

	mu      sync.Mutex
	waiters map[uint64]waiter // by their spots
	spots   uint64            // given out so far

	// Those who serve what wakes take turns at waiting for it, see serve.
	turn  chan struct{} // room for the one token; closed when there are no more
	over  chan error    // room for one: why nobody takes turns any more
	spare atomic.Int32  // how many wait for their turn
	// Of whose turn it is: what its last wait gave, and what of that is still to be served.
	events [128]syscall.EpollEvent
	got    []syscall.EpollEvent
}

// waiter is what waits: a session, or a handshake.
type waiter interface {
	place() *uint64 // its spot, of Idle; 0: none yet
	connection() syscall.RawConn
	over() bool // it was ended, and is not to wait
	// goOn is run when it need not wait any more. Until w has left, all others wait for it.
	goOn(w *courier)
}

// NewIdle makes an empty one. Run serves it.
func NewIdle() (*Idle, error) {
	fd, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("making an epoll instance: %w", err)
	}
	// Only a descriptor that does not block is waited for without a thread.
	if err := syscall.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(fmt.Errorf("making an epoll instance: %w", err), syscall.Close(fd))
	}
	l := &Idle{poll: os.NewFile(uintptr(fd), "epoll"), waiters: make(map[uint64]waiter), turn: make(chan struct{}, 1), over: make(chan error, 1)}
	if l.ready, err = l.poll.SyscallConn(); err != nil {
		return nil, errors.Join(err, l.poll.Close())
	}
	return l, nil
}

// Run serves whom its guest has sent something, until ctx is done; from then on only
// ends are. One goroutine calls it, once.
func (l *Idle) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = l.poll.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	defer func() { _ = l.poll.Close() }() // nothing was written to it
	l.turn <- struct{}{}
	go l.serve()
	if err := <-l.over; err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("waiting for idle guests: %w", err)
	}
	return nil
}

// maxSpare is how many goroutines at most wait for their turn.
const maxSpare = 16

// serve is what each of the goroutines does that serve what wakes: it waits for its
// turn, takes one that was woken, leaves the turn to the next and serves it. So there
// are as many as have something to do, and they are the same all the time: a new one's
// stack has to grow first, twice as a rule, on which a burst of connections would spend
// more time than on most of its system calls. A heartbeat it answers without leaving the
// turn: to wake another costs more than that.
func (l *Idle) serve() {
	away := l.pass
	for {
		// Who ends is never counted among those who wait, not for a moment: the last one
		// of those would see to no other then.
		n := l.spare.Load()
		if n >= maxSpare {
			return
		}
		if !l.spare.CompareAndSwap(n, n+1) {
			continue
		}
		if _, ok := <-l.turn; !ok {
			return
		}
		l.spare.Add(-1)
		for c := (courier{away: away}); !c.left; {
			w, err := l.next()
			if err != nil {
				l.over <- err
				close(l.turn)
				return
			}
			w.goOn(&c)
		}
	}
}

// pass leaves the turn to the next.
func (l *Idle) pass() {
	if l.spare.Load() == 0 {
		go l.serve()
	}
	l.turn <- struct{}{}
}

// next waits for something that was woken. Call it when it is one's turn.
func (l *Idle) next() (waiter, error) {
	for {
		for len(l.got) > 0 {
			e := l.got[0]
			l.got = l.got[1:]
			if w := l.take(uint64(uint32(e.Fd)) | uint64(uint32(e.Pad))<<32); w != nil {
				return w, nil
			}
		}
		n, err := l.wait(l.events[:])
		if err != nil {
			return nil, err
		}
		l.got = l.events[:n]
	}
}

// Len gives how many sessions wait here just now. Anybody may call it.
func (l *Idle) Len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, w := range l.waiters {
		if _, ok := w.(*Session); ok {
			n++
		}
	}
	return n
}

func (l *Idle) wait(events []syscall.EpollEvent) (n int, err error) {
	waitErr := l.ready.Read(func(fd uintptr) bool {
		for {
			if n, err = syscall.EpollWait(int(fd), events, 0); !errors.Is(err, syscall.EINTR) {
				return n != 0 || err != nil
			}
		}
	})
	if waitErr != nil {
		return 0, waitErr
	}
	return n, err
}

// add lets w wait without a goroutine. Where it gives true the caller, who is the
// one that reads, has to end: another one may be reading by then.
func (l *Idle) add(w waiter) bool {
	l.mu.Lock()
	place, op := w.place(), syscall.EPOLL_CTL_MOD
	if *place == 0 {
		l.spots++
		*place, op = l.spots, syscall.EPOLL_CTL_ADD
	}
	spot := *place
	l.waiters[spot] = w
	l.mu.Unlock()
	if l.arm(w, op, spot) != nil || w.over() {
		// Nobody would wake it, or it was ended when there was nobody to wake yet.
		return l.take(spot) == nil
	}
	return true
}

// arming is one epoll_ctl(2). They are lent, as attempts are.
type arming struct {
	op      int
	of      syscall.RawConn
	poll    uintptr
	ev      syscall.EpollEvent
	err     error
	in, add func(fd uintptr)
}

var armings = sync.Pool{New: func() any {
	a := &arming{}
	a.add = func(fd uintptr) { a.err = syscall.EpollCtl(int(a.poll), a.op, int(fd), &a.ev) }
	a.in = func(poll uintptr) {
		a.poll = poll
		if err := a.of.Control(a.add); err != nil {
			a.err = err
		}
	}
	return a
}}

// arm has w woken once it can be read from, at once if there are bytes already, and not
// again before the next time.
func (l *Idle) arm(w waiter, op int, spot uint64) error {
	a := armings.Get().(*arming)
	a.op, a.of, a.err = op, w.connection(), nil
	a.ev = syscall.EpollEvent{
		Events: syscall.EPOLLIN | syscall.EPOLLRDHUP | syscall.EPOLLONESHOT,
		Fd:     int32(uint32(spot)), Pad: int32(uint32(spot >> 32)),
	}
	err := l.ready.Control(a.in)
	err = errors.Join(err, a.err)
	a.of = nil
	armings.Put(a)
	return err
}

// take removes what waits on spot, nil if nothing does: of all who would wake it
// exactly one does.
func (l *Idle) take(spot uint64) waiter {
	l.mu.Lock()
	defer l.mu.Unlock()
	w := l.waiters[spot]
	delete(l.waiters, spot)
	return w
}

// wake gives w a goroutine if it waits here.
func (l *Idle) wake(w waiter) {
	l.mu.Lock()
	spot := *w.place()
	waits := spot != 0 && l.waiters[spot] == w
	if waits {
		delete(l.waiters, spot)
	}
	l.mu.Unlock()
	if waits {
		go w.goOn(nil)
	}
}

// What ends a wait without a byte, and what ends a goroutine without a session.
var (
	errNothing = errors.New("nothing to read yet")
	errIdle    = errors.New("the session waits without a goroutine")
	errHeldUp  = errors.New("another goroutine reads for the session")
)

// pause is called before each wait for the guest. It takes the goroutine from a session
// that has sent nothing for a while, or has not published since it last had none. free
// tells that no part of a frame has come, heard that frames were served just now. The
// error is errIdle where the goroutine is taken, and errEnded.
func (s *Session) pause(free, heard bool) error {
	now := time.Now()
	if heard {
		s.heardAt = now
	}
	if free && (s.woken || now.Sub(s.heardAt) >= idleAfter/2) {
		s.woken, s.checkAt = false, time.Time{}
		if s.opts.Idle.add(s) {
			return errIdle
		}
	}
	s.woken = false
	if s.checkAt.Sub(now) >= idleAfter/2 {
		return nil // a deadline for each burst would cost more than it is worth
	}
	s.checkAt = now.Add(idleAfter)
	if err := s.conn.SetReadDeadline(s.checkAt); err != nil {
		return err
	}
	if s.ended.Load() != nil { // ended before, and the deadline that says so was just replaced
		return errEnded
	}
	return nil
}

// goOn is run for a session that was idle.
func (s *Session) goOn(w *courier) {
	s.woken = true
	err := s.read(w, nil, nil)
	if !errors.Is(err, errIdle) {
		w.leave()
	}
	s.conclude(err)
}

// The parts of a waiter.
func (s *Session) place() *uint64              { return &s.spot }
func (s *Session) connection() syscall.RawConn { return s.raw }
func (s *Session) over() bool                  { return s.ended.Load() != nil }
