package eventlog

import (
	"fmt"
	"testing"
)

// BenchmarkCheckpoint makes a checkpoint after so many VMs have published, each one
// record with an id: what a stop waits for, and what the disk gets every 30 s.
func BenchmarkCheckpoint(b *testing.B) {
	for _, vms := range []int{1, 10, 100, 1000, 10_000} {
		b.Run(fmt.Sprintf("vms=%d", vms), func(b *testing.B) {
			opts := testOptions(b.TempDir())
			opts.SegmentSize, opts.Retention, opts.Recent = benchSegment, 1<<30, 64<<20
			l, _, err := open(opts)
			if err != nil {
				b.Fatal(err)
			}
			for n := range b.N {
				b.StopTimer()
				batch := &Batch{done: make(chan struct{}, 1)}
				for i := range vms {
					id := fmt.Appendf(nil, "id%d-%d", n, i)
					batch.Entries = append(batch.Entries, Entry{VM: fmt.Sprintf("vm%05d", i), Topic: []byte("t"), ID: id, Payload: benchPayload(200)})
				}
				if err := l.perVM.ids.acquire(b.Context(), batch); err != nil {
					b.Fatal(err)
				}
				l.commit(batch)
				if err := l.perVM.copyNew(); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				if err := l.perVM.checkpoint(); err != nil {
					b.Fatal(err)
				}
			}
			b.StopTimer()
			if err := l.finish(); err != nil {
				b.Fatal(err)
			}
		})
	}
}
