package eventlog

import (
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
		c.opts.Journal, c.opts.room, c.opts.SegmentSize = "/log/journal", journalRoom{1024 << rng.IntN(3), 32 << 10, simBlock}, 2048<<rng.IntN(2)
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
