package guest

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

// The most that is sent ahead of the host's acks. Behind a disk that syncs in
// 5 ms the records let through 50,000 a second; the bytes keep a burst of large
// ones from delaying heartbeats behind them.
const (
	windowRecords = 256
	windowBytes   = 256 << 10
)

// takeBytes is about how much goes out in one write, so that what is more urgent
// than records waits for one write at most.
const takeBytes = 64 << 10

// retryDefault is how long a record that was refused for now waits where the host
// does not say.
const retryDefault = time.Second

// result is what became of a publish.
type result struct {
	seq    uint64     // the host's number
	queued bool       // kept in the spool; the host has not numbered it yet
	err    *bus.Error // refused for good
}

// outbox sends what is in the spool and takes the host's answers.
//
// Records go out in the order in which they were published, many ahead of their
// acks. Where the host refuses one for now (its rate, its disk), records behind it
// may already be on their way and be accepted; those keep the number they got.
// From the refusal on nothing more is sent ahead: the answers to what is on its way
// are awaited, then the refused records go again one by one, each awaited before the
// next, and the window opens slowly, by one for each windowful accepted. So a
// publisher that awaits each answer always keeps its order, and one that does not
// may see it changed only around the moment of such a refusal.
type outbox struct {
	wake func() // something may be sent; must not block
	note func() // counts changed; must not block
	lost func(r *Record, err *bus.Error)

	mu      sync.Mutex
	spool   Spool
	closed  bool
	live    bool // there is a session
	sent    uint64
	flight  []flying                // unanswered, in the order sent; at most windowRecords
	load    int                     // bytes of payload in flight
	again   []uint64                // refused for now on this session, by position; at most windowRecords
	settled map[uint64]bool         // answered for good while an older one is not; at most windowRecords
	waiting map[uint64]func(result) // at most one for each record kept
	empty   chan struct{}           // closed when nothing is kept any more; nil: nobody waits

	window    int
	accepted  int // since the window last changed
	notBefore time.Time

	published, limited uint64
	lastPublish        time.Time
}

type flying struct {
	pos  uint64
	id   string
	load int
}

func newOutbox(spool Spool) *outbox {
	return &outbox{
		spool:   spool,
		window:  windowRecords,
		settled: make(map[uint64]bool),
		waiting: make(map[uint64]func(result)),
	}
}

// put keeps a record. done is called once, from another goroutine or before put
// returns, unless put fails; it must not block.
func (o *outbox) put(r Record, done func(result)) error {
	o.mu.Lock()
	if o.closed {
		o.mu.Unlock()
		return errStopping
	}
	pos, err := o.spool.Append(r)
	if refusal, ok := errors.AsType[*bus.Error](err); ok {
		refusal.RetryAfter = retryAway
		if o.live {
			refusal.RetryAfter = retryConnected
		}
	}
	live := o.live
	if err == nil && live {
		o.waiting[pos] = done
	}
	o.mu.Unlock()
	if err != nil {
		return err
	}
	if live {
		o.wake()
	} else {
		done(result{queued: true})
	}
	o.note()
	return nil
}

var errStopping = bus.Errorf(bus.CodeShuttingDown, "castra-guestd is stopping and keeps nothing more; publish again when it is back")

// begin starts a session: all that the host has not acknowledged is sent again.
func (o *outbox) begin() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.live = true
	o.sent = 0
	o.notBefore = time.Time{}
}

// end gives up on the session's answers. Everybody who waits for one is told that
// the record is kept.
func (o *outbox) end() {
	o.mu.Lock()
	o.live = false
	o.flight, o.load = nil, 0
	if len(o.again) > 0 {
		o.again, o.window, o.accepted = nil, 1, 0 // the next host meets them one by one too
	} else {
		o.window = windowRecords
	}
	waiting := o.waiting
	o.waiting = make(map[uint64]func(result))
	o.mu.Unlock()
	for _, done := range waiting {
		done(result{queued: true})
	}
}

// take appends the frames that may be sent now. wait is how long nothing more may
// be sent; 0: until the next wake.
func (o *outbox) take(dst []byte) (out []byte, wait time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for limit := len(dst) + takeBytes; o.live && len(dst) < limit; {
		r := o.next()
		if r == nil {
			break
		}
		if wait = time.Until(o.notBefore); wait > 0 {
			return dst, wait
		}
		if len(o.again) > 0 {
			o.again = o.again[1:]
		} else {
			o.sent = r.pos
		}
		o.flight = append(o.flight, flying{pos: r.pos, id: r.ID, load: len(r.Payload)})
		o.load += len(r.Payload)
		dst = wire.AppendPublishFrame(dst, r.Topic, r.ID, r.Reply, r.Payload)
	}
	return dst, 0
}

// next gives the record to be sent next, nil if none may be.
func (o *outbox) next() *Record {
	if len(o.again) > 0 {
		if len(o.flight) > 0 {
			return nil
		}
		r, _ := o.spool.After(o.again[0] - 1)
		return r
	}
	if len(o.flight) >= o.window || len(o.flight) > 0 && o.load >= windowBytes {
		return nil
	}
	r, ok := o.spool.After(o.sent)
	for ok && o.settled[r.pos] {
		r, ok = o.spool.After(r.pos)
	}
	if !ok {
		return nil
	}
	return r
}

// answer takes the host's ack of a publish. The error says that the host broke the
// protocol.
func (o *outbox) answer(m *wire.Message) error {
	o.mu.Lock()
	if len(o.flight) == 0 {
		o.mu.Unlock()
		return fmt.Errorf("%w: an ack for a publish that was not sent", wire.ErrProtocol)
	}
	f := o.flight[0]
	if m.ID != nil && string(m.ID) != f.id {
		o.mu.Unlock()
		return fmt.Errorf("%w: an ack for the publish %q before that for %q", wire.ErrProtocol, wire.Clip(m.ID), f.id)
	}
	o.flight = o.flight[1:]
	o.load -= f.load
	var told func()
	switch {
	case string(m.Status) == "ok":
		o.published++
		o.lastPublish = time.Now()
		if len(o.again) == 0 {
			o.accepted++
		}
		if o.accepted >= o.window && o.window < windowRecords {
			o.window, o.accepted = o.window+1, 0
		}
		told = o.settle(f.pos, result{seq: m.Seq})
	case retryable(m):
		if string(m.Code) == string(bus.CodeRateLimited) {
			o.limited++
		}
		i, _ := slices.BinarySearch(o.again, f.pos)
		o.again = slices.Insert(o.again, i, f.pos)
		o.window, o.accepted = 1, 0
		after := time.Duration(min(m.RetryAfterMS, maxRetryMS)) * time.Millisecond
		if after <= 0 {
			after = retryDefault
		}
		if t := time.Now().Add(after); t.After(o.notBefore) {
			o.notBefore = t
		}
	default:
		told = o.settle(f.pos, result{err: bus.Errorf(bus.Code(wire.Clip(m.Code)), "%s", m.Reason)})
	}
	o.mu.Unlock()
	if told != nil {
		told()
	}
	o.wake()
	o.note()
	return nil
}

// maxRetryMS bounds what a host may ask for: a minute, in milliseconds.
const maxRetryMS = 60_000

// retryable says whether a refusal is for now only.
func retryable(m *wire.Message) bool {
	switch bus.Code(m.Code) {
	case bus.CodeRateLimited, bus.CodeStorageFull, bus.CodeStorageStalled:
		return true
	default:
		return m.RetryAfterMS > 0
	}
}

// settle gives up the record at pos. Call with the lock held; what it returns is to
// be called without.
func (o *outbox) settle(pos uint64, res result) (told func()) {
	done := o.waiting[pos]
	delete(o.waiting, pos)
	r, _ := o.spool.After(pos - 1)
	rec := *r
	o.settled[pos] = true
	for r, ok := o.spool.After(0); ok && o.settled[r.pos]; r, ok = o.spool.After(0) {
		settled := r.pos
		delete(o.settled, settled)
		o.spool.Release(settled)
	}
	var empty chan struct{}
	if n, _ := o.spool.Size(); n == 0 {
		empty, o.empty = o.empty, nil
	}
	return func() {
		if empty != nil {
			close(empty)
		}
		switch {
		case done != nil:
			done(res)
		case res.err != nil:
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
	n, _ := o.spool.Size()
	if !o.live || n == 0 {
		return nil
	}
	if o.empty == nil {
		o.empty = make(chan struct{})
	}
	return o.empty
}

// abandon tells everybody who still waits that the record may be lost, and gives
// how many records are.
func (o *outbox) abandon() (lost int) {
	o.mu.Lock()
	o.closed = true
	waiting := o.waiting
	o.waiting = make(map[uint64]func(result))
	lost, _ = o.spool.Size()
	if o.spool.Durable() {
		lost = 0
	}
	o.mu.Unlock()
	for _, done := range waiting {
		done(result{err: errStopping})
	}
	return lost
}

// counts are what status shows of an outbox.
type counts struct {
	records            int
	bytes              int64
	published, limited uint64
	lastPublish        time.Time
}

func (o *outbox) counts() counts {
	o.mu.Lock()
	defer o.mu.Unlock()
	c := counts{published: o.published, limited: o.limited, lastPublish: o.lastPublish}
	c.records, c.bytes = o.spool.Size()
	return c
}
