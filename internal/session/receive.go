package session

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"syscall"

	"github.com/castrabus/castra/internal/wire"
)

// receive waits for bytes and borrows a workspace once there are some. Behind an
// incomplete frame, rest, it waits until that is whole.
func (s *Session) receive(rest *[]byte) (ws *workspace, n int, err error) {
	if len(*rest) > 0 {
		if *rest, err = s.complete(*rest); err != nil {
			return nil, 0, err
		}
		ws = workspaces.Get().(*workspace)
		return ws, copy(ws.buf, *rest), nil
	}
	if s.woken {
		ws = workspaces.Get().(*workspace)
		if n, err = s.readReady(ws); err != nil {
			workspaces.Put(ws)
			ws = nil
		}
		return ws, n, err
	}
	n, err = s.readInto(func() []byte {
		ws = workspaces.Get().(*workspace)
		return ws.buf
	}, func() {
		workspaces.Put(ws)
		ws = nil
	})
	if err != nil && ws != nil {
		workspaces.Put(ws)
	}
	return ws, n, err
}

// complete reads until the frame that begins in rest is whole, or can be seen
// to be none. The buffer grows with what has arrived, not with what a length
// announces. With an error, too, it gives what it has.
func (s *Session) complete(rest []byte) ([]byte, error) {
	for {
		if f, _, err := wire.NextFrame(rest); f != nil || err != nil {
			return rest, nil //nolint:nilerr // the caller meets it again, where frames are judged
		}
		need := 4
		if len(rest) >= need {
			need += int(binary.BigEndian.Uint32(rest))
		}
		room := slices.Grow(rest, min(need-len(rest), max(512, len(rest))))
		room = room[:min(cap(room), need)]
		n, err := s.readInto(func() []byte { return room[len(rest):] }, func() {})
		if errors.Is(err, errNothing) {
			if err = s.pause(false, false); err == nil {
				continue
			}
		}
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("the connection closed inside a frame: %w", io.ErrUnexpectedEOF)
		}
		if err != nil {
			return rest, err
		}
		rest = room[:len(rest)+n]
		if s.spent++; s.spent >= restReads { // each takes a system call, be it for one byte
			s.rest(nil)
		}
	}
}

// readReady reads what a session that was idle was woken for, or gives errNothing: no
// deadline counts, the one there is is an old one.
func (s *Session) readReady(ws *workspace) (n int, err error) {
	if s.ended.Load() != nil {
		return 0, errEnded
	}
	return ws.read(s.raw)
}

// read reads into buf what there is, or gives errNothing. It allocates nothing: this is
// most of what ten thousand guests that beat have castrad do.
func (w *workspace) read(from syscall.RawConn) (n int, err error) {
	if err = from.Control(w.ready); err != nil {
		return 0, err
	}
	if errors.Is(w.err, syscall.EAGAIN) {
		return 0, errNothing
	}
	return w.n, w.err
}

// readInto reads once, waiting until it can, or gives errNothing. The buffer is asked
// for before each try and given back when there was nothing to read, so that waiting
// holds none.
func (s *Session) readInto(borrow func() []byte, giveBack func()) (n int, err error) {
	waitErr := s.raw.Read(func(fd uintptr) bool {
		n, err = readOnce(fd, borrow())
		if errors.Is(err, syscall.EAGAIN) {
			giveBack()
			return false
		}
		return true
	})
	if waitErr != nil {
		err = waitErr
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		if err = errNothing; s.ended.Load() != nil {
			err = errEnded
		}
	}
	return n, err
}
