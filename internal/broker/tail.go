package broker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/wire"
)

// tailBuffer is about how much is written to a tail at once.
const tailBuffer = 64 << 10

// tail is one host subscriber: a cursor into the log that writes lines.
type tail struct {
	log   *eventlog.Log
	match func(*eventlog.Record) bool
	until string // RFC 3339 as in a record; "": no end
	w     io.Writer
	buf   []byte
}

// Tail writes the records that req selects to w, a line of JSON each, until
// they are all written, ctx is done or w fails. A slow w only lags.
func (b *Broker) Tail(ctx context.Context, req bus.TailRequest, w io.Writer) error {
	t := &tail{log: b.events, w: w, buf: make([]byte, 0, tailBuffer)}
	var err error
	if t.match, err = tailFilter(req); err != nil {
		return err
	}
	if !req.Until.IsZero() {
		t.until = req.Until.UTC().Format("2006-01-02T15:04:05.000000Z")
	}
	woken, leave := b.tails.join()
	defer leave()
	// What is committed from here on wakes the tail, so nothing falls between
	// the replay and what follows it.
	newest := b.events.Committed()
	start, err := t.begin(ctx, req, newest)
	if err != nil {
		return bus.Errorf(bus.CodeInternal, "%v", err)
	}
	r := b.events.NewReader(start)
	if vm := streamOf(req); vm != "" && start <= newest {
		if r, err = b.events.NewVMReader(vm, start); err != nil {
			return bus.Errorf(bus.CodeInternal, "%v", err)
		}
	}
	defer r.Close()
	for {
		ended, err := t.copy(ctx, r)
		if err != nil || ended || !req.Follow {
			return err
		}
		select {
		case <-woken:
		case <-ctx.Done():
			return ctx.Err()
		case <-b.ctx.Done():
			return nil
		case <-untilTimer(req.Until):
			return nil
		}
	}
}

// streamOf names the VM whose own stream holds all that req selects, "" if only
// the host stream does.
func streamOf(req bus.TailRequest) string {
	if req.VM == bus.HostVM {
		return ""
	}
	return req.VM
}

// untilTimer fires when nothing that is still to come can be shown.
func untilTimer(until time.Time) <-chan time.Time {
	if until.IsZero() {
		return nil
	}
	return time.After(time.Until(until))
}

// copy writes everything up to the newest record. It tells whether a record
// beyond the end was met.
func (t *tail) copy(ctx context.Context, r *eventlog.Reader) (ended bool, err error) {
	var rec eventlog.Record
	for ctx.Err() == nil {
		ok, err := r.Next(&rec)
		gap, gone := errors.AsType[*eventlog.Gap](err)
		switch {
		case gone:
			t.buf = fmt.Appendf(t.buf, `{"type":"gap","from":%d,"to":%d}`+"\n", gap.From, gap.To)
			continue
		case err != nil:
			return true, errors.Join(t.flush(r), err)
		case !ok:
			return false, t.flush(r)
		case t.until != "" && string(rec.Time) > t.until:
			return true, t.flush(r)
		}
		if t.match(&rec) {
			t.buf = append(append(append(t.buf, '{'), rec.Body...), '\n')
		}
		if len(t.buf) >= tailBuffer {
			if err := t.flush(r); err != nil {
				return true, err
			}
		}
	}
	return true, ctx.Err()
}

func (t *tail) flush(r *eventlog.Reader) error {
	if len(t.buf) == 0 {
		return nil
	}
	r.Rest() // the client may take its time
	_, err := t.w.Write(t.buf)
	t.buf = t.buf[:0]
	return err
}

// begin gives the first record to look at.
func (t *tail) begin(ctx context.Context, req bus.TailRequest, newest uint64) (uint64, error) {
	vm := streamOf(req)
	// For counting backwards: within the time limit, and for as long as somebody waits.
	shown := func(rec *eventlog.Record) (bool, error) {
		return (t.until == "" || string(rec.Time) <= t.until) && t.match(rec), ctx.Err()
	}
	switch {
	case req.From > 0:
		return req.From, nil
	case !req.Since.IsZero():
		if vm != "" {
			return t.log.FirstSinceOf(vm, req.Since)
		}
		return t.log.FirstSince(req.Since)
	case req.All && vm != "":
		return t.log.OldestOf(vm)
	case req.All:
		return t.log.Oldest(), nil
	case req.Lines == 0:
		return newest + 1, nil
	case vm != "":
		return t.log.LastMatchingOf(vm, req.Lines, shown)
	default:
		return t.log.LastMatching(req.Lines, shown)
	}
}

// tailFilter gives what a tail shows.
func tailFilter(req bus.TailRequest) (func(*eventlog.Record) bool, error) {
	var patterns []wire.Pattern
	for _, topic := range req.Topics {
		p, err := wire.ParsePattern(topic)
		if err != nil {
			return nil, bus.Errorf(bus.CodeBadTopic, "%v", err)
		}
		patterns = append(patterns, p)
	}
	if req.VM != "" && !wire.ValidName(req.VM) && req.VM != bus.HostVM {
		return nil, bus.Errorf(bus.CodeInvalidName, "%q is no VM's name", req.VM)
	}
	return func(rec *eventlog.Record) bool {
		if req.VM != "" && string(rec.VM) != req.VM {
			if owner, ok := wire.TopicVM(rec.Topic); !ok || string(owner) != req.VM {
				return false
			}
		}
		for i := range patterns {
			if patterns[i].Match(string(rec.Topic)) {
				return true
			}
		}
		return len(patterns) == 0
	}, nil
}
