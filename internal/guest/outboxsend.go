package guest

import (
	"fmt"
	"slices"
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

type flying struct {
	pos  uint64
	id   string
	load int
}

// take appends the frames that may be sent now. wait is how long nothing more may
// be sent; 0: until the next wake.
func (o *outbox) take(dst []byte) (out []byte, wait time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for limit := len(dst) + takeBytes; o.live && len(dst) < limit; {
		it := o.upcoming()
		if it == nil {
			break
		}
		if wait = time.Until(o.notBefore); wait > 0 {
			return dst, wait
		}
		if len(o.again) > 0 {
			o.again = o.again[1:]
		} else {
			o.next = it.pos + 1
		}
		it.sent = true
		o.flight = append(o.flight, flying{pos: it.pos, id: it.ID, load: len(it.Payload)})
		o.load += len(it.Payload)
		dst = wire.AppendPublishFrame(dst, it.Topic, it.ID, it.Reply, it.Payload)
	}
	if o.wantsMore() {
		o.hungry()
	}
	return dst, 0
}

// upcoming gives the record to be sent next, nil if none may be. Call with the lock
// held.
func (o *outbox) upcoming() *spooled {
	if len(o.again) > 0 {
		if len(o.flight) > 0 {
			return nil
		}
		return o.at(o.again[0])
	}
	if len(o.flight) >= o.window || len(o.flight) > 0 && o.load >= windowBytes {
		return nil
	}
	for it := o.at(o.next); it != nil; it = o.at(o.next) {
		if !it.settled {
			return it
		}
		o.next++
	}
	return nil
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
			o.lastLimited = time.Now()
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
	if o.wantsMore() || o.stored > o.saved {
		o.hungry()
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
