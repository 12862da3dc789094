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

// parkAfter is how long a session waits for its guest's next frame before it gives
// its goroutine up: long beside the pauses of a guest that is at work, so that such
// a one never pays for it, and short beside a heartbeat's interval.
const parkAfter = 2 * time.Second

// Lot is where sessions wait that have nothing to do. A goroutine that waits in a
// read keeps the stack that it needed for its busiest moment, 8 KiB as a rule: ten
// thousand idle guests would cost more for their stacks than for all else. A parked
// session has none; the lot gives it a new one when its connection can be read from,
// or when it is ended from outside.
type Lot struct {
	poll  *os.File // an epoll instance, itself waited for by the runtime's (epoll(7))
	ready syscall.RawConn

	mu     sync.Mutex
	parked map[uint64]*Session // by their spots
	spots  uint64              // given out so far
}

// NewLot makes an empty lot. Run serves it.
func NewLot() (*Lot, error) {
	fd, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("making an epoll instance: %w", err)
	}
	// Only a descriptor that does not block is waited for without a thread.
	if err := syscall.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(fmt.Errorf("making an epoll instance: %w", err), syscall.Close(fd))
	}
	l := &Lot{poll: os.NewFile(uintptr(fd), "epoll"), parked: make(map[uint64]*Session)}
	if l.ready, err = l.poll.SyscallConn(); err != nil {
		return nil, errors.Join(err, l.poll.Close())
	}
	return l, nil
}

// Run wakes parked sessions until ctx is done; from then on only their ends do. One
// goroutine calls it, once.
func (l *Lot) Run(ctx context.Context) error {
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
				go s.resume()
			}
		}
	}
}

// Parked gives how many sessions are parked just now. Anybody may call it.
func (l *Lot) Parked() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.parked)
}

func (l *Lot) wait(events []syscall.EpollEvent) (n int, err error) {
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

// park lets s wait without a goroutine. Where it gives true the caller, who is the
// one that reads, has to end: another one may be reading by then.
func (l *Lot) park(s *Session) bool {
	l.mu.Lock()
	if s.spot == 0 {
		l.spots++
		s.spot = l.spots
	}
	spot := s.spot
	l.parked[spot] = s
	l.mu.Unlock()
	// Once for each time that it is parked, and at once if there are bytes already.
	ev := syscall.EpollEvent{
		Events: syscall.EPOLLIN | syscall.EPOLLRDHUP | syscall.EPOLLONESHOT,
		Fd:     int32(uint32(spot)), Pad: int32(uint32(spot >> 32)),
	}
	if l.arm(s, &ev) != nil || s.ended.Load() != nil {
		// Nobody would wake it, or it was ended when there was nobody to wake yet.
		return l.take(spot) == nil
	}
	return true
}

func (l *Lot) arm(s *Session, ev *syscall.EpollEvent) (err error) {
	pollErr := l.ready.Control(func(poll uintptr) {
		connErr := s.raw.Control(func(conn uintptr) {
			err = syscall.EpollCtl(int(poll), syscall.EPOLL_CTL_MOD, int(conn), ev)
			if errors.Is(err, syscall.ENOENT) { // it has never been parked
				err = syscall.EpollCtl(int(poll), syscall.EPOLL_CTL_ADD, int(conn), ev)
			}
		})
		err = errors.Join(err, connErr)
	})
	return errors.Join(err, pollErr)
}

// take removes the session that is parked on spot, nil if there is none: of all who
// would wake it exactly one does.
func (l *Lot) take(spot uint64) *Session {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.parked[spot]
	delete(l.parked, spot)
	return s
}

// wake gives s a goroutine if it is parked.
func (l *Lot) wake(s *Session) {
	l.mu.Lock()
	parked := s.spot != 0 && l.parked[s.spot] == s
	if parked {
		delete(l.parked, s.spot)
	}
	l.mu.Unlock()
	if parked {
		go s.resume()
	}
}

// What ends a wait without a byte, and what ends a goroutine without a session.
var (
	errIdle   = errors.New("nothing to read yet")
	errParked = errors.New("the session waits without a goroutine")
)

// rest is called before each wait for the guest but the first, and parks a session
// that has had nothing to do for a while, or since it was parked last nothing but a
// heartbeat. free tells that no part of a frame has come, heard that a burst of frames
// was served just now. The error is errParked, or errEnded.
func (s *Session) rest(free, heard bool) error {
	now := time.Now()
	if heard {
		s.heardAt = now
	}
	if free && (s.resumed || now.Sub(s.heardAt) >= parkAfter/2) {
		s.resumed, s.checkAt = false, time.Time{}
		if s.opts.Lot.park(s) {
			return errParked
		}
	}
	s.resumed = false
	if s.checkAt.Sub(now) >= parkAfter/2 {
		return nil // a deadline for each burst would cost more than it is worth
	}
	s.checkAt = now.Add(parkAfter)
	if err := s.conn.SetReadDeadline(s.checkAt); err != nil {
		return err
	}
	if s.ended.Load() != nil { // End came first, and its deadline was just replaced
		return errEnded
	}
	return nil
}

// resume goes on where park left off.
func (s *Session) resume() {
	s.resumed = true
	s.run(nil)
}
