package eventlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// makeRoom makes room on the disk after a start, which goes on then. Before it does, a
// log that has found none takes nothing.
func (c *crashLife) makeRoom(l *Log) {
	p := l.perVM
	for range c.rng.IntN(3) {
		if l.c.file == nil {
			l.retry()
			_ = p.goOn()
		}
	}
	late, torn, asides := l.c.file == nil, l.c.torn != nil, len(c.asides)
	if late {
		vm := crashVMs[c.rng.IntN(len(crashVMs))]
		b := &Batch{done: make(chan struct{}, 1), Entries: []Entry{{VM: vm, Topic: []byte("t"), Payload: []byte(`"no-room"`)}}}
		if used := c.ids[vm]; len(used) > 0 {
			b.Entries[0].ID = []byte(used[len(used)-1].id)
		}
		if err := p.ids.acquire(context.Background(), b); err != nil {
			c.violated("ids: %v", err)
		}
		l.commit(b)
		if b.Entries[0].Err == nil {
			c.violated("a record is taken, and there is no room")
		}
	}
	c.full, c.disk.noRoom = false, false
	if late {
		if p.late() != nil {
			if err := p.goOn(); err != nil {
				c.violated("there is room, and still %v", err)
			}
		}
		if l.retry(); l.State().Degraded != "" {
			c.violated("there is room, and it is %+v", l.State())
		}
		if torn && len(c.asides) == asides {
			c.violated("an unfinished tail is not kept aside when there is room")
		}
	}
}

// wasCut takes in that an unfinished tail was cut off.
func (c *crashLife) wasCut(cut Cut) {
	aside := c.contents(cut.Aside)
	if !bytes.Equal(aside, c.tail[cut.Offset:]) {
		c.violated("%d bytes were cut off, %d others kept aside", len(c.tail)-int(cut.Offset), len(aside))
	}
	c.asides = append(c.asides, bytes.Clone(aside))
}

// step does one thing with the log.
func (c *crashLife) step(l *Log) {
	p := l.perVM
	switch n := c.rng.IntN(20); {
	case n < 11:
		c.publish(l)
	case n < 14:
		c.allow("copying", p.copyNew())
	case n < 15:
		if err := p.checkpoint(); err != nil {
			c.allow("a checkpoint", err)
		} else {
			c.saved = p.saved.Load()
		}
	case n < 16:
		l.expire()
	case n < 17 && l.Lazy():
		l.syncLazily()
		c.synced = max(c.synced, l.durable.Load())
	case n < 18:
		c.readVM(l)
	default:
		if l.c.file == nil {
			l.retry()
		}
	}
}

// allow lets pass an error that a fault may have caused.
func (c *crashLife) allow(what string, err error) {
	if err != nil && c.faults == 0 {
		c.violated("%s failed: %v", what, err)
	}
}

// publish commits a few batches together, and reads what came of it.
func (c *crashLife) publish(l *Log) {
	var batches []*Batch
	most := 3
	if c.plain {
		most = 1
	}
	for range 1 + c.rng.IntN(most) {
		b := &Batch{done: make(chan struct{}, 1)}
		for range 1 + c.rng.IntN(most) {
			b.Entries = append(b.Entries, c.entry())
		}
		batches = append(batches, b)
	}
	for _, b := range batches {
		if err := l.perVM.ids.acquire(context.Background(), b); err != nil {
			c.violated("ids: %v", err)
		}
		if b != batches[0] {
			l.queue <- b
		}
	}
	faults := c.faults
	l.commit(batches[0])
	faults = c.faults - faults
	before := len(c.known)
	var refused []string
	for _, b := range batches {
		for _, e := range b.Entries {
			payload := string(e.Payload)
			switch {
			case e.Err != nil:
				c.allow("a publish", e.Err)
				refused = append(refused, payload)
			case e.Duplicate:
				c.checkDuplicate(&e)
				delete(c.unknown, payload)
			default:
				if e.Seq != uint64(len(c.known)) {
					c.violated("record %d is acknowledged as %d", len(c.known), e.Seq)
				}
				c.know(c.unknown[payload])
			}
		}
	}
	// What was refused is not stored, unless the disk would not even let it be cut
	// off again: then it is open until something else is stored.
	open := faults > 1 && len(refused) > 0
	for _, payload := range refused {
		if !open {
			c.never[payload] = c.unknown[payload]
			delete(c.unknown, payload)
		}
	}
	if len(c.known) > before && !open {
		for payload, what := range c.unknown {
			c.never[payload] = what
		}
		clear(c.unknown)
	}
	c.read(l, uint64(before))
}

// entry makes up a record: every payload is another. Where its id was used
// before, it may be stored or not.
func (c *crashLife) entry() Entry {
	vm := crashVMs[c.rng.IntN(len(crashVMs))]
	topic := []string{"t", "broadcast", "vm:web1", "vm:web2/x"}[c.rng.IntN(4)]
	c.payloads++
	size := c.rng.IntN(250)
	if c.rng.IntN(50) == 0 {
		size = 5000 // longer than a segment
	}
	if c.plain {
		topic, size = "t", 100
	}
	payload := fmt.Sprintf(`"%d-%s"`, c.payloads, strings.Repeat("x", size))
	e := Entry{VM: vm, Topic: []byte(topic), Payload: []byte(payload)}
	quoted := ""
	if !c.plain && c.rng.IntN(2) == 0 {
		id := "id" + strconv.Itoa(c.payloads)
		if used := c.ids[vm]; len(used) > 0 && c.rng.IntN(3) == 0 { // a retry of one of the newest
			id = used[len(used)-1-c.rng.IntN(min(4, len(used)))].id
		}
		e.ID = []byte(id)
		quoted = strconv.Quote(id)
		c.ids[vm] = append(c.ids[vm], simID{id, payload})
	}
	c.unknown[payload] = fmt.Sprintf("%s %s %s %s", vm, topic, quoted, payload)
	return e
}

// read reads from seq to the end, as a subscriber would.
func (c *crashLife) read(l *Log, seq uint64) {
	r := l.NewReader(seq)
	defer r.Close()
	var rec Record
	for {
		ok, err := r.Next(&rec)
		var gap *Gap
		if errors.As(err, &gap) && gap.To < l.Oldest() {
			continue
		}
		if err != nil {
			c.violated("reading from %d: %v", seq, err)
		}
		if !ok {
			return
		}
		if rec.Seq >= uint64(len(c.known)) {
			c.violated("record %d is given before it is acknowledged", rec.Seq)
		}
		c.see(&rec)
	}
}

// readVM reads a VM's own stream, which must give all of the VM's records.
func (c *crashLife) readVM(l *Log) {
	vm := crashVMs[c.rng.IntN(3)]
	from := uint64(c.rng.IntN(len(c.known)) + 1)
	r, err := l.NewVMReader(vm, from)
	if err != nil {
		c.violated("opening the stream of %s: %v", vm, err)
	}
	defer r.Close()
	for {
		var rec Record
		ok, err := r.Next(&rec)
		var gap *Gap
		if errors.As(err, &gap) {
			if gap.From < from {
				c.violated("a gap from %d follows %d", gap.From, from-1)
			}
			from = gap.To + 1
			continue
		}
		if err != nil {
			c.violated("reading the stream of %s: %v", vm, err)
		}
		if !ok {
			rec.Seq = uint64(len(c.known))
		}
		for ; from < rec.Seq; from++ {
			if sender, _, _ := strings.Cut(c.known[from], " "); sender == vm {
				c.violated("record %d of %s is passed over in silence", from, vm)
			}
		}
		if !ok {
			return
		}
		c.see(&rec)
		from = rec.Seq + 1
	}
}
