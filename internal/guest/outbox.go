package guest

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/castrabus/castra/internal/bus"
)

// result is what became of a publish.
type result struct {
	seq     uint64     // the host's number
	queued  bool       // kept in the spool; the host has not numbered it yet
	durable bool       // with queued: a power cut does not take it
	err     *bus.Error // refused
}

// outbox keeps what is published until the host has answered for good.
//
// What waits for the host is one queue, in the order in which it was published:
//
//	front    in memory, and perhaps on disk too: what is sent, and comes next
//	backlog  on disk alone: read into front as room comes (loader)
//	back     in memory: to be written to the disk, and backlog from then on (keeper)
//
// While the host answers, a record goes straight into front and costs the guest's
// disk nothing. It is written there when the host has not answered for spillAfter,
// when the session ends, and when the daemon does; and never a record without all
// those before it, so that the order on disk is that of the queue. Its publisher is
// told when the host has it, or without a session when it is on disk, so what he is
// told is true in either case. A guest without a disk keeps everything in front.
//
// Records go out in the order in which they were published, many ahead of their
// acks. Where the host refuses one for now (its rate, its disk), it refuses those
// behind it that are already on their way, too (wire.CapOrdered), so that the order
// stays. From the refusal on nothing more is sent ahead: the answers to what is on
// its way are awaited, then the refused records go again one by one, each awaited
// before the next, and the window opens slowly, by one for each windowful accepted.
type outbox struct {
	wake func() // something may be sent; must not block
	note func() // counts changed; must not block
	lost func(r *Record, err *bus.Error)

	disk  *disk // nil: there is none
	limit int64 // of what is kept, in bytes

	// kick and hunger have room for one: the keeper, and the loader, is to look.
	kick, hunger chan struct{}

	mu         sync.Mutex
	closed     bool
	live       bool // there is a session
	front      []*spooled
	frontBytes int64
	first      uint64 // position of front[0], or of the next one if there is none
	next       uint64 // position of the first one not sent ahead on this session
	backlog    backlog
	back       []*spooled
	backBytes  int64
	room       chan struct{} // closed and replaced when back has become shorter
	storing    storing       // how writing to the disk goes
	stored     uint64        // the newest number on disk
	saved      uint64        // all up to this number on disk is released, and the disk knows
	unsaved    int           // records settled since then

	flight []flying      // unanswered, in the order sent; at most windowRecords
	load   int           // bytes of payload in flight
	again  []uint64      // refused for now on this session, by position; at most windowRecords
	empty  chan struct{} // closed when nothing is kept any more; nil: nobody waits

	window    int
	accepted  int // since the window last changed
	notBefore time.Time

	published, limited       uint64
	lastPublish, lastLimited time.Time
}

// newOutbox makes an outbox that keeps up to limit bytes, on disk unless that is
// nil.
func newOutbox(limit int64, disk *disk) *outbox {
	o := &outbox{
		disk: disk, limit: limit, window: windowRecords,
		kick: make(chan struct{}, 1), hunger: make(chan struct{}, 1), room: make(chan struct{}),
		first: 1, next: 1, backlog: backlog{next: 1},
	}
	if disk != nil {
		o.backlog, o.stored, o.saved = disk.found, disk.found.last, disk.released
	}
	return o
}

const (
	// frontRecords and frontBytes bound what a guest with a disk has in memory to be
	// sent: several windows, and the records of a burst of its programs.
	frontRecords = 4096
	frontBytes   = 1 << 20
	// backBytes bounds what waits for the disk, and so the size of a write: a
	// publisher beyond it waits.
	backBytes = 256 << 10
)

// put keeps a record. done is called once, from another goroutine or before put
// returns, unless put fails; it must not block. With a disk that does not keep up
// put waits for it, at most storePatience.
func (o *outbox) put(r Record, done func(result)) error {
	it := &spooled{Record: r, cost: cost(&r), since: time.Now(), done: done}
	o.mu.Lock()
	for wait := true; wait; {
		var err error
		wait, err = o.admit(it)
		if err == nil && wait {
			room := o.room
			o.mu.Unlock()
			within(time.Until(it.since.Add(storePatience)), room)
			o.mu.Lock()
			if time.Since(it.since) >= storePatience {
				err = errStoreStalled()
			}
		}
		if err != nil {
			o.mu.Unlock()
			return err
		}
	}
	var tell func(result)
	if o.disk == nil && !o.live {
		tell, it.done = done, nil
	}
	keep := it.pos == 0 || !o.storing.armed
	o.storing.armed = true
	live := o.live
	o.mu.Unlock()
	if tell != nil {
		tell(result{queued: true})
	}
	if keep {
		o.keep()
	}
	if live {
		o.wake()
	}
	o.note()
	return nil
}

// admit puts it into the queue, or says that it has to wait for the disk. Call
// with the lock held.
func (o *outbox) admit(it *spooled) (wait bool, err error) {
	retry := retryAway
	if o.live {
		retry = retryConnected
	}
	records, bytes := o.size()
	switch {
	case o.closed:
		return false, errStopping
	case records >= maxUnacknowledged:
		return false, full(fmt.Sprintf("the spool holds %d messages that the host has not taken yet, the most there may be; try again later", records), retry)
	case bytes+it.cost > o.limit:
		return false, full(fmt.Sprintf("the spool is full: the host has not taken %d messages of %d bytes yet; try again later, or raise spool_size", records, bytes), retry)
	}
	if o.disk == nil || o.live && o.backlog.empty() && len(o.back) == 0 && len(o.front) < frontRecords && o.frontBytes < frontBytes {
		o.push(it)
		return false, nil
	}
	if o.storing.stalled {
		return false, errStoreStalled()
	}
	if o.backBytes >= backBytes {
		return true, nil
	}
	o.back = append(o.back, it)
	o.backBytes += it.cost
	return false, nil
}

// push appends it to front. Call with the lock held.
func (o *outbox) push(it *spooled) {
	it.pos = o.first + uint64(len(o.front))
	o.front = append(o.front, it)
	o.frontBytes += it.cost
}

// at gives the record at a position of front. Call with the lock held.
func (o *outbox) at(pos uint64) *spooled {
	if pos < o.first || pos-o.first >= uint64(len(o.front)) {
		return nil
	}
	return o.front[pos-o.first]
}

// size gives how many records are kept, and what they cost. Call with the lock held.
func (o *outbox) size() (records int, bytes int64) {
	return len(o.front) + o.backlog.records() + len(o.back), o.frontBytes + o.backlog.bytes + o.backBytes
}

var errStopping = bus.Errorf(bus.CodeShuttingDown, "castra-guestd is stopping and keeps nothing more; publish again when it is back")

// begin starts a session: all that the host has not acknowledged is sent again.
func (o *outbox) begin() {
	o.mu.Lock()
	o.live = true
	o.next = o.first
	o.notBefore = time.Time{}
	o.mu.Unlock()
	o.hungry()
}

// end gives up on the session's answers. Everybody who waits for one is told that
// the record is kept, as soon as it is.
func (o *outbox) end() {
	o.mu.Lock()
	o.live = false
	o.flight, o.load = nil, 0
	if len(o.again) > 0 {
		o.again, o.window, o.accepted = nil, 1, 0 // the next host meets them one by one too
	} else {
		o.window = windowRecords
	}
	var told []func()
	for _, it := range o.front {
		if it.done != nil && (o.disk == nil || it.seq != 0) {
			told = append(told, it.tell(result{queued: true, durable: it.seq != 0}))
		}
	}
	o.mu.Unlock()
	callAll(told)
	o.keep() // what is not on disk yet goes there now
}

// tell gives what tells the publisher, once.
func (it *spooled) tell(r result) func() {
	done := it.done
	it.done = nil
	return func() {
		if done != nil {
			done(r)
		}
	}
}

func callAll(fns []func()) {
	for _, f := range fns {
		f()
	}
}

// settle gives up the record at pos. Call with the lock held; what it returns is to
// be called without.
func (o *outbox) settle(pos uint64, res result) (told func()) {
	it := o.at(pos)
	if it == nil || it.settled {
		return func() {}
	}
	rec, waited := it.Record, it.done != nil
	tell := it.tell(res)
	it.settled, it.Payload = true, nil
	for len(o.front) > 0 && o.front[0].settled {
		o.frontBytes -= o.front[0].cost
		o.front[0] = nil
		o.front = o.front[1:]
		o.first++
	}
	o.next = max(o.next, o.first)
	if len(o.front) == 0 {
		o.front = nil // after a burst an idle agent is as small as before
	}
	if o.disk != nil {
		o.unsaved++
	}
	var empty chan struct{}
	if n, _ := o.size(); n == 0 {
		empty, o.empty = o.empty, nil
	}
	return func() {
		if empty != nil {
			close(empty)
		}
		tell()
		if res.err != nil && !waited {
			o.lost(&rec, res.err) // its publisher was told that it is kept
		}
	}
}

// close takes no more records. The channel is closed once nothing is kept, or
// is nil where there is no host to take it.
func (o *outbox) close() <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closed = true
	if n, _ := o.size(); !o.live || n == 0 {
		return nil
	}
	if o.empty == nil {
		o.empty = make(chan struct{})
	}
	return o.empty
}

// abandon tells everybody who still waits what became of the record, and gives how
// many are lost with the process. The keeper has ended, or hangs.
func (o *outbox) abandon() (lost int) {
	o.mu.Lock()
	o.closed = true
	var told []func()
	for _, it := range slices.Concat(o.front, o.back) {
		switch {
		case it.settled:
		case it.writing: // told by abandon, whatever the disk makes of it later
			told = append(told, it.tell(result{err: errStoreStalled()}))
			lost++
		case it.seq != 0:
			told = append(told, it.tell(result{queued: true, durable: true}))
		default:
			told = append(told, it.tell(result{err: errStopping}))
			lost++
		}
	}
	o.mu.Unlock()
	callAll(told)
	return lost
}

// counts are what status shows of an outbox.
type counts struct {
	records                  int
	bytes                    int64
	durable                  bool
	trouble                  string // of the disk; empty: none, or there is no disk
	published, limited       uint64
	lastPublish, lastLimited time.Time
}

func (o *outbox) counts() counts {
	o.mu.Lock()
	defer o.mu.Unlock()
	c := counts{published: o.published, limited: o.limited, lastPublish: o.lastPublish, lastLimited: o.lastLimited, durable: o.disk != nil}
	c.records, c.bytes = o.size()
	if o.disk != nil {
		c.trouble = o.disk.log.State().Degraded
	}
	return c
}
