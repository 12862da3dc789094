package castradcmd

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// timerSlack is by how much the kernel may put castrad's timers off, to have several go
// off at once (PR_SET_TIMERSLACK, prctl(2)), and kernelSlack by how much it does where
// nobody has said anything.
//
// It is for the Go runtime's monitor thread, which is woken whenever there is something
// to do and then sleeps for 20 µs again and again (sysmon, Go 1.26): just as a record is
// on disk, it took the processor from who delivers it. With a millisecond or more the
// monitor comes too late for what it is there for, passing on the processor of who waits
// for the disk (docs/PERFORMANCE.md).
const (
	timerSlack  = 250 * time.Microsecond
	kernelSlack = 50 * time.Microsecond
)

// relaxTimers runs on the first thread: who is to get a signal when castrad's parent ends
// would lose that by execve(2) of another (PR_SET_PDEATHSIG, prctl(2)).
func init() { runtime.LockOSThread() } //nolint:gochecknoinits // the main goroutine may have moved before Main

// relaxTimers has the timers of all threads put off by timerSlack, unless somebody has
// said how much it is to be. It returns if that is so, or cannot be. The main goroutine
// calls it, before anything is read or opened.
//
// A thread inherits it from the one that makes it, and the runtime has made the monitor
// before any code of ours runs. So the program starts itself anew, once, as the same
// process. Where TimerSlackNSec= of castrad.service has said it, there is no need.
func relaxTimers() error {
	defer runtime.UnlockOSThread()
	if slack, err := timersSlack(); err != nil || slack != kernelSlack {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(timerSlack), 0, 0, 0); err != nil {
		return fmt.Errorf("setting the timers' slack: %w", err)
	}
	if slack, err := timersSlack(); err != nil || slack == kernelSlack { // or it would start itself anew for ever
		return errors.Join(errors.New("the kernel does not set the timers' slack"), err)
	}
	var files unix.Rlimit
	limited := unix.Getrlimit(unix.RLIMIT_NOFILE, &files)
	self, err := os.Executable()
	if err == nil {
		err = syscall.Exec(self, os.Args, os.Environ()) // does not return otherwise
	}
	if limited == nil { // Exec has put it back to what it was before the runtime raised it
		limited = unix.Setrlimit(unix.RLIMIT_NOFILE, &files)
	}
	return fmt.Errorf("starting anew for the timers' slack: %w", errors.Join(err, limited))
}

// timersSlack gives that of the calling thread.
func timersSlack() (time.Duration, error) {
	ns, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	if err != nil {
		return 0, fmt.Errorf("asking for the timers' slack: %w", err)
	}
	return time.Duration(ns), nil
}
