package eventlog

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
)

// cursorBuffer holds several of the longest lines (a payload of 60 KiB, an id
// escaped sixfold and the fixed members stay below 64 KiB).
const cursorBuffer = 256 << 10

// buffers are lent to cursors only while they read files: an idle subscriber
// costs none.
var buffers = sync.Pool{New: func() any { b := make([]byte, cursorBuffer); return &b }}

// cursor reads a stream's files record by record in order of seq. It is owned
// by one goroutine and holds a descriptor and a buffer until closed.
type cursor struct {
	st   *stream
	next uint64 // no record below it is wanted

	f     File
	first uint64 // of the open segment
	limit int64  // bytes of it that may be read
	until uint64 // records from here on belong to the segment behind it; 0: none yet
	off   int64  // file offset of buf[end]
	buf   *[]byte
	begin int // unread part of buf
	end   int

	// damaged tells whether a line that was no record was passed over since
	// the last record was returned, and where the first such line began.
	damaged   bool
	damagedAt Damage
	// expired: records from next on have expired since the last one was returned.
	expired bool
}

// Damage is a place in a file where a record should be and is not.
type Damage struct {
	File   string
	Offset int64 // bytes from the file's beginning
}

// maxDamages bounds how many damaged places are remembered, so as to tell of each once.
const maxDamages = 256

// tellOnce is tell, once for each of the first maxDamages places: all readers of a log,
// however many and however often, come upon the same ones.
func tellOnce(tell func(Damage)) func(Damage) {
	var mu sync.Mutex
	told := make(map[Damage]bool)
	return func(d Damage) {
		mu.Lock()
		news := !told[d] && len(told) < maxDamages
		if news {
			told[d] = true
		}
		mu.Unlock()
		if news {
			tell(d)
		}
	}
}

// read gives the next record with a number of at least c.next, io.EOF where
// nothing more is committed just now. rec is valid until the next call.
func (c *cursor) read(rec *Record) error {
	c.damaged, c.expired = false, false
	for {
		if c.f == nil {
			if err := c.open(); err != nil {
				return err
			}
		}
		if c.ended() {
			c.closeFile()
			continue
		}
		line, err := c.line()
		if errors.Is(err, io.EOF) {
			if c.until == 0 { // the newest segment: more may come
				return io.EOF
			}
			c.next = max(c.next, c.until)
			c.closeFile()
			continue
		}
		if err != nil {
			return err
		}
		if parseRecord(line, rec, true) != nil {
			c.markDamaged(len(line) + 1)
			continue
		}
		if c.until != 0 && rec.Seq >= c.until {
			c.next = max(c.next, c.until)
			c.closeFile()
			continue
		}
		if rec.Seq < c.next {
			continue
		}
		c.next = rec.Seq + 1
		return nil
	}
}

// ended tells whether what is left of the open segment is void: left over from a
// write that failed and could not be cut back. The segment behind it holds what
// was acknowledged under those numbers.
func (c *cursor) ended() bool { return c.until != 0 && c.next >= c.until }

// markDamaged notes that the n bytes just consumed were no record.
func (c *cursor) markDamaged(n int) {
	if !c.damaged && !c.ended() {
		c.damaged = true
		c.damagedAt = Damage{File: c.st.path(c.first), Offset: c.off - int64(c.end-c.begin) - int64(n)}
	}
}

// line takes the next whole line, without its newline, from the open segment.
func (c *cursor) line() ([]byte, error) {
	for {
		b := (*c.buf)[c.begin:c.end]
		if i := bytes.IndexByte(b, '\n'); i >= 0 {
			c.begin += i + 1
			return b[:i], nil
		}
		if len(b) == len(*c.buf) { // no record is that long: pass over it
			c.begin = c.end
			c.markDamaged(len(b))
			continue
		}
		n, err := c.fill()
		if err != nil {
			return nil, err
		}
		if n == 0 {
			if len(b) > 0 && c.until != 0 { // a sealed segment ends in the middle of a line
				c.begin = c.end
				c.markDamaged(len(b))
			}
			return nil, io.EOF
		}
	}
}

// fill reads more of the segment behind what is still unread.
func (c *cursor) fill() (int, error) {
	if c.off >= c.limit {
		if seg, until, ok := c.st.find(c.first); ok && seg.first == c.first {
			c.limit, c.until = seg.size, until
		}
		if c.off >= c.limit {
			return 0, nil
		}
	}
	buf := *c.buf
	if c.begin > 0 {
		c.end = copy(buf, buf[c.begin:c.end])
		c.begin = 0
	}
	want := min(int64(len(buf)-c.end), c.limit-c.off)
	n, err := c.f.ReadAt(buf[c.end:c.end+int(want)], c.off)
	c.end += n
	c.off += int64(n)
	if errors.Is(err, io.EOF) {
		err = nil
		if n == 0 { // shorter than it was: the file was cut by somebody else
			c.limit = c.off
		}
	}
	if err != nil {
		return n, fmt.Errorf("reading %s: %w", c.st.path(c.first), err)
	}
	return n, nil
}

// open opens the segment that holds c.next and finds the record's place in it.
func (c *cursor) open() error {
	for {
		seg, until, ok := c.st.find(c.next)
		if !ok {
			return io.EOF
		}
		f, err := c.st.fs.OpenFile(c.st.path(seg.first), os.O_RDONLY, 0)
		if errors.Is(err, fs.ErrNotExist) {
			if c.st.expiredBefore(seg.first) {
				continue // between the two calls
			}
			if c.st.lacks(seg.first) {
				c.expired, c.next = true, max(c.next, until)
				continue
			}
		}
		if err != nil {
			return fmt.Errorf("opening segment: %w", err)
		}
		c.f, c.first, c.limit, c.until = f, seg.first, seg.size, until
		if c.buf == nil {
			c.buf = buffers.Get().(*[]byte)
		}
		c.begin, c.end, c.off = 0, 0, 0
		c.expired = c.expired || seg.first > c.next
		if c.next > seg.first {
			if c.off, err = seekSeq(f, seg.size, c.next); err != nil {
				c.closeFile()
				return fmt.Errorf("searching %s: %w", c.st.path(seg.first), err)
			}
		}
		return nil
	}
}

func (c *cursor) closeFile() {
	if c.f != nil {
		_ = c.f.Close() // opened for reading: nothing can be lost
		c.f = nil
	}
}

// close gives the descriptor and the buffer back; the cursor may be used again.
func (c *cursor) close() {
	c.closeFile()
	if c.buf != nil {
		buffers.Put(c.buf)
		c.buf = nil
	}
}
