package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/backoff"
	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/logging"
	"github.com/castrabus/castra/internal/session"
	"github.com/castrabus/castra/internal/statefile"
	"github.com/castrabus/castra/internal/token"
	"github.com/castrabus/castra/internal/wire"
)

const (
	// maxCursors is how many durable cursors a VM may have (contract 2).
	maxCursors = 64

	// cursorDelay is the least time between two writes of the moves of cursors: a
	// crash brings at most so much of them again.
	cursorDelay = time.Second

	// cursorGather is how long a move after a pause waits for those right behind it.
	cursorGather = 50 * time.Millisecond
)

// cursor is a durable position. Next is the first record still to be delivered.
type cursor struct {
	Topic string `json:"topic"`
	Next  uint64 `json:"next"`
}

// cursors keeps the durable positions, a file a VM.
type cursors struct {
	dir  string
	wake chan struct{} // room for one token: something has moved

	mu    sync.Mutex
	vms   map[string]*vmCursors
	moved map[string]struct{}
}

// vmCursors are one VM's.
type vmCursors struct {
	path string
	// file is held around reads and writes of the file; the table's lock never
	// is, so that neither an ack nor another VM waits for this one's disk.
	file   sync.Mutex
	loaded bool // with file

	all map[string]*cursor // under the table's lock
}

func openCursors(dir string) (*cursors, error) {
	if err := eventlog.MakeDir(eventlog.OS, dir); err != nil { // durably, as what is in it
		return nil, fmt.Errorf("creating the cursors' directory: %w", err)
	}
	return &cursors{
		dir: dir, wake: make(chan struct{}, 1),
		vms: make(map[string]*vmCursors), moved: make(map[string]struct{}),
	}, nil
}

// OpenCursor gives the position of a subscription's durable cursor. One that is
// new, or lay beyond the log's end, is on disk before it is given.
func (b *Broker) OpenCursor(sub *session.Subscription, start uint64) (uint64, error) {
	vm, name := sub.Session().VM(), sub.Cursor()
	next, lost, err := b.cursors.open(vm, name, sub.Topic(), start, b.events.Committed)
	if err != nil {
		b.Unsubscribe(sub)
		if refusal, ok := errors.AsType[*bus.Error](err); ok && refusal.Code == bus.CodeInternal && b.shares.take(noteLog, vm, b.registered(vm), "", "") {
			logging.CursorsUnreadable.On(b.log).WithField("vm", vm).Errorf("%s; its subscriptions with a cursor are refused until the file is mended or moved away", refusal.Reason)
		}
		return 0, err
	}
	if lost > 0 {
		logging.CursorBeyondEnd.On(b.log).WithFields(logrus.Fields{"vm": vm, "cursor": name, "seq": lost}).
			Warn("a cursor lay beyond the end of the event log, which was cut or restored; it is set to the end")
	}
	return next, nil
}

// open gives a cursor's position, making it at start where there is none. One
// beyond what is committed is set to the end of that, and lost is where it was.
func (c *cursors) open(vm, name, topic string, start uint64, committed func() uint64) (next, lost uint64, err error) {
	v := c.hold(vm)
	defer v.file.Unlock()
	if err := c.load(v); err != nil {
		return 0, 0, bus.Errorf(bus.CodeInternal, "reading the cursors in %s: %v", v.path, err)
	}
	c.mu.Lock()
	cur, count := v.all[name], len(v.all)
	end := committed() + 1 // acks have moved it since, if the file was waited for
	switch {
	case cur != nil && cur.Topic != topic: // a cursor's topic never changes
		err = bus.Errorf(bus.CodeBadFrame, "cursor %s is for topic %s; use another name for %s", name, cur.Topic, topic)
	case cur == nil && count >= maxCursors:
		err = bus.Errorf(bus.CodeTooManySubscriptions, "a VM may have %d cursors; use one of those there are", maxCursors)
	case cur == nil:
		next = start
		v.all[name] = &cursor{Topic: topic, Next: start}
	case cur.Next > end:
		next, lost = end, cur.Next
		cur.Next = end
	default:
		next = cur.Next
	}
	c.mu.Unlock()
	if err != nil || cur != nil && lost == 0 {
		return next, 0, err
	}
	if err := c.save(v); err != nil {
		// Nor may who asks next be given what is not on disk.
		c.mu.Lock()
		if cur == nil {
			delete(v.all, name)
		} else {
			cur.Next = lost
		}
		c.mu.Unlock()
		refusal := bus.Errorf(bus.CodeStorageFull, "the cursor cannot be stored (%v); subscribe again later, or without one", err)
		refusal.RetryAfter = time.Second
		return 0, 0, refusal
	}
	return next, lost, nil
}

// hold gives a VM's cursors with its file held.
func (c *cursors) hold(vm string) *vmCursors {
	for {
		c.mu.Lock()
		v := c.vms[vm]
		if v == nil {
			v = &vmCursors{path: filepath.Join(c.dir, vm+".json")}
			c.vms[vm] = v
		}
		c.mu.Unlock()
		v.file.Lock()
		if c.known(vm, v) {
			return v
		}
		v.file.Unlock() // it was forgotten meanwhile
	}
}

func (c *cursors) known(vm string, v *vmCursors) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.vms[vm] == v
}

// forget removes a VM's cursors.
func (c *cursors) forget(vm string) error {
	v := c.hold(vm)
	defer v.file.Unlock()
	c.mu.Lock()
	delete(c.vms, vm)
	delete(c.moved, vm)
	c.mu.Unlock()
	if err := os.Remove(v.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// load reads a VM's cursors once. Call with its file held.
func (c *cursors) load(v *vmCursors) error {
	if v.loaded {
		return nil
	}
	all := make(map[string]*cursor)
	data, err := statefile.Read(v.path, maxCursorFile, statefile.NoFollow)
	if err == nil {
		all, err = parseCursors(data)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	c.mu.Lock()
	v.all = all
	c.mu.Unlock()
	v.loaded = true
	return nil
}

// maxCursorFile is more than maxCursors cursors take.
const maxCursorFile = 1 << 20

// parseCursors takes a VM's file. What no subscription could ever ask for is left
// out; what is no list of cursors is an error, for they may be somebody's.
func parseCursors(data []byte) (map[string]*cursor, error) {
	var all map[string]*cursor
	if err := json.Unmarshal(data, &all); err != nil {
		return nil, err
	}
	if all == nil {
		all = make(map[string]*cursor)
	}
	for name, cur := range all {
		if cur == nil || !wire.ValidSubName(name) {
			delete(all, name)
			continue
		}
		cur.Next = max(1, cur.Next) // somebody has set it back
	}
	return all, nil
}

// save replaces a VM's file durably. Call with it held.
func (c *cursors) save(v *vmCursors) error {
	c.mu.Lock()
	data, err := json.Marshal(v.all)
	c.mu.Unlock()
	if err != nil {
		return err
	}
	return eventlog.Replace(eventlog.OS, v.path, append(data, '\n'))
}

// move takes in an acknowledgement. Positions never go back.
func (c *cursors) move(sub *session.Subscription, seq uint64) {
	if sub.Cursor() == "" {
		return
	}
	vm := sub.Session().VM()
	c.mu.Lock()
	if v := c.vms[vm]; v != nil {
		if cur := v.all[sub.Cursor()]; cur != nil && seq+1 > cur.Next {
			cur.Next = seq + 1
			c.moved[vm] = struct{}{}
		}
	}
	c.mu.Unlock()
	token.Leave(c.wake)
}

// run writes what has moved until ctx is done, and then the rest. note is told how
// each attempt went; what failed is tried again.
func (c *cursors) run(ctx context.Context, note func(error)) {
	var retry <-chan time.Time // nil: nothing has failed
	var written time.Time
	for {
		select {
		case <-retry:
		case <-c.wake:
			backoff.Sleep(ctx, max(cursorGather, cursorDelay-time.Since(written)))
		case <-ctx.Done():
		}
		err := c.flush()
		written = time.Now()
		note(err)
		if retry = nil; err != nil {
			retry = time.After(cursorDelay)
		}
		if ctx.Err() != nil {
			return
		}
	}
}

func (c *cursors) flush() error {
	c.mu.Lock()
	moved := make(map[string]*vmCursors, len(c.moved))
	for vm := range c.moved {
		moved[vm] = c.vms[vm]
	}
	clear(c.moved)
	c.mu.Unlock()
	var errs []error
	for vm, v := range moved {
		v.file.Lock()
		var err error
		if c.known(vm, v) { // else it was forgotten meanwhile
			err = c.save(v)
		}
		v.file.Unlock()
		if err != nil {
			errs = append(errs, err)
			c.mu.Lock()
			if c.vms[vm] == v { // else it was forgotten since
				c.moved[vm] = struct{}{} // to be tried again
			}
			c.mu.Unlock()
		}
	}
	return errors.Join(errs...)
}
