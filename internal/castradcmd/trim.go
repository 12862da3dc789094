package castradcmd

import (
	"context"
	"runtime"
	"runtime/debug"
	runtimemetrics "runtime/metrics"
	"sync"
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

const (
	// startMemory is how many bytes a castrad that starts takes before it collects garbage.
	startMemory = 64 << 20

	// startCollections is how often it does so at most before it does as ever: where what
	// is no heap takes nearly all of them, there would be one after the other.
	startCollections = 8
)

// starting is the time in which garbage is collected less. When castrad is back after a
// crash ten thousand guests connect within a second: half a dozen collections while the
// heap grows from nothing to what they need, which take a tenth of the processor that all
// of them wait for.
type starting struct {
	percent   int // GOGC and GOMEMLIMIT as they are otherwise
	limit     int64
	over      sync.Once
	collected int // of watch
}

// beginStart begins it.
func beginStart() *starting {
	s := &starting{percent: debug.SetGCPercent(-1), limit: debug.SetMemoryLimit(-1)}
	debug.SetMemoryLimit(min(s.limit, startMemory))
	s.watch()
	return s
}

// end has garbage collected as ever.
func (s *starting) end() {
	s.over.Do(func() {
		debug.SetGCPercent(s.percent)
		debug.SetMemoryLimit(s.limit)
	})
}

// watch ends the start when a collection leaves so much that the limit would have the next
// one come sooner than ever.
func (s *starting) watch() {
	unused := new([64]byte) // less shares its place with what may be in use (runtime.AddCleanup)
	runtime.AddCleanup(unused, func(s *starting) {
		if s.collected++; metric("/gc/heap/live:bytes") > startMemory/3 || s.collected == startCollections {
			s.end()
		} else {
			s.watch()
		}
	}, s)
}

// metric gives one of runtime/metrics.
func metric(name string) uint64 {
	m := []runtimemetrics.Sample{{Name: name}}
	runtimemetrics.Read(m)
	return m[0].Value.Uint64()
}

// trim gives memory back to the system when a burst is over: the runtime by itself
// keeps as much again as is in use, for the next burst, and for ever. The start ends when
// it looks again.
func trim(ctx context.Context, start *starting) {
	t := time.NewTicker(trimEvery)
	defer t.Stop()
	var collected, before uint64 // of what was allocated
	burst := false
	for {
		now := metric("/gc/heap/allocs:bytes")
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
			start.end()
		case <-ctx.Done():
			return
		}
	}
}
