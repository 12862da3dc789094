package eventlog

import (
	"math/bits"
	"sync"
	"sync/atomic"
)

const (
	// mostSlab bounds the bytes of a slab that chunks share.
	mostSlab = 1 << 20

	// slabsHeld is about how many of them the newest records fill.
	slabsHeld = 8

	// slabShare is what part of one a chunk may take, and so what may be left unused at its
	// end. A larger chunk has a slab to itself.
	slabShare = 4
)

// slab is memory for lines that is used again when nobody holds it any more. Else the
// lines of each commit would be garbage as soon as newer ones push them out: nearly all
// that a busy castrad allocates, and each collection marks all that ten thousand VMs have
// in memory.
type slab struct {
	mem   []byte // what is taken of it; of one that a single chunk has, once that is whole
	holds atomic.Int32
	pool  *sync.Pool
}

// release ends one hold. Who had it may not look at what is in the slab any more.
func (s *slab) release() {
	if s.holds.Add(-1) != 0 {
		return
	}
	if poison {
		mem := append(s.mem[:0], '!')[:cap(s.mem)]
		for n := 1; n < len(mem); n *= 2 {
			copy(mem[n:], mem[:n])
		}
	}
	s.mem = s.mem[:0]
	s.pool.Put(s)
}

// hold keeps the chunk's lines as they are until release; nil has none.
func (c *chunk) hold() *chunk {
	if c != nil && c.slab != nil {
		c.slab.holds.Add(1)
	}
	return c
}

// release ends one hold.
func (c *chunk) release() {
	if c != nil && c.slab != nil {
		c.slab.release()
	}
}

// slabs gives memory to who commits.
type slabs struct {
	size  int           // of those that chunks share
	pools [33]sync.Pool // the n-th has slabs of at least 1<<n bytes; anybody puts them back
	last  *slab         // the one that the next chunk shares, held; nil: none yet
}

// get gives a slab with room for n bytes, held once.
func (s *slabs) get(n int) *slab {
	class := bits.Len32(uint32(max(n, 1) - 1))
	sl, ok := s.pools[class].Get().(*slab)
	if !ok {
		sl = &slab{mem: make([]byte, 0, 1<<class), pool: &s.pools[class]}
	}
	sl.holds.Store(1)
	return sl
}

// settle moves c, which is whole and has a slab to itself, into one that it shares if it is
// small.
func (s *slabs) settle(c *chunk) {
	c.slab.mem = c.data // it may have outgrown what it was given
	if len(c.data) > s.size/slabShare {
		return
	}
	if s.last != nil && cap(s.last.mem)-len(s.last.mem) < len(c.data) {
		s.last.release()
		s.last = nil
	}
	if s.last == nil {
		s.last = s.get(s.size)
	}
	own, from := c.slab, len(s.last.mem)
	s.last.mem = append(s.last.mem, c.data...)
	end := len(s.last.mem)
	c.data, c.slab = s.last.mem[from:end:end], s.last
	c.hold()
	own.release()
}
