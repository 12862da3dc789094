package backoff

import (
	"slices"
	"testing"
	"time"
)

func seconds(b *Backoff, n int) (got []time.Duration) {
	for range n {
		got = append(got, b.Next()/time.Second)
	}
	return got
}

func TestPausesSpanFromTheLowestToADoublingCeiling(t *testing.T) {
	tests := []struct {
		name            string
		lowest, highest time.Duration
		draw            func(n int64) int64
		want            []time.Duration // in seconds
	}{
		{"most", 1, 30, func(n int64) int64 { return n - 1 }, []time.Duration{2, 4, 8, 16, 30, 30}},
		{"least", 1, 30, func(int64) int64 { return 0 }, []time.Duration{1, 1, 1, 1, 1, 1}},
		{"middle", 1, 30, func(n int64) int64 { return n / 2 }, []time.Duration{1, 2, 4, 8, 15, 15}},
		{"no room", 5, 5, func(n int64) int64 { return n - 1 }, []time.Duration{5, 5}},
		{"wrong way round", 5, 1, func(n int64) int64 { return n - 1 }, []time.Duration{5, 5}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newWith(tt.lowest*time.Second, tt.highest*time.Second, tt.draw)
			for _, run := range []string{"fresh", "after Reset"} {
				if got := seconds(b, len(tt.want)); !slices.Equal(got, tt.want) {
					t.Errorf("%s: pauses of %d s, want %d", run, got, tt.want)
				}
				b.Reset()
			}
		})
	}
}

// The first pause matters most: it is what many guests begin with at one time.
func TestEvenTheFirstPauseIsDrawn(t *testing.T) {
	distinct := map[time.Duration]bool{}
	for range 1000 {
		p := New(time.Second, 30*time.Second).Next()
		if p < time.Second || p > 2*time.Second {
			t.Fatalf("a first pause of %v", p)
		}
		distinct[p] = true
	}
	if len(distinct) < 500 {
		t.Errorf("only %d different pauses of 1000", len(distinct))
	}
}
