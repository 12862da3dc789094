package guest

import (
	"slices"
	"time"

	"github.com/castrabus/castra/internal/wire"
)

// item is a line of a tail.
type item struct {
	seq  uint64
	to   uint64 // a gap's end; 0: it is a record
	line []byte
	at   time.Time // when it came
	over bool      // its time lies behind what was asked for
}

// feed is what one subscription of a tail brings, in rising order.
type feed struct {
	pattern wire.Pattern
	items   []item // not shown yet; at most feedBuffer bytes, and what came last
	bytes   int
	brought uint64 // the newest record that came
	shown   uint64 // the newest one taken from items
	passed  uint64 // it has brought all that is wanted up to here
	last    uint64 // the newest record that there was for it when it was asked; 0: none
	full    bool   // it was paused for lack of room
}

// feedBuffer is how much of a subscription a tail keeps that its reader has not
// taken, in bytes.
const feedBuffer = 512 << 10

// merge puts several feeds into the order of the log. Each of its methods is called
// with the tail's lock held.
type merge struct {
	feeds []*feed
	// horizon is the newest record that there was for any feed when it was asked:
	// up to it the order can be known.
	horizon uint64
	gaps    uint64 // gaps up to here have been shown: each feed reports the same ones
}

// owner says whether feed i is the one that shows the topic: the first of those whose
// pattern matches, so that a record that comes several times is shown once.
func (g *merge) owner(i int, topic string) bool {
	return !slices.ContainsFunc(g.feeds[:i], func(f *feed) bool { return f.pattern.Match(topic) })
}

// push takes an item in, false if there is no room.
func (f *feed) push(it item) bool {
	if f.bytes >= feedBuffer {
		f.full = true
		return false
	}
	f.items = append(f.items, it)
	f.bytes += len(it.line)
	f.bring(max(it.seq, it.to))
	return true
}

// bring notes that the feed has come to seq.
func (f *feed) bring(seq uint64) { f.brought, f.passed = seq, max(f.passed, seq) }

// settle notes that everything up to the horizon has been shown, or is not wanted.
func (g *merge) settle() {
	for _, f := range g.feeds {
		f.passed = max(f.passed, g.horizon)
	}
}

// complete says whether the feed has brought all there is for it up to seq.
func (g *merge) complete(f *feed, seq uint64) bool {
	return f.passed >= seq || f.passed >= f.last
}

// caughtUp says whether every feed has brought all there is up to the horizon.
func (g *merge) caughtUp() bool {
	return !slices.ContainsFunc(g.feeds, func(f *feed) bool { return !g.complete(f, g.horizon) })
}

// head gives the feed with the oldest item, nil if there is none.
func (g *merge) head() *feed {
	var first *feed
	for _, f := range g.feeds {
		if len(f.items) > 0 && (first == nil || f.items[0].seq < first.items[0].seq) {
			first = f
		}
	}
	return first
}

// ordered takes the next item up to the horizon, once none can come before it any
// more.
func (g *merge) ordered() (item, bool) {
	f := g.head()
	if f == nil || f.items[0].seq > g.horizon {
		return item{}, false
	}
	seq := f.items[0].seq
	for _, other := range g.feeds {
		if other != f && len(other.items) == 0 && !g.complete(other, seq) {
			return item{}, false
		}
	}
	return f.pop(), true
}

// any takes the oldest item there is.
func (g *merge) any() (item, bool) {
	f := g.head()
	if f == nil {
		return item{}, false
	}
	return f.pop(), true
}

func (f *feed) pop() item {
	it := f.items[0]
	f.items[0] = item{}
	f.shown = max(it.seq, it.to)
	f.items = f.items[1:]
	f.bytes -= len(it.line)
	if len(f.items) == 0 {
		f.items = nil
	}
	return it
}

// fresh gives what is to be shown of an item: of a gap, what has not been shown
// through another feed.
func (g *merge) fresh(it item) (item, bool) {
	if it.to == 0 {
		return it, true
	}
	if it.to <= g.gaps {
		return it, false
	}
	it.seq = max(it.seq, g.gaps+1)
	g.gaps = it.to
	it.line = appendTailGap(nil, it.seq, it.to)
	return it, true
}
