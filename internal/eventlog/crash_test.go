package eventlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

// crashLife is one log that crashes again and again on a simulated disk, and
// what it has promised so far. The log is driven step by step on one goroutine,
// so that a crash at the n-th operation of a seed is always the same crash.
type crashLife struct {
	rng    *rand.Rand
	disk   *simDisk
	opts   Options
	faulty bool // the disk also fails while it has power
	faults int  // so far
	opened bool // it has been open before: its directories are there
	full   bool // the disk has no room just now
	plain  bool // records of one size: what is left in the journal of an earlier round begins where the newest one ends
	boots  int
	stale  bool // the journal has what was refused, and could not be removed: that may need room
	inodes bool // nor for a file

	log *Log

	// What must be there for good: acknowledged, given to a reader, or come back
	// after a crash, by number; known[0] is unused.
	known  []string
	synced uint64 // the newest record that a lazy log has synced
	saved  uint64 // the newest position that a checkpoint has saved

	stored  map[string]uint64 // the number of each payload in known
	unknown map[string]string // attempts that a crash cut short, by payload
	never   map[string]string // refused, or lost in a crash: they must not appear, by payload
	ids     map[string][]simID
	fewer   map[string]int    // of a VM's ids are kept, since a crash took so many newer ones
	oldest  map[string]uint64 // a directory's: what expired before it may be gone
	asides  [][]byte          // must all be kept

	tail     []byte // of the newest segment when the log was opened
	tailFile string
	tailSafe bool // it was synced
	payloads int
	crashes  int
}

// simID is an id that a VM has used, and its record's number, 0 if there is none.
type simID struct {
	id      string
	payload string
}

// violation is a promise not kept.
type violation string

var crashVMs = []string{"web1", "web2", "web3", "host"}

const (
	crashIDWindow = 12

	// Of so many lives, one has a disk that fails, and one a lazy log.
	crashKinds  = 5
	crashFaulty = 3
	crashLazy   = 4
)

// newCrashLife makes a life whose every step follows from seed.
func newCrashLife(seed uint64) *crashLife {
	rng := rand.New(rand.NewPCG(seed, 0))
	c := &crashLife{
		rng: rng, disk: newSimDisk(rng), known: make([]string, 1),
		stored: map[string]uint64{}, unknown: map[string]string{}, never: map[string]string{},
		ids: map[string][]simID{}, fewer: map[string]int{}, oldest: map[string]uint64{},
	}
	c.opts = testOptions("/log/bus")
	c.opts.FS, c.opts.SegmentSize, c.opts.Retention, c.opts.Recent = c.disk, 2048, 10<<10, 4096
	c.opts.PerVM.SegmentSize, c.opts.PerVM.Retention, c.opts.PerVM.idWindow = 1024, 4096, crashIDWindow
	if rng.IntN(4) > 0 {
		c.opts.Journal, c.opts.journalSize, c.opts.SegmentSize = "/log/journal", 1024<<rng.IntN(3), 2048<<rng.IntN(2)
		c.opts.Recent = 16 << 10 // all that is in the journal, as it is with the sizes of castrad
	}
	c.plain = seed%crashKinds != crashLazy && rng.IntN(4) == 0
	if rng.IntN(4) == 0 {
		c.expired(200 + rng.IntN(50))
	}
	c.boot()
	c.opts.PerVM.together = 1 + rng.IntN(len(crashVMs)) // one by one, or all at once
	c.opts.OnCut = c.wasCut
	c.opts.OnDamage = func(d Damage) { c.violated("damage at %d of %s", d.Offset, d.File) }
	switch seed % crashKinds {
	case crashFaulty:
		c.faulty = true
	case crashLazy:
		c.opts.SyncEvery = 1 << 40 // synced where the test says so
	}
	c.disk.fault = c.fault
	return c
}

// expired makes the log one whose first so many records have expired: where a number gets
// another byte, what a crash leaves of it may look like an older one.
func (c *crashLife) expired(n int) {
	first := uint64(n) + 1
	c.known = make([]string, first)
	c.oldest[c.opts.Dir] = first
	c.opts.Retention = 0 // or the record that tells might expire, too
	st := &stream{fs: c.disk, dir: c.opts.Dir}
	if err := MakeDir(c.disk, st.dir); err != nil {
		c.violated("%v", err)
	}
	if _, err := st.create(first); err != nil {
		c.violated("%v", err)
	}
	if err := st.syncDir(); err != nil {
		c.violated("%v", err)
	}
}

// boot starts the machine anew.
func (c *crashLife) boot() {
	c.boots++
	c.opts.Boot = fmt.Sprintf("%032x", c.boots)
}

func (c *crashLife) violated(format string, args ...any) {
	panic(violation(fmt.Sprintf(format, args...)))
}

// fault notes what expires, and fails now and then.
func (c *crashLife) fault(op, path string) error {
	if c.full {
		if op == "mkdir" || op == "create" && c.inodes {
			return syscall.ENOSPC
		}
	}
	if op == "remove" {
		dir := filepath.Dir(path)
		first, _ := segmentFirst(filepath.Base(path))
		_, node, _ := c.disk.find(dir)
		for _, name := range slices.Sorted(maps.Keys(node.names)) {
			if next, ok := segmentFirst(name); ok && next > first {
				c.oldest[dir] = max(c.oldest[dir], next)
				break
			}
		}
	}
	if !c.faulty || c.log == nil || c.rng.IntN(40) > 0 {
		return nil
	}
	c.faults++
	return []error{syscall.EIO, syscall.ENOSPC, syscall.EROFS}[c.rng.IntN(3)]
}

// live runs the log through so many crashes and gives the first promise that
// was not kept, "" if all were.
func (c *crashLife) live(crashes int) (broken violation) {
	for c.crashes = 0; c.crashes < crashes; c.crashes++ {
		reach := 120
		if c.rng.IntN(3) == 0 {
			reach = 12 // within the recovery
		}
		c.disk.crashAt = 1 + c.rng.IntN(reach)
		if broken = c.run(c.rng.IntN(40)); broken != "" {
			return broken
		}
		power := c.rng.IntN(4) > 0
		boot := power && c.rng.IntN(8) > 0 // else the disk went away, and was mounted again
		c.disk.crash(power, boot)
		if boot {
			c.boot()
		}
	}
	return c.run(0)
}

// run opens the log, checks what came back, and works on it until the crash
// or for so many steps; then it may close it.
func (c *crashLife) run(steps int) (broken violation) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case violation:
			broken = r
		case error:
			if !errors.Is(r, errPowerCut) {
				panic(r)
			}
		default:
			panic(r)
		}
		if c.stale = c.log != nil && c.log.c.journal.stale; c.log != nil {
			c.synced = max(c.synced, c.log.durable.Load())
		}
		c.log = nil
	}()
	c.checkCut()
	c.noteTail()
	// Without one of the syncs it may be that only the full disk is in the way.
	c.full, c.inodes = c.opened && !c.stale && c.disk.ignored == "" && c.rng.IntN(4) == 0, c.rng.IntN(2) == 0
	c.disk.noRoom = c.full
	l, rec, err := open(c.opts)
	if err != nil {
		c.violated("opening: %v", err)
	}
	if rec.Journal != nil {
		c.violated("%v", rec.Journal)
	}
	c.opened = true
	if rec.Cut != nil {
		c.wasCut(*rec.Cut)
	}
	if c.full {
		c.makeRoom(l)
	}
	c.tail = nil
	c.checkRecovered(l, rec)
	c.log = l
	for range steps {
		c.step(l)
	}
	if steps%4 == 1 {
		if err := l.finish(); err != nil && !c.faulty {
			c.violated("closing: %v", err)
		}
	}
	return ""
}

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

// crashSeeds runs every so many-th life from a seed on, on all processors, until
// so many crashes have been, and gives the first life that broke a promise.
func crashSeeds(from, every uint64, crashes int, change func(*crashLife)) (seed uint64, broken violation, total int) {
	const perLife = 25
	var next atomic.Uint64
	next.Store(from)
	end := from + every*uint64(crashes/perLife)
	var mu sync.Mutex
	var work sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		work.Go(func() {
			for {
				s := next.Add(every) - every
				if s >= end {
					return
				}
				c := newCrashLife(s)
				if change != nil {
					change(c)
				}
				b := c.live(perLife)
				mu.Lock()
				total += c.crashes
				if b != "" && (broken == "" || s < seed) {
					seed, broken = s, b
				}
				if broken != "" {
					next.Store(end)
				}
				mu.Unlock()
			}
		})
	}
	work.Wait()
	return seed, broken, total
}

func crashSeed(t *testing.T) uint64 {
	if s := os.Getenv("CASTRA_CRASH_SEED"); s != "" {
		seed, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("CASTRA_CRASH_SEED: %v", err)
		}
		return seed
	}
	return rand.Uint64N(1 << 32)
}

// Whatever a crash leaves of what was not synced, and be it in the middle of a
// recovery from another: what was acknowledged or delivered is there, under its
// number, without holes; nothing else is; ids still tell a retry from a new
// record; and the VMs' streams are complete.
func TestCrash(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(400)) // the lives leave much behind, and none is long
	crashes := 10000
	if testing.Short() {
		crashes = 2000
	}
	from := crashSeed(t)
	seed, broken, total := crashSeeds(from, 1, crashes, nil)
	if broken != "" {
		t.Fatalf("%s\nagain with CASTRA_CRASH_SEED=%d", broken, seed)
	}
	t.Logf("%d crashes from seed %d", total, from)
}
