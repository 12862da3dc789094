package guest

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/castrabus/castra/internal/wire"
)

func testMerge(t *testing.T, patterns ...string) *merge {
	t.Helper()
	g := &merge{}
	for _, p := range patterns {
		parsed, err := wire.ParsePattern(p)
		if err != nil {
			t.Fatal(err)
		}
		g.feeds = append(g.feeds, &feed{pattern: parsed})
	}
	return g
}

// TestMerge lets feeds bring a log in every kind of interleaving: each record up to
// the horizon is shown once and in order, and nothing waits for ever.
func TestMerge(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	topics := []string{"a", "a.b", "c", "vm:self", "vm:self/x"}
	for range 500 {
		g := testMerge(t, ">", "a.*", "vm:self", "vm:self/>")
		log := make([]string, 1+rng.IntN(60)) // log[i] is the topic of record i+1
		for i := range log {
			log[i] = topics[rng.IntN(len(topics))]
		}
		g.horizon = uint64(1 + rng.IntN(len(log)))
		brings := make([][]uint64, len(g.feeds)) // what the host sends on each
		var want []uint64
		for i, topic := range log {
			seq := uint64(i + 1)
			matched := false
			for j, f := range g.feeds {
				if f.pattern.Match(topic) {
					brings[j] = append(brings[j], seq)
					f.last = max(f.last, seq)
					matched = true
				}
			}
			if matched && seq <= g.horizon {
				want = append(want, seq)
			}
		}
		var got []uint64
		for {
			left := slices.DeleteFunc([]int{0, 1, 2, 3}, func(i int) bool { return len(brings[i]) == 0 })
			if len(left) == 0 {
				break
			}
			j := left[rng.IntN(len(left))]
			seq := brings[j][0]
			brings[j] = brings[j][1:]
			if g.owner(j, log[seq-1]) {
				g.feeds[j].push(item{seq: seq})
			} else {
				g.feeds[j].bring(seq)
			}
			for it, ok := g.ordered(); ok; it, ok = g.ordered() {
				got = append(got, it.seq)
			}
			if g.caughtUp() {
				if _, more := g.ordered(); more || !slices.Equal(got, want) {
					t.Fatalf("caught up with %v, want %v", got, want)
				}
			}
		}
		if !g.caughtUp() || !slices.Equal(got, want) {
			t.Fatalf("of %q up to %d shown %v, want %v", log, g.horizon, got, want)
		}
	}
}

func TestMergeShowsAGapOnce(t *testing.T) {
	g := testMerge(t, ">", "vm:self")
	var got []string
	for _, gap := range []item{{seq: 1, to: 10}, {seq: 1, to: 10}, {seq: 5, to: 12}} {
		if it, ok := g.fresh(gap); ok {
			got = append(got, fmt.Sprintf("%d-%d", it.seq, it.to))
		}
	}
	if want := []string{"1-10", "11-12"}; !slices.Equal(got, want) {
		t.Errorf("shown %v, want %v", got, want)
	}
}

func TestFeedIsBounded(t *testing.T) {
	f := &feed{}
	line := make([]byte, 64<<10)
	n := 0
	for f.push(item{seq: uint64(n + 1), line: line}) {
		n++
	}
	if n != feedBuffer/len(line) || !f.full || f.passed != uint64(n) {
		t.Errorf("took %d, %+v", n, f.passed)
	}
	for range n {
		f.pop()
	}
	if f.bytes != 0 {
		t.Errorf("empty, it counts %d bytes", f.bytes)
	}
}
