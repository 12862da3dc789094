package sdnotify

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// WatchdogInterval gives the time without a sign of life after which the service
// manager kills this process; ok is false where it does not watch it.
func WatchdogInterval() (interval time.Duration, ok bool) {
	interval, err := daemon.SdWatchdogEnabled(false)
	return interval, err == nil && interval > 0
}

// RunWatchdog gives signs of life until ctx is done, each only after every probe
// has answered since the last one. interval is what WatchdogInterval gave. A probe
// answers by returning nil, must return once its context is done, and is never run
// twice at a time. onFail is told, from this goroutine, why a sign was not given:
// before the service manager kills the process for it.
//
// Probes begin every third of interval and may take as long: while they answer, a
// third is to spare for a machine that is busy.
func RunWatchdog(ctx context.Context, interval time.Duration, onFail func(error), probes ...func(context.Context) error) {
	t := time.NewTicker(interval / 3)
	defer t.Stop()
	for {
		err := answers(ctx, interval/3, probes)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			err = Notify(daemon.SdNotifyWatchdog)
		}
		if err != nil {
			onFail(err)
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

// answers runs all probes at once and waits for them.
func answers(ctx context.Context, patience time.Duration, probes []func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	errs := make([]error, len(probes))
	var running sync.WaitGroup
	for i, probe := range probes {
		running.Go(func() { errs[i] = probe(ctx) })
	}
	running.Wait()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("probing for signs of life: %w", err)
	}
	return nil
}
