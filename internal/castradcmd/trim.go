package castradcmd

import (
	"context"
	"runtime"
	"runtime/debug"
	runtimemetrics "runtime/metrics"
	"time"
)

const (
	// trimEvery is how often it is looked whether memory is worth giving back.
	trimEvery = 10 * time.Second

	// trimQuiet is how much may be allocated in that time by a castrad that has
	// nothing to do: the heartbeats of ten thousand guests stay below it.
	trimQuiet = 8 << 20

	// collectWorth is how much a castrad with nothing to do lets lie about. The runtime
	// waits for as much again as is in use, which with ten thousand guests is most of a
	// minute's, and a collection takes 20 ms then.
	collectWorth = 6 << 20
)

// trim gives memory back to the system when a burst is over: the runtime by itself
// keeps as much again as is in use, for the next burst, and for ever.
func trim(ctx context.Context) {
	allocated := []runtimemetrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	t := time.NewTicker(trimEvery)
	defer t.Stop()
	var collected, before uint64 // of what was allocated
	burst := false
	for {
		runtimemetrics.Read(allocated)
		now := allocated[0].Value.Uint64()
		quiet := now-before < trimQuiet
		switch {
		case !quiet:
			burst = true
		case burst:
			runtime.GC() // what is left in pools goes with the second one alone
			debug.FreeOSMemory()
			burst, collected = false, now
		case now-collected > collectWorth:
			runtime.GC()
			collected = now
		}
		before = now
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}
