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

	// trimWorth is how much must have been allocated since memory was given back last:
	// doing so costs two collections. Ten thousand idle guests come to it in a minute.
	trimWorth = 16 << 20
)

// trim gives memory back to the system when a burst is over: the runtime by itself
// keeps as much again as is in use, for the next burst, and for ever.
func trim(ctx context.Context) {
	allocated := []runtimemetrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	t := time.NewTicker(trimEvery)
	defer t.Stop()
	var trimmed, before uint64
	for {
		runtimemetrics.Read(allocated)
		now := allocated[0].Value.Uint64()
		if now-before < trimQuiet && now-trimmed > trimWorth {
			runtime.GC() // what a burst has left in pools goes with the second one alone
			debug.FreeOSMemory()
			trimmed = now
		}
		before = now
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}
