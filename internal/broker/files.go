package broker

import "syscall"

// fileBudget shares out the descriptors that the process may have, so that no
// number of connections takes those that the log, D-Bus and other guests need.
type fileBudget struct{ total int }

// openFiles gives the budget. The Go runtime has raised the soft limit to the hard
// one already (os package, since Go 1.19).
func openFiles() fileBudget {
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err != nil || r.Cur > 1<<30 {
		return fileBudget{1 << 30}
	}
	return fileBudget{int(r.Cur)}
}

// Half is for sessions, of many descriptors nearly three quarters, and an eighth each for
// handshakes and for those that wait to be greeted; what is left is for the log's files,
// the VMs' streams, tails and D-Bus, and for connections that are being closed. With the
// 65,536 of castrad.service none bites below its default.
func (f fileBudget) sessions(limit int) int   { return capped(limit, max(f.total/2, f.total/4*3-1024)) }
func (f fileBudget) handshakes(limit int) int { return capped(limit, f.total/8) }
func (f fileBudget) lobby() int               { return capped(lobbySeats, f.total/8) }

// lobbySeats and the kernel's queue of 4096 (net.core.somaxconn since Linux 5.4) are
// enough for ten thousand guests that come at once.
const lobbySeats = 8192

func capped(limit, most int) int {
	if limit <= 0 {
		return most
	}
	return max(1, min(limit, most))
}
