package castradcmd

import (
	"runtime"
	"runtime/debug"
	"testing"
)

var garbage, kept []byte

// TestStarting fills memory as a start does, and then sees garbage collected as before:
// once the start is over, after many collections, and when much is in use.
func TestStarting(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(123))
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(1 << 40))
	defer func() { garbage, kept = nil, nil }()
	asEver := func() bool { return metric("/gc/gogc:percent") == 123 && metric("/gc/gomemlimit:bytes") == 1<<40 }
	fill := func(bytes int) (collected uint64) {
		const collections = "/gc/cycles/total:gc-cycles"
		before := metric(collections)
		for range bytes >> 18 {
			garbage = make([]byte, 1<<18)
		}
		return metric(collections) - before
	}
	for _, tt := range []struct {
		name string
		over func(*testing.T, *starting)
	}{
		{"the start is over", func(_ *testing.T, s *starting) { s.end() }},
		{"many collections", func(t *testing.T, _ *starting) {
			if n := fill(4 * startMemory); n == 0 {
				t.Error("nothing is ever collected")
			}
			for !asEver() {
				runtime.GC()
			}
		}},
		{"much is in use", func(t *testing.T, s *starting) {
			kept = make([]byte, startMemory/2)
			runtime.GC()
			for !asEver() {
				runtime.Gosched()
			}
			if s.end(); s.collected == startCollections {
				t.Error("it takes many collections")
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			debug.FreeOSMemory()
			s := beginStart()
			if n := fill(startMemory / 4); n > 0 {
				t.Errorf("%d collections in the first quarter of what may be taken", n)
			}
			if runtime.GC(); asEver() {
				t.Error("a collection that leaves little ends it")
			}
			tt.over(t, s)
			for !asEver() { // a goroutine of the runtime's does it
				runtime.Gosched()
			}
		})
	}
}
