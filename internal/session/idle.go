package session

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"
)

// idleAfter is how long a session waits for its guest's next frame before it gives
// its goroutine up: long beside the pauses of a guest that is at work, so that such
// a one never pays for it, and short beside a heartbeat's interval.
const idleAfter = 2 * time.Second

// Idle is where sessions wait that have nothing to do. A goroutine that waits in a
// read keeps the stack that it needed for its busiest moment, 8 KiB as a rule: ten
// thousand idle guests would cost more for their stacks than for all else. A session
// in here has none, and gets a new one when its connection can be read from or when
// it is ended from outside.
type Idle struct {
	poll  *os.File // an epoll instance, itself waited for by the runtime's (epoll(7))
	ready syscall.RawConn

	mu       sync.Mutex
	sessions map[uint64]*Session // by their spots
	spots    uint64              // given out so far
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
	l := &Idle{poll: os.NewFile(uintptr(fd), "epoll"), sessions: make(map[uint64]*Session)}
	if l.ready, err = l.poll.SyscallConn(); err != nil {
		return nil, errors.Join(err, l.poll.Close())
	}
	return l, nil
}

// Run wakes sessions whose guests have sent something, until ctx is done; from then
// on only their ends do. One goroutine calls it, once.
func (l *Idle) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = l.poll.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	defer func() { _ = l.poll.Close() }() // nothing was written to it
	events := make([]syscall.EpollEvent, 128)
	for {
		n, err := l.wait(events)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("waiting for idle guests: %w", err)
		}
		for _, e := range events[:n] {
			if s := l.take(uint64(uint32(e.Fd)) | uint64(uint32(e.Pad))<<32); s != nil {
				go s.goOn()
			}
		}
	}
}

// Len gives how many sessions wait here just now. Anybody may call it.
func (l *Idle) Len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.sessions)
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

// add lets s wait without a goroutine. Where it gives true the caller, who is the
// one that reads, has to end: another one may be reading by then.
func (l *Idle) add(s *Session) bool {
	l.mu.Lock()
	op := syscall.EPOLL_CTL_MOD
	if s.spot == 0 {
		l.spots++
		s.spot, op = l.spots, syscall.EPOLL_CTL_ADD
	}
	spot := s.spot
	l.sessions[spot] = s
	l.mu.Unlock()
	// Once for each time that it waits, and at once if there are bytes already.
	ev := syscall.EpollEvent{
		Events: syscall.EPOLLIN | syscall.EPOLLRDHUP | syscall.EPOLLONESHOT,
		Fd:     int32(uint32(spot)), Pad: int32(uint32(spot >> 32)),
	}
	if l.arm(s, op, &ev) != nil || s.ended.Load() != nil {
		// Nobody would wake it, or it was ended when there was nobody to wake yet.
		return l.take(spot) == nil
	}
	return true
}

func (l *Idle) arm(s *Session, op int, ev *syscall.EpollEvent) (err error) {
	pollErr := l.ready.Control(func(poll uintptr) {
		connErr := s.raw.Control(func(conn uintptr) { err = syscall.EpollCtl(int(poll), op, int(conn), ev) })
		err = errors.Join(err, connErr)
	})
	return errors.Join(err, pollErr)
}

// take removes the session that waits on spot, nil if there is none: of all who
// would wake it exactly one does.
func (l *Idle) take(spot uint64) *Session {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.sessions[spot]
	delete(l.sessions, spot)
	return s
}

// wake gives s a goroutine if it waits here.
func (l *Idle) wake(s *Session) {
	l.mu.Lock()
	waits := s.spot != 0 && l.sessions[s.spot] == s
	if waits {
		delete(l.sessions, s.spot)
	}
	l.mu.Unlock()
	if waits {
		go s.goOn()
	}
}

// What ends a wait without a byte, and what ends a goroutine without a session.
var (
	errNothing = errors.New("nothing to read yet")
	errIdle    = errors.New("the session waits without a goroutine")
)

// pause is called before each wait for the guest, and lets a session go without a
// goroutine that has had nothing to do for a while, or nothing but heartbeats since
// it last went without. free tells that no part of a frame has come, heard that frames
// were served just now. The error is errIdle, or errEnded.
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
func (s *Session) goOn() {
	s.woken = true
	s.run(nil)
}
