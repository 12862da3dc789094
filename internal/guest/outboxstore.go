package guest

import (
	"context"
	"errors"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/token"
)

const (
	// spillAfter is how long the host has for its ack before a record goes to the
	// guest's disk too: a few syncs of the host's disk, so that a host that is well
	// costs the guest's disk nothing, and little that is left to a power cut of the
	// guest alone, of which nobody has been told.
	spillAfter = 50 * time.Millisecond
	// storePatience is how long a publisher waits for a disk that does not answer:
	// contract 3 has it for the host.
	storePatience = 5 * time.Second
	// storeRetry is how long a record that the host may yet acknowledge waits after
	// the disk has refused it.
	storeRetry = time.Second
)

// storing is how writing to the disk goes.
type storing struct {
	armed   bool      // the keeper looks again in time for what is published now
	stalled bool      // a write has been outstanding for storePatience
	final   bool      // the daemon ends: all is to be stored
	retryAt time.Time // not earlier, where nobody waits for the disk alone
}

func errStoreStalled() *bus.Error {
	return &bus.Error{
		Code:       bus.CodeStorageStalled,
		Reason:     "this machine's disk does not answer; the message may yet be kept: publish it again with the same id",
		RetryAfter: storePatience,
	}
}

// errOpen is what a publisher is told whose record was on its way to the host when
// the connection broke, and which the disk refused then.
func errOpen(err error) *bus.Error {
	return &bus.Error{
		Code:       bus.CodeStorageStalled,
		Reason:     "the host did not answer, and this machine's disk does not take it (" + err.Error() + "); the host may have it: publish it again with the same id",
		RetryAfter: retryConnected,
	}
}

// refusalFrom is what a publisher is told whose record the disk refused.
func refusalFrom(err error) *bus.Error {
	write, failed := errors.AsType[*eventlog.WriteError](err)
	switch {
	case errors.Is(err, eventlog.ErrStalled):
		return errStoreStalled()
	case failed && write.Full:
		return full("the host is away and this machine's disk is full; nothing was kept, try again later", retryConnected)
	default:
		return full("the host is away and this machine's disk fails ("+err.Error()+"); nothing was kept, try again later", retryConnected)
	}
}

// keep makes the keeper look. It does not wait.
func (o *outbox) keep() { token.Leave(o.kick) }

// write is records on their way to the disk.
type write struct {
	batch eventlog.Batch
	items []*spooled
}

func (w *write) done() <-chan struct{} {
	if w == nil {
		return nil
	}
	return w.batch.Done()
}

// keeper puts records on disk when their time has come, and tells publishers of
// whom the host makes too little haste, until ctx is done. It never waits for the
// disk for more than storePatience.
func (o *outbox) keeper(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var pending *write // the log has it, and its disk does not answer
	done := ctx.Done()
	for {
		told, w, wait := o.look(time.Now(), pending != nil)
		callAll(told)
		if w != nil {
			var ok bool
			if ok, pending = o.store(w); ok || done != nil {
				continue
			}
		}
		if done == nil {
			return
		}
		if wait > 0 {
			timer.Reset(wait)
		} else {
			timer.Stop()
		}
		select {
		case <-o.kick:
		case <-timer.C:
		case <-pending.done():
			o.finish(pending, nil, true)
			pending = nil
		case <-done:
			done = nil
			o.mu.Lock()
			o.storing.final = true
			o.mu.Unlock()
		}
	}
}

// look finds who is to be told that his record waits, what is to be written, and
// when to look again, 0 being never.
func (o *outbox) look(now time.Time, busy bool) (told []func(), w *write, wait time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	next := now.Add(time.Hour)
	none := next
	sooner := func(t time.Time) {
		if t.Before(next) {
			next = t
		}
	}
	due := len(o.back) > 0
	for _, it := range o.front {
		if it.settled || it.since.IsZero() {
			continue
		}
		if by := it.since.Add(ackPatience); it.done != nil && now.Before(by) {
			sooner(by)
		} else if it.done != nil {
			told = append(told, it.tell(o.kept(it)))
		}
		if o.disk == nil || it.seq != 0 || it.writing {
			continue
		}
		at := it.since.Add(spillAfter)
		if o.storing.retryAt.After(at) {
			at = o.storing.retryAt
		}
		if o.storing.final || !o.live || !now.Before(at) {
			due = true
		} else {
			sooner(at)
		}
	}
	if due && !busy {
		w = o.gather()
	}
	o.storing.armed = next != none && (o.disk == nil || next.Sub(now) <= spillAfter)
	if next != none {
		wait = max(next.Sub(now), time.Microsecond)
	}
	return told, w, wait
}

// kept is what can be said of a record that waits for the host. Call with the lock
// held.
func (o *outbox) kept(it *spooled) result {
	if o.disk == nil || it.seq != 0 {
		return result{queued: true, durable: it.seq != 0}
	}
	return result{err: errStoreStalled()}
}

// gather takes what is to be written next, in order and without leaving anything
// out. Call with the lock held.
func (o *outbox) gather() *write {
	w := &write{}
	var bytes int64
	for _, items := range [][]*spooled{o.front, o.back} {
		for _, it := range items {
			if it.settled || it.seq != 0 || it.writing {
				continue
			}
			if bytes > 0 && bytes+it.cost > backBytes {
				return w
			}
			bytes += it.cost
			it.writing = true
			w.items = append(w.items, it)
			w.batch.Entries = append(w.batch.Entries, o.disk.entry(&it.Record))
		}
	}
	if len(w.items) == 0 {
		return nil
	}
	return w
}

// store writes, and gives w back where the disk has not answered in time; ok says
// that all of it is on disk.
func (o *outbox) store(w *write) (ok bool, pending *write) {
	err := o.disk.log.Append(context.Background(), &w.batch)
	if errors.Is(err, eventlog.ErrStalled) && !errors.Is(err, eventlog.ErrNotQueued) {
		o.stall()
		return false, w
	}
	return o.finish(w, err, false), nil
}

// stall tells those who wait for the disk alone that it does not answer.
func (o *outbox) stall() {
	var told []func()
	o.mu.Lock()
	o.storing.stalled = true
	for _, it := range o.back {
		told = append(told, it.tell(result{err: errStoreStalled()}))
	}
	if !o.live {
		for _, it := range o.front {
			if it.done != nil {
				told = append(told, it.tell(o.kept(it)))
			}
		}
	}
	// Those on their way are counted again if the disk has taken them in the end.
	o.shorten(len(o.back))
	o.mu.Unlock()
	callAll(told)
	o.note()
}

// shorten takes n records off back, and lets in who waits for the room. Call with
// the lock held.
func (o *outbox) shorten(n int) {
	for _, it := range o.back[:n] {
		o.backBytes -= it.cost
	}
	if o.back = o.back[n:]; len(o.back) == 0 {
		o.back = nil
	}
	close(o.room)
	o.room = make(chan struct{})
}

// finish takes in what became of a write: err is why all of it failed. late says
// that its publishers have been told that this is open. It gives whether all of it is
// on disk.
func (o *outbox) finish(w *write, err error, late bool) (ok bool) {
	ok = true
	var told []func()
	o.mu.Lock()
	o.storing.stalled = false
	o.storing.retryAt = time.Time{}
	waited := 0 // of those written, in back
	for i, it := range w.items {
		e := &w.batch.Entries[i]
		it.writing = false
		failed := err
		if failed == nil {
			failed = e.Err
		}
		if it.pos == 0 {
			waited++
		}
		switch {
		case failed == nil:
			it.seq = e.Seq
			o.stored = max(o.stored, e.Seq)
			if it.pos == 0 {
				o.backlog.add(e.Seq, it.cost)
			}
			if it.pos == 0 || !o.live {
				told = append(told, it.tell(result{queued: true, durable: true}))
			}
			continue
		case it.pos == 0:
			told = append(told, it.tell(result{err: refusalFrom(failed)}))
		case o.live: // the host may take it yet
			o.storing.retryAt = time.Now().Add(storeRetry)
		case it.done == nil: // its publisher knows that it is open
			told = append(told, o.settle(it.pos, result{}))
		case it.sent:
			told = append(told, o.settle(it.pos, result{err: errOpen(failed)}))
		default:
			told = append(told, o.settle(it.pos, result{err: refusalFrom(failed)}))
		}
		ok = false
	}
	if !late { // else they are off it already
		o.shorten(waited)
	}
	o.mu.Unlock()
	callAll(told)
	o.note()
	o.hungry()
	return ok
}
