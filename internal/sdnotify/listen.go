package sdnotify

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// What a passed socket is for (FileDescriptorName= of its unit).
const (
	SocketBus     = "bus"
	SocketHealth  = "health"
	SocketMetrics = "metrics"
)

const firstPassed = 3 // SD_LISTEN_FDS_START, sd_listen_fds(3)

// Passed is a listening socket that systemd passed in.
type Passed struct {
	Use      string // one of the Socket constants
	Listener net.Listener
}

// Listeners takes over the sockets that systemd passed in, none if it passed
// none. Anything that it cannot use is an error: a socket silently dropped is a
// guest that can never connect. Call it once, before anything is forked.
func Listeners() ([]Passed, error) {
	pid, count, names := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), os.Getenv("LISTEN_FDNAMES")
	for _, v := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		if err := os.Unsetenv(v); err != nil { // children must not take them for theirs
			return nil, err
		}
	}
	if pid != strconv.Itoa(os.Getpid()) {
		return nil, nil
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 0 {
		return nil, fmt.Errorf("LISTEN_FDS is %q, not a number of sockets", count)
	}
	var name []string
	if names != "" {
		name = strings.Split(names, ":")
	}
	var passed []Passed
	for i := range n {
		label := ""
		if i < len(name) {
			label = name[i]
		}
		p, err := takeOver(firstPassed+i, label)
		if err != nil {
			for _, p := range passed {
				err = errors.Join(err, p.Listener.Close())
			}
			return nil, err
		}
		passed = append(passed, p)
	}
	return passed, nil
}

func takeOver(fd int, label string) (Passed, error) {
	syscall.CloseOnExec(fd)
	use := SocketBus
	switch label {
	case SocketHealth, SocketMetrics:
		use = label
	// An unnamed socket bears the name of its unit (systemd.socket(5)), and
	// "unknown" where not even that is known.
	case "", SocketBus, "castrad.socket", "unknown":
	default:
		return Passed{}, fmt.Errorf("socket %d was passed under the name %q; castrad knows bus, health and metrics (FileDescriptorName= in the socket unit)", fd, label)
	}
	f := os.NewFile(uintptr(fd), label)
	if f == nil {
		return Passed{}, fmt.Errorf("socket %d (%q) was announced and is not there", fd, label)
	}
	ln, err := net.FileListener(f) // a duplicate
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return Passed{}, fmt.Errorf("socket %d (%q) is no stream socket that listens: %w", fd, label, err)
	}
	if u, ok := ln.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false) // the path is the socket unit's
	}
	return Passed{Use: use, Listener: ln}, nil
}
