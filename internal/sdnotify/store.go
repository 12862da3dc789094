package sdnotify

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// HandOver is the name under which connections are kept while the service is
// restarted.
const HandOver = "handover"

// Managed tells whether there is a service manager to talk to.
func Managed() bool { return os.Getenv("NOTIFY_SOCKET") != "" }

// Store asks the service manager to keep f under name and pass it to the process
// that it starts next. It returns once the manager has dealt with that, or patience
// is over. The manager does not say what it did; one that keeps nothing, for lack of
// FileDescriptorStoreMax=, closes its copy.
func Store(name string, f *os.File, patience time.Duration) error {
	// FDPOLL=0: the other end of a pair of sockets is closed when this process ends,
	// and then f would no longer be kept (systemd 246).
	if err := send("FDSTORE=1\nFDNAME="+name+"\nFDPOLL=0", f); err != nil {
		return fmt.Errorf("asking the service manager to keep %s: %w", name, err)
	}
	return barrier(patience)
}

// Unstore asks the service manager to keep nothing under name any longer.
func Unstore(name string) error { return Notify("FDSTOREREMOVE=1", "FDNAME="+name) }

// barrier returns when the manager has read all that it was told before: it closes
// its copy of what comes with BARRIER=1 (systemd 246).
func barrier(patience time.Duration) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	err = send("BARRIER=1", w)
	if cerr := w.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = r.SetReadDeadline(time.Now().Add(patience))
	}
	if err == nil {
		_, err = r.Read(make([]byte, 1))
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("the service manager has not answered for %v", patience)
		}
		err = nil // the end: it has read it
	}
	return err
}

// send sends one message with a descriptor, which daemon.SdNotify cannot.
func send(text string, f *os.File) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	to := &unix.SockaddrUnix{Name: os.Getenv("NOTIFY_SOCKET")} // a first @ is for an abstract one there, too
	return unix.Sendmsg(fd, []byte(text), unix.UnixRights(int(f.Fd())), to, unix.MSG_NOSIGNAL)
}
