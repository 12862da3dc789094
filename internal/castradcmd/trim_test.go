package castradcmd

import (
	"runtime"
	"runtime/debug"
	runtimemetrics "runtime/metrics"
	"testing"
)

var garbage, kept []byte

// TestStarting fills memory as a start does, and then sees garbage collected as before:
// once the start is over, and when much is in use.
func TestStarting(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(123))
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(1 << 40))
	defer func() { garbage, kept = nil, nil }()
	asEver := func() bool {
		now := []runtimemetrics.Sample{{Name: "/gc/gogc:percent"}, {Name: "/gc/gomemlimit:bytes"}}
		runtimemetrics.Read(now)
		return now[0].Value.Uint64() == 123 && now[1].Value.Uint64() == 1<<40
	}
	collections := func() uint32 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.NumGC
	}
	fill := func(bytes int) (collected uint32) {
		before := collections()
		for range bytes >> 18 {
			garbage = make([]byte, 1<<18)
		}
		return collections() - before
	}
	for _, tt := range []struct {
		name string
		over func(*starting)
	}{
		{"the start is over", (*starting).end},
		{"many collections", func(s *starting) {
			for !s.over.Load() {
				runtime.GC()
			}
		}},
		{"much is in use", func(*starting) {
			kept = make([]byte, startMemory/2)
			runtime.GC()
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
			if n := fill(4 * startMemory); n == 0 {
				t.Error("nothing is ever collected")
			}
			tt.over(s)
			for !asEver() { // a goroutine of the runtime's does it
				runtime.Gosched()
			}
		})
	}
}
