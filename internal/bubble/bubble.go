// Package bubble runs a test in a bubble of testing/synctest, with a clock of its own.
package bubble

import (
	"os"
	"os/signal"
	"runtime"
	"testing"
	"testing/synctest"
)

// Test is synctest.Test on one processor, for tests that are not parallel. On several,
// the race detector of Go 1.26 crashes now and then, with a segmentation violation: a
// bubble has one race context for its timers, and goroutines on two processors that
// both find one due use it at once (golang/go#78156).
func Test(t *testing.T, f func(*testing.T)) {
	t.Helper()
	// Who asks for signals first begins the goroutine that hands them out, which never
	// ends: in a bubble it would be one of the bubble's, a deadlock to the runtime.
	signals := make(chan os.Signal, 1) // room for one: nobody reads it
	signal.Notify(signals, os.Interrupt)
	signal.Stop(signals)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	synctest.Test(t, f) //nolint:forbidigo // this is where it is made safe
}
