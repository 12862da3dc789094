package sdnotify

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// What a passed socket is for (FileDescriptorName= of its unit).
const (
	SocketBus     = "bus"
	SocketHealth  = "health"
	SocketMetrics = "metrics"
	SocketPprof   = "pprof"
)

const firstPassed = 3 // SD_LISTEN_FDS_START, sd_listen_fds(3)

// Passed is what systemd passed in: a listening socket, or what was given to
// [Store] before the service was restarted.
type Passed struct {
	Use      string       // one of the Socket constants, or HandOver
	Listener net.Listener // a *net.TCPListener, or a *net.UnixListener whose path stays when it is closed
	Stored   *os.File     // for HandOver, in place of Listener
}

// Close closes it.
func (p Passed) Close() error {
	if p.Stored != nil {
		return p.Stored.Close()
	}
	return p.Listener.Close()
}

// Listeners takes over the sockets that systemd passed in, none if it passed
// none. Anything that it cannot use is an error: a socket silently dropped is a
// guest that can never connect. Call it once, and before a child is started: what
// it leaves behind, no child may take for its own.
//
// go-systemd's own functions do not serve: they leave out what is no listener,
// and take numbers that they cannot read for "none".
func Listeners() ([]Passed, error) {
	env := make(map[string]string)
	for _, v := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID"} {
		env[v] = os.Getenv(v)
		if err := os.Unsetenv(v); err != nil {
			return nil, fmt.Errorf("removing %s from the environment: %w", v, err)
		}
	}
	if env["LISTEN_PID"] == "" && env["LISTEN_FDS"] == "" {
		return nil, nil
	}
	pid, err := strconv.Atoi(env["LISTEN_PID"])
	if err != nil {
		return nil, fmt.Errorf("LISTEN_PID is %q, not a process id", env["LISTEN_PID"])
	}
	if pid != os.Getpid() { // meant for a parent
		return nil, nil
	}
	n, err := strconv.Atoi(env["LISTEN_FDS"])
	if err != nil || n < 0 {
		return nil, fmt.Errorf("LISTEN_FDS is %q, not a number of sockets", env["LISTEN_FDS"])
	}
	names := make([]string, n)
	if list := env["LISTEN_FDNAMES"]; list != "" {
		if names = strings.Split(list, ":"); len(names) != n {
			return nil, fmt.Errorf("LISTEN_FDNAMES has %d names (%q) for %d sockets", len(names), list, n)
		}
	}
	var all []Passed
	for i, name := range names {
		p, err := takeOver(firstPassed+i, name)
		if err != nil {
			for _, p := range all {
				err = errors.Join(err, p.Close())
			}
			return nil, fmt.Errorf("socket %d, passed in as %q: %w", firstPassed+i, name, err)
		}
		all = append(all, p)
	}
	return all, nil
}

func takeOver(fd int, name string) (Passed, error) {
	unix.CloseOnExec(fd)
	if name == HandOver {
		// Whatever it is: who left it may be of another version, and what cannot
		// be used must not keep this one from starting.
		return Passed{Use: name, Stored: os.NewFile(uintptr(fd), name)}, nil
	}
	use, err := useOf(name)
	if err != nil {
		return Passed{}, err
	}
	if err := checkListens(fd, use); err != nil {
		return Passed{}, err
	}
	f := os.NewFile(uintptr(fd), name)
	ln, err := net.FileListener(f) // of a duplicate, closed on exec too
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return Passed{}, err
	}
	return Passed{Use: use, Listener: ln}, nil
}

func useOf(name string) (string, error) {
	switch name {
	case SocketBus, SocketHealth, SocketMetrics, SocketPprof:
		return name, nil
	// Without FileDescriptorName= systemd gives the unit's name, "unknown" if there
	// is none, and tools like systemd-socket-activate may give nothing.
	case "", "unknown", "castrad.socket", "castra-guestd.socket":
		return SocketBus, nil
	}
	return "", fmt.Errorf("nothing is known to be served under that name; FileDescriptorName= in the socket unit must be %s, %s, %s or %s",
		SocketBus, SocketHealth, SocketMetrics, SocketPprof)
}

// checkListens makes sure that fd listens for streams: of a socket that does not,
// net.FileListener makes a listener all the same, whose every Accept fails. Profiles
// show what is in memory, so they take a socket whose peers can be told apart.
func checkListens(fd int, use string) error {
	var is [3]int
	for i, opt := range []int{unix.SO_DOMAIN, unix.SO_TYPE, unix.SO_ACCEPTCONN} {
		v, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, opt)
		if err != nil {
			return fmt.Errorf("it cannot be used: %w", err)
		}
		is[i] = v
	}
	switch domain, kind, listens := is[0], is[1], is[2] == 1; {
	case domain != unix.AF_INET && domain != unix.AF_INET6 && domain != unix.AF_UNIX:
		return fmt.Errorf("it is of address family %d; TCP and Unix sockets are served", domain)
	case use == SocketPprof && domain != unix.AF_UNIX:
		return errors.New("profiles are served on a Unix socket alone; the socket unit must say ListenStream=/run/castrad-pprof.sock, or the like")
	case kind != unix.SOCK_STREAM:
		return errors.New("it is no stream socket; the socket unit must say ListenStream=")
	case !listens:
		return errors.New("it does not listen; the socket unit must say Accept=no")
	}
	return nil
}
