package backoff

import (
	"testing"
	"time"
)

func TestCeilingDoublesUpToTheHighest(t *testing.T) {
	b := NewWith(time.Second, 30*time.Second, func(n int64) int64 { return n - 1 })
	for i, want := range []time.Duration{1, 2, 4, 8, 16, 30, 30} {
		if got := b.Next(); got != want*time.Second {
			t.Errorf("pause %d is %v, want %v", i, got, want*time.Second)
		}
	}
	b.Reset()
	if got := b.Next(); got != time.Second {
		t.Errorf("after Reset %v", got)
	}
}

func TestPausesStayWithinBounds(t *testing.T) {
	b := New(time.Second, 30*time.Second)
	distinct := map[time.Duration]bool{}
	for range 1000 {
		p := b.Next()
		if p < time.Second || p > 30*time.Second {
			t.Fatalf("a pause of %v", p)
		}
		distinct[p] = true
	}
	if len(distinct) < 100 {
		t.Errorf("only %d different pauses: no jitter", len(distinct))
	}
}
