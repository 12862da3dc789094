// Package handover passes connections, and what is known of them, from a process
// that ends to the one that is started in its place. All of it is queued in one
// pair of sockets, an end of which the service manager keeps in between. It knows
// nothing of what it carries.
package handover

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// greeting is the first message, and comes with the state. Who changes what the
	// messages are changes its number: whoever knows another one takes nothing over.
	greeting = "castra-handover 1"

	// perMessage is how many descriptors go in one message. The kernel takes 253
	// (SCM_MAX_FD, include/net/scm.h).
	perMessage = 250
)

// Clock is the time of the machine's monotonic clock, which all its processes
// share, unlike that in [time.Time].
func Clock() time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return 0 // it never fails (clock_gettime(2))
	}
	return time.Duration(now.Nano())
}

// Parcel is a pair of sockets with everything queued in it that is to be passed.
type Parcel struct {
	ours, theirs *os.File
}

// Pack queues what state writes and the open descriptors fds, which stay the
// caller's. Nobody needs to read yet: it does not wait.
func Pack(state func(io.Writer) error, fds []int) (*Parcel, error) {
	memory, err := inMemory(state)
	if err != nil {
		return nil, fmt.Errorf("writing the state down: %w", err)
	}
	defer memory.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("making a pair of sockets: %w", err)
	}
	p := &Parcel{ours: os.NewFile(uintptr(pair[0]), "hand-over"), theirs: os.NewFile(uintptr(pair[1]), "hand-over, the successor's end")}
	err = send(pair[0], greeting, []int{int(memory.Fd())})
	for len(fds) > 0 && err == nil {
		now := fds[:min(len(fds), perMessage)]
		err = send(pair[0], strconv.Itoa(len(now)), now)
		fds = fds[len(now):]
	}
	if err != nil {
		p.Close()
		return nil, fmt.Errorf("queueing the connections: %w", err)
	}
	return p, nil
}

// send queues a message. The limits are the buffer of the socket, which takes
// some 250 messages as Linux comes, and RLIMIT_NOFILE for the descriptors under
// way (ETOOMANYREFS, unix(7)).
func send(fd int, text string, fds []int) error {
	return unix.Sendmsg(fd, []byte(text), unix.UnixRights(fds...), nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
}

// inMemory makes a file that is on no disk of what state writes.
func inMemory(state func(io.Writer) error) (*os.File, error) {
	fd, err := unix.MemfdCreate("castra-handover", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "hand-over, the state")
	if err = state(f); err == nil {
		_, err = f.Seek(0, io.SeekStart) // the successor shares the offset
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Successors is the end that is to be kept for the process that comes next. It is
// the parcel's.
func (p *Parcel) Successors() *os.File { return p.theirs }

// Kept gives the successor's end up, and tells whether somebody else holds it.
func (p *Parcel) Kept() bool {
	_ = p.theirs.Close()
	fds := []unix.PollFd{{Fd: int32(p.ours.Fd())}}
	if _, err := unix.Poll(fds, 0); err != nil {
		return false
	}
	return fds[0].Revents&(unix.POLLHUP|unix.POLLERR) == 0
}

// Close gives up the ends that are still held. What is queued stays for whoever
// holds the successor's end.
func (p *Parcel) Close() {
	_ = p.theirs.Close()
	_ = p.ours.Close()
}

// Unpack takes out what is queued at the successor's end: the state and the
// connections in their order. It does not wait, since whoever packed it has ended.
// Where an error is returned, everything that was queued is closed.
func Unpack(end *os.File) (state *os.File, conns []*Conn, err error) {
	defer func() {
		_ = end.Close() // with an error the kernel closes what is still queued in it
		if err != nil {
			for _, c := range conns {
				_ = c.Close()
			}
			if state != nil {
				_ = state.Close()
			}
			state, conns = nil, nil
		}
	}()
	text, fds, err := receive(end)
	if err != nil {
		return nil, nil, fmt.Errorf("taking over the state: %w", err)
	}
	if text != greeting || len(fds) != 1 {
		closeAll(fds)
		return nil, nil, fmt.Errorf("it begins with %.40q and %d descriptors, and not with %q and one: it was left by another version", text, len(fds), greeting)
	}
	state = os.NewFile(uintptr(fds[0]), "hand-over, the state")
	for {
		text, fds, err := receive(end)
		if errors.Is(err, io.EOF) {
			return state, conns, nil
		}
		if err != nil {
			return state, conns, fmt.Errorf("taking over connections behind the %dth: %w", len(conns), err)
		}
		if text != strconv.Itoa(len(fds)) {
			closeAll(fds)
			return state, conns, fmt.Errorf("a message announces %.40q descriptors and has %d", text, len(fds))
		}
		for i, fd := range fds {
			conn, err := newConn(fd)
			if err != nil {
				closeAll(fds[i:])
				return state, conns, fmt.Errorf("taking over the %dth connection: %w", len(conns)+1, err)
			}
			conns = append(conns, conn)
		}
	}
}

// receive takes one message out, io.EOF where there is none left.
func receive(end *os.File) (text string, fds []int, err error) {
	data := make([]byte, 2*len(greeting))
	control := make([]byte, unix.CmsgSpace(4*(perMessage+1)))
	n, used, flags, _, err := unix.Recvmsg(int(end.Fd()), data, control, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return "", nil, fmt.Errorf("the queue ends before its end: %w", io.ErrUnexpectedEOF)
	case err != nil:
		return "", nil, err
	case n == 0 && used == 0:
		return "", nil, io.EOF
	}
	messages, err := unix.ParseSocketControlMessage(control[:used])
	for i := range messages {
		var some []int
		if some, err = unix.ParseUnixRights(&messages[i]); err != nil {
			break
		}
		fds = append(fds, some...)
	}
	if err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		// Most likely more descriptors than this process may have.
		err = errors.New("a message did not fit: is LimitNOFILE= large enough?")
	}
	if err != nil {
		closeAll(fds)
		return "", nil, err
	}
	return string(data[:n]), fds, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}
