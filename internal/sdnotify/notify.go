// Package sdnotify talks to the service manager: it takes over sockets that
// systemd passed in, and reports readiness, status and liveness back.
package sdnotify

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// Notify sends assignments like READY=1 (sd_notify(3)). It does nothing where
// no service manager asked for them.
func Notify(state string) error {
	if _, err := daemon.SdNotify(false, state); err != nil {
		return fmt.Errorf("notifying the service manager: %w", err)
	}
	return nil
}

// Reloading says that a reload has begun. systemd 253 and later match it with
// the READY=1 that ends it by the monotonic time.
func Reloading() error {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return fmt.Errorf("reading the monotonic clock: %w", err)
	}
	return Notify(daemon.SdNotifyReloading + "\nMONOTONIC_USEC=" + strconv.FormatInt(now.Nano()/1000, 10))
}

// Status keeps the line that `systemctl status` shows. Its zero value is ready.
type Status struct {
	mu   sync.Mutex
	last string
}

// Set sends the line if it differs from the last one. Anybody may call it.
func (s *Status) Set(line string) error {
	s.mu.Lock()
	same := line == s.last
	s.last = line
	s.mu.Unlock()
	if same {
		return nil
	}
	return Notify("STATUS=" + line)
}

// WatchdogInterval gives how often the service manager wants to hear from this
// process, ok=false if it does not.
func WatchdogInterval() (interval time.Duration, ok bool) {
	interval, err := daemon.SdWatchdogEnabled(false)
	return interval, err == nil && interval > 0
}

// RunWatchdog feeds the watchdog until ctx is done: each time only after every
// probe has answered since the last one. A probe that fails or does not answer
// starves it, which is the point; onFail is told.
func RunWatchdog(ctx context.Context, interval time.Duration, onFail func(error), probes ...func(context.Context) error) {
	// Twice per interval, as sd_watchdog_enabled(3) recommends.
	t := time.NewTicker(interval / 2)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
		if err := answer(ctx, interval, probes); err != nil {
			if ctx.Err() == nil {
				onFail(err)
			}
			continue
		}
		if err := Notify(daemon.SdNotifyWatchdog); err != nil {
			onFail(err)
		}
	}
}

func answer(ctx context.Context, patience time.Duration, probes []func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for _, probe := range probes {
		if err := probe(ctx); err != nil {
			return fmt.Errorf("watchdog probe: %w", err)
		}
	}
	return nil
}
