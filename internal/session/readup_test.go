package session

import (
	"testing"
	"time"
)

// Who reads up rests where others live on what is committed meanwhile, and only
// there; and never so that he falls back.
func TestReadingUpRests(t *testing.T) {
	type look struct {
		after          time.Duration // since the one before
		committed, lag uint64
		rest           time.Duration
	}
	const ms = time.Millisecond
	for name, looks := range map[string][]look{
		"beside a live publisher": {
			{0, 1_000_000, 900_000, 0},
			{readUpFor / 2, 1_000_001, 899_000, 0},
			{readUpFor / 2, 1_000_002, 898_000, readUpRest},
			{10 * ms, 1_000_012, 897_000, 0}, // woken late: this turn has only begun
			{ms, 1_000_013, 896_000, readUpRest},
			{3 * ms, 1_000_013, 895_000, 0},
			{ms, 1_000_013, 894_000, readUpRest}, // the next is sure to come
		},
		"alone": {
			{0, 1_000_000, 900_000, 0},
			{ms, 1_000_000, 898_000, 0},
			{ms, 1_000_000, 896_000, 0},
			{ms, 1_000_000, 894_000, 0},
		},
		"when the others have gone": {
			{0, 1_000_000, 900_000, 0},
			{ms, 1_000_001, 898_000, readUpRest},
			{3 * ms, 1_000_001, 897_000, 0},
			{livelyFor, 1_000_001, 500_000, 0},
			{ms, 1_000_001, 499_000, 0},
			{ms, 1_000_001, 498_000, 0},
		},
		"falling back": {
			{0, 1_000_000, 900_000, 0},
			{ms, 1_010_000, 901_000, 0},
			{ms, 1_020_000, 902_000, 0},
			{ms, 1_030_000, 903_000, 0},
			{ms, 1_030_000, 903_000, 0},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var r readingUp
			now := time.Unix(1_000_000, 0)
			for i, l := range looks {
				now = now.Add(l.after)
				if got := r.rest(now, l.committed, l.lag); got != l.rest {
					t.Fatalf("look %d: rests for %v, not %v", i, got, l.rest)
				}
			}
		})
	}
}
