package sdnotify

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// holds receives a message, and gives what it says and the descriptors with it.
func (m manager) holds(t *testing.T) (text string, fds []int) {
	t.Helper()
	b, control := make([]byte, 4096), make([]byte, 256)
	for {
		n, used, _, _, err := unix.Recvmsg(int(m), b, control, unix.MSG_CMSG_CLOEXEC)
		if err == unix.EAGAIN {
			time.Sleep(time.Millisecond)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		messages, err := unix.ParseSocketControlMessage(control[:used])
		if err == nil && len(messages) > 0 {
			fds, err = unix.ParseUnixRights(&messages[0])
		}
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n]), fds
	}
}

// Store gives the descriptor away and waits until the manager has read that.
func TestStore(t *testing.T) {
	m := newManager(t)
	f, err := os.CreateTemp(t.TempDir(), "kept")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	done := make(chan error, 1)
	go func() { done <- Store(HandOver, f, time.Minute) }()
	said, fds := m.holds(t)
	if words := strings.Split(said, "\n"); !slices.Equal(words, []string{"FDSTORE=1", "FDNAME=handover", "FDPOLL=0"}) || len(fds) != 1 {
		t.Errorf("told %q with %d descriptors", said, len(fds))
	}
	kept := os.NewFile(uintptr(fds[0]), "kept")
	defer kept.Close()
	a, _ := f.Stat()
	if b, err := kept.Stat(); err != nil || !os.SameFile(a, b) {
		t.Errorf("another file is kept, %v", err)
	}
	said, fds = m.holds(t)
	if said != "BARRIER=1" || len(fds) != 1 {
		t.Errorf("then told %q with %d descriptors", said, len(fds))
	}
	select {
	case err := <-done:
		t.Errorf("it did not wait: %v", err)
	default:
	}
	_ = unix.Close(fds[0])
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := Unstore(HandOver); err != nil {
		t.Error(err)
	}
	if said, _ := m.holds(t); said != "FDSTOREREMOVE=1\nFDNAME=handover" {
		t.Errorf("told %q", said)
	}
}

// A manager that does not read keeps nobody for ever, and one that is not there is said.
func TestStoreWithoutManager(t *testing.T) {
	newManager(t)
	if !Managed() {
		t.Error("there is a manager")
	}
	if err := Store(HandOver, os.Stdin, 10*time.Millisecond); err == nil || !strings.Contains(err.Error(), "has not answered") {
		t.Errorf("%v", err)
	}
	t.Setenv("NOTIFY_SOCKET", "/nowhere")
	if err := Store(HandOver, os.Stdin, time.Second); err == nil {
		t.Error("nobody is there")
	}
}
