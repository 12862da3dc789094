// Package sdnotify talks to the service manager: it takes over sockets that
// systemd passed in, and reports readiness, status and liveness back.
package sdnotify

import (
	"fmt"
	"strconv"
	"strings"
	"sync"
	"unicode"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// What a daemon may tell (sd_notify(3)).
const (
	Ready    = daemon.SdNotifyReady    // it serves; also: a reload has ended
	Stopping = daemon.SdNotifyStopping // it has begun to end
)

// Notify sends assignments like Ready in one message. It does nothing where no
// service manager asked for them. Anybody may call it.
func Notify(states ...string) error {
	if _, err := daemon.SdNotify(false, strings.Join(states, "\n")); err != nil {
		return fmt.Errorf("notifying the service manager: %w", err)
	}
	return nil
}

// Reloading says that a reload has begun, which Ready ends. With
// Type=notify-reload, systemd ignores it without the time.
func Reloading() error {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return fmt.Errorf("reading the monotonic clock: %w", err)
	}
	return Notify(daemon.SdNotifyReloading, "MONOTONIC_USEC="+strconv.FormatInt(now.Nano()/1000, 10))
}

// Status keeps the line that `systemctl status` shows. Its zero value is ready.
type Status struct {
	mu   sync.Mutex // also orders the sending, or an older line might come last
	last string
}

// Set sends the line if it differs from the one that was sent last. Anybody may
// call it. What would not print is left out: a line break in a guest's words would
// begin an assignment of the guest's own.
func (s *Status) Set(line string) error {
	line = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return -1
	}, line)
	s.mu.Lock()
	defer s.mu.Unlock()
	if line == s.last {
		return nil
	}
	if err := Notify("STATUS=" + line); err != nil {
		return err
	}
	s.last = line
	return nil
}
