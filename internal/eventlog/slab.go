package eventlog

import (
	"sync"
	"sync/atomic"
)

const (
	// mostSlab bounds a slab's bytes: several of the largest chunks that are put into one.
	mostSlab = 1 << 20

	// slabsHeld is about how many of them the newest records fill.
	slabsHeld = 8

	// slabShare is what part of a slab a chunk may take: it bounds what is left unused at
	// a slab's end.
	slabShare = 4
)

// slab is memory that chunks share and that is used again when nobody holds it any more.
// Without it the lines of each commit would be garbage as soon as newer ones push them
// out, nearly all that a busy castrad allocates, and each collection marks all that ten
// thousand VMs have in memory.
type slab struct {
	mem   []byte // what chunks have of it
	holds atomic.Int32
	pool  *sync.Pool
}

// release ends one hold. Nobody may look at what he has held it for any more.
func (s *slab) release() {
	if s.holds.Add(-1) != 0 {
		return
	}
	if poison {
		mem := s.mem[:cap(s.mem)]
		for i := range mem {
			mem[i] = '!'
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

// slabs makes room for the lines of small chunks. It belongs to who commits.
type slabs struct {
	size int
	pool sync.Pool
	last *slab // held; nil: none yet
}

// keep gives c memory of its own, and back the buffer that its lines were in; nil: it
// has that itself now, since it is a large one. c is held once.
func (s *slabs) keep(c *chunk) (buf []byte) {
	if len(c.data) > s.size/slabShare {
		return nil
	}
	if s.last == nil || cap(s.last.mem)-len(s.last.mem) < len(c.data) {
		if s.last != nil {
			s.last.release()
		}
		next, ok := s.pool.Get().(*slab)
		if !ok {
			next = &slab{mem: make([]byte, 0, s.size), pool: &s.pool}
		}
		next.holds.Store(1)
		s.last = next
	}
	from := len(s.last.mem)
	s.last.mem = append(s.last.mem, c.data...)
	end := len(s.last.mem)
	buf = c.data[:0]
	c.data, c.slab = s.last.mem[from:end:end], s.last
	c.hold()
	return buf
}
