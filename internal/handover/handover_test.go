package handover

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pairs makes n connections, and gives the descriptors of their one ends.
func pairs(t *testing.T, n int) (fds []int, theirs []*os.File) {
	t.Helper()
	for range n {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(pair[1]), "theirs")
		t.Cleanup(func() { _ = f.Close() })
		fds, theirs = append(fds, pair[0]), append(theirs, f)
	}
	return fds, theirs
}

func text(s string) func(io.Writer) error {
	return func(w io.Writer) error {
		_, err := io.WriteString(w, s)
		return err
	}
}

// duplicate is what a service manager holds.
func duplicate(t *testing.T, f *os.File) *os.File {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), "kept")
}

// More connections than fit a message come out in their order, with what was sent
// to them in between, though whoever packed them is gone.
func TestParcel(t *testing.T) {
	const n = 2*perMessage + 1
	fds, theirs := pairs(t, n)
	p, err := Pack(text("what is known"), fds)
	if err != nil {
		t.Fatal(err)
	}
	kept := duplicate(t, p.Successors())
	if !p.Kept() {
		t.Error("it is kept, and said not to be")
	}
	p.Close()
	closeAll(fds)
	for i, f := range theirs {
		if _, err := f.Write([]byte{byte(i), byte(i >> 8)}); err != nil {
			t.Fatal(i, err)
		}
	}
	state, conns, err := Unpack(kept)
	if err != nil || len(conns) != n {
		t.Fatal(len(conns), err)
	}
	defer state.Close()
	if b, err := io.ReadAll(state); err != nil || string(b) != "what is known" {
		t.Errorf("%q, %v", b, err)
	}
	for i, c := range conns {
		var _ net.Conn = c
		b := make([]byte, 2)
		if _, err := io.ReadFull(c, b); err != nil || int(b[0])+int(b[1])<<8 != i {
			t.Fatalf("connection %d: %v, %v", i, b, err)
		}
	}
	// They know deadlines, and each side of them can be shut down.
	if err := conns[0].SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Error(err)
	}
	if _, err := conns[0].Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("behind a deadline: %v", err)
	}
	if err := conns[0].CloseWrite(); err != nil {
		t.Error(err)
	}
	if n, err := theirs[0].Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("%d, %v", n, err)
	}
	for _, c := range conns {
		_ = c.Close()
	}
}

func TestNotKept(t *testing.T) {
	p, err := Pack(text(""), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if p.Kept() {
		t.Error("nobody keeps it")
	}
}

// What was left by something else is refused, and all of it closed.
func TestUnpackStrangers(t *testing.T) {
	for name, queue := range map[string]func(end int, fds []int) error{
		"nothing":            func(int, []int) error { return nil },
		"another version":    func(end int, fds []int) error { return send(end, "castra-handover 2", fds[:1]) },
		"no state":           func(end int, fds []int) error { return unix.Send(end, []byte(greeting), 0) },
		"a message too long": func(end int, fds []int) error { return send(end, greeting+strings.Repeat(" ", 100), fds[:1]) },
		"a wrong count": func(end int, fds []int) error {
			return errors.Join(send(end, greeting, fds[:1]), send(end, "3", fds[1:]))
		},
		"no connections": func(end int, fds []int) error {
			memory, err := inMemory(text("x"))
			if err != nil {
				return err
			}
			defer memory.Close()
			return errors.Join(send(end, greeting, fds[:1]), send(end, "1", []int{int(memory.Fd())}))
		},
	} {
		t.Run(name, func(t *testing.T) {
			fds, theirs := pairs(t, 3)
			pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			err = queue(pair[0], fds)
			closeAll(append(fds, pair[0]))
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err = Unpack(os.NewFile(uintptr(pair[1]), "kept")); err == nil {
				t.Fatal("it is taken for a hand-over")
			}
			for _, f := range theirs {
				if n, err := f.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
					t.Errorf("a connection is still open: %v", err)
				}
			}
		})
	}
}

// A queue whose writer still lives, and writes no more, is no end.
func TestUnpackUnfinished(t *testing.T) {
	p, err := Pack(text("x"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if _, _, err := Unpack(duplicate(t, p.Successors())); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%v", err)
	}
}

func TestPackFails(t *testing.T) {
	wrong := errors.New("wrong")
	if _, err := Pack(func(io.Writer) error { return wrong }, nil); !errors.Is(err, wrong) {
		t.Error(err)
	}
	if _, err := Pack(func(w io.Writer) error { _, err := io.Copy(w, bytes.NewReader(nil)); return err }, []int{-1}); !errors.Is(err, unix.EBADF) {
		t.Error(err)
	}
}

// FuzzUnpack unpacks whatever is queued in place of a hand-over: messages, a line each,
// of which each has as many descriptors as its first byte says. It is taken whole or
// not at all, and nothing is left open.
func FuzzUnpack(f *testing.F) {
	for _, messages := range []string{"1" + greeting + "\n21", "1" + greeting, "0" + greeting, "2" + greeting + "\n11", "", "1castra-handover 2\n11", "1" + greeting + "\n1-1\n0", "9x"} {
		f.Add([]byte(messages))
	}
	stream, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		f.Fatal(err)
	}
	open := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			f.Fatal(err)
		}
		return len(entries)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		before := open()
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		for line := range bytes.SplitSeq(data, []byte("\n")) {
			if len(line) < 1 {
				continue
			}
			var fds []int
			for range int(line[0]) % 10 {
				fds = append(fds, stream[0])
			}
			if err := send(pair[0], string(line[1:]), fds); err != nil {
				break // the queue is full
			}
		}
		_ = unix.Close(pair[0])
		state, conns, err := Unpack(os.NewFile(uintptr(pair[1]), "kept"))
		if err != nil && (state != nil || conns != nil) || err == nil && state == nil {
			t.Errorf("%v and %d connections beside %v", state, len(conns), err)
		}
		for _, c := range conns {
			_ = c.Close()
		}
		if state != nil {
			_ = state.Close()
		}
		if now := open(); now > before {
			t.Errorf("%d descriptors are left of %q", now-before, data)
		}
	})
}
