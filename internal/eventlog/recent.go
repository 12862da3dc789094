package eventlog

import (
	"cmp"
	"slices"
	"sync"
)

// chunk is what one write appended. It is immutable once committed, its lines for as long
// as it is held.
type chunk struct {
	first   uint64
	data    []byte   // whole lines
	slab    *slab    // has data; nil only where nobody is to use that again
	offsets []uint32 // where each line begins in data; records are consecutive
	runs    []uint32 // the lines whose sender or topic is not that of the line before
	ids     []idSeq  // of those records that have one
}

func (c *chunk) last() uint64 { return c.first + uint64(len(c.offsets)) - 1 }

// has tells whether the record seq is in c; nil has none.
func (c *chunk) has(seq uint64) bool { return c != nil && seq >= c.first && seq <= c.last() }

// line gives the i-th line without its newline.
func (c *chunk) line(i int) []byte {
	end := len(c.data)
	if i+1 < len(c.offsets) {
		end = int(c.offsets[i+1])
	}
	return c.data[c.offsets[i] : end-1 : end-1]
}

// run gives the lines from the i-th on, newlines included, that have its sender and its
// topic; at most limit bytes, but always one line. n is how many they are.
func (c *chunk) run(i, limit int) (lines []byte, n int) {
	end := len(c.offsets)
	if at, _ := slices.BinarySearch(c.runs, uint32(i)+1); at < len(c.runs) {
		end = int(c.runs[at])
	}
	start := int(c.offsets[i])
	for {
		stop := len(c.data)
		if end < len(c.offsets) {
			stop = int(c.offsets[end])
		}
		if stop-start <= limit || end == i+1 {
			return c.data[start:stop:stop], end - i
		}
		end = i + (end-i+1)/2
	}
}

// idsOf gives the ids of the n records from seq on.
func (c *chunk) idsOf(seq uint64, n int) []idSeq {
	from, _ := slices.BinarySearchFunc(c.ids, seq, compareSeq)
	to, _ := slices.BinarySearchFunc(c.ids[from:], seq+uint64(n), compareSeq)
	return c.ids[from : from+to]
}

func compareSeq(id idSeq, seq uint64) int { return cmp.Compare(id.seq, seq) }

// Commit is what one commit added, for [Options.OnCommit].
type Commit struct {
	c   *chunk
	led bool
}

// Led tells whether a publisher commits by [Log.AppendHere]: as soon as it is done with
// this it is free to do more for the record.
func (c Commit) Led() bool { return c.led }

// Runs calls f for the first record of each run of one sender on one topic, in
// order: whom one of them concerns the others concern as well. The record is valid until
// f returns.
func (c Commit) Runs(f func(*Record)) {
	var rec Record
	for _, i := range c.c.runs {
		if parseRecord(c.c.line(int(i)), &rec, false) == nil {
			f(&rec)
		}
	}
}

// recent keeps the newest chunks in memory, so that a reader that keeps up
// never touches a file.
type recent struct {
	budget int // bytes of data
	slabs  slabs

	mu     sync.RWMutex
	chunks []*chunk // each held
	bytes  int
}

func newRecent(budget int) recent {
	return recent{budget: budget, slabs: slabs{size: min(mostSlab, budget/slabsHeld)}}
}

// add takes c in, and its hold. Only who commits may call it.
func (r *recent) add(c *chunk) {
	r.slabs.settle(c)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.chunks = append(r.chunks, c)
	r.bytes += cap(c.data)
	drop := 0
	for r.bytes > r.budget && drop < len(r.chunks)-1 {
		r.bytes -= cap(r.chunks[drop].data)
		r.chunks[drop].release()
		r.chunks[drop] = nil // the array outlives the slice
		drop++
	}
	r.chunks = r.chunks[drop:]
}

// find gives the chunk that has seq, held for the caller, nil if it is not in memory.
func (r *recent) find(seq uint64) *chunk {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.at(seq).hold()
}

// has tells whether seq is in memory.
func (r *recent) has(seq uint64) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.at(seq) != nil
}

// at is find without holding. Call with the lock held.
func (r *recent) at(seq uint64) *chunk {
	if n := len(r.chunks); n > 0 && r.chunks[n-1].first <= seq { // nearly always
		if c := r.chunks[n-1]; seq <= c.last() {
			return c
		}
		return nil
	}
	i, exact := slices.BinarySearchFunc(r.chunks, seq, func(c *chunk, seq uint64) int { return cmp.Compare(c.first, seq) })
	if !exact {
		i--
	}
	if i < 0 {
		return nil
	}
	return r.chunks[i]
}

// oldest gives the oldest number in memory; 0: nothing is.
func (r *recent) oldest() uint64 {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if len(r.chunks) == 0 {
		return 0
	}
	return r.chunks[0].first
}
