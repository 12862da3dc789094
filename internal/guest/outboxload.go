package guest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/token"
)

const (
	// lowRecords and lowBytes are when more is read from the disk: less than two
	// windows are left to be sent.
	lowRecords = 2 * windowRecords
	lowBytes   = 2 * windowBytes

	// saveEvery and saveAfter bound how far the released position on disk is behind.
	// What is sent again after a crash must be among the 65,536 ids that the host
	// remembers; of those, these leave all but a few to what is on its way.
	saveEvery = time.Second
	saveAfter = 8192 // records

	// loadRetry is how long a disk is left in peace that could not be read.
	loadRetry = time.Second
)

// hungry makes the loader look. It does not wait.
func (o *outbox) hungry() {
	if o.disk != nil {
		token.Leave(o.hunger)
	}
}

// wantsMore says whether it is time to read from the backlog. Call with the lock
// held.
func (o *outbox) wantsMore() bool {
	return o.live && !o.backlog.empty() && len(o.front) < lowRecords && o.frontBytes < lowBytes
}

// loader reads the backlog when there is room in front, and gives up on disk what
// the host has, until ctx is done. A disk that blocks blocks it, and nobody else.
func (o *outbox) loader(ctx context.Context) {
	r := o.disk.log.NewReader(1)
	defer r.Close()
	timer := time.NewTimer(0)
	defer timer.Stop()
	var saveAt, loadAt time.Time // zero: nothing is to be saved; nothing failed
	for {
		wait := time.Duration(0)
		if !time.Now().Before(loadAt) {
			loadAt = time.Time{}
			if err := o.fill(ctx, r); err != nil {
				o.disk.failed("reading the spool", err)
				loadAt = time.Now().Add(loadRetry)
			}
		}
		if !loadAt.IsZero() {
			wait = time.Until(loadAt)
		}
		if saveAt = o.release(saveAt, ctx.Err() != nil); !saveAt.IsZero() && (wait == 0 || time.Until(saveAt) < wait) {
			wait = time.Until(saveAt)
		}
		if ctx.Err() != nil {
			return
		}
		if !loadAt.IsZero() || !saveAt.IsZero() {
			timer.Reset(wait)
		} else {
			timer.Stop()
		}
		select {
		case <-o.hunger:
		case <-timer.C:
		case <-ctx.Done():
		}
	}
}

// fill reads from the backlog until front has enough.
func (o *outbox) fill(ctx context.Context, r *eventlog.Reader) error {
	for ctx.Err() == nil {
		o.mu.Lock()
		wants, next := o.wantsMore(), o.backlog.next
		o.mu.Unlock()
		if !wants {
			r.Close() // neither a buffer nor a descriptor while there is nothing to do
			return nil
		}
		r.Skip(next)
		for range lowRecords {
			var rec eventlog.Record
			ok, err := r.Next(&rec)
			if gap, damaged := errors.AsType[*eventlog.Gap](err); damaged {
				o.miss(gap)
				break
			}
			if err != nil {
				r.Close()
				return err
			}
			if !ok || !o.loaded(rec.Seq, fromLine(&rec)) {
				break
			}
		}
		o.wake()
		o.note()
	}
	return nil
}

// fromLine takes a record out of the log. Its payload is valid as long as rec.
func fromLine(rec *eventlog.Record) Record {
	r := Record{Topic: string(rec.Topic), Reply: string(rec.Reply), Payload: rec.Payload}
	if bytes.IndexByte(rec.ID, '\\') < 0 {
		r.ID = string(bytes.Trim(rec.ID, `"`))
	} else {
		_ = json.Unmarshal(rec.ID, &r.ID) // its checksum is right, so it is what was written
	}
	return r
}

// loaded takes a record from the backlog into front, and says whether there is room
// for another.
func (o *outbox) loaded(seq uint64, r Record) (more bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	r.Payload = bytes.Clone(r.Payload)
	it := &spooled{Record: r, cost: cost(&r), seq: seq}
	o.backlog.pass(seq, it.cost)
	o.push(it)
	return !o.backlog.empty() && o.frontBytes < frontBytes
}

// miss passes over records that the disk has lost.
func (o *outbox) miss(gap *eventlog.Gap) {
	o.mu.Lock()
	o.backlog.pass(gap.To, 0)
	o.mu.Unlock()
	o.disk.lost(gap)
}

// releasable gives up to which number everything on disk is done with. Call with
// the lock held.
func (o *outbox) releasable() uint64 {
	upTo := o.stored
	if !o.backlog.empty() {
		upTo = o.backlog.next - 1
	}
	for _, it := range o.front {
		if !it.settled && it.seq != 0 {
			upTo = min(upTo, it.seq-1)
		}
	}
	return upTo
}

// release notes on disk what is done with, where it is time to, and gives when it
// is next; zero: when something is.
func (o *outbox) release(at time.Time, now bool) time.Time {
	o.mu.Lock()
	upTo := o.saved
	due := now || !at.IsZero() && !time.Now().Before(at) || o.unsaved >= saveAfter && !o.disk.failing
	if due && o.stored > o.saved {
		upTo = o.releasable()
	}
	behind := o.stored > o.saved
	o.mu.Unlock()
	switch {
	case !behind:
		return time.Time{}
	case !due && at.IsZero():
		return time.Now().Add(saveEvery)
	case !due:
		return at
	case upTo == o.saved:
		return time.Time{} // the head of the queue is not settled yet: its answer is what wakes
	}
	if err := o.disk.save(upTo); err != nil {
		o.disk.failed("noting in the spool what the host has", err)
		return time.Now().Add(saveEvery)
	}
	o.disk.works()
	o.mu.Lock()
	o.saved, o.unsaved = upTo, 0
	o.mu.Unlock()
	return time.Time{}
}
