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

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/session"
)

const (
	// maxCursors is how many durable cursors a VM may have (contract 2).
	maxCursors = 64

	// cursorDelay is how long the moves of cursors are gathered before they are
	// written: a crash brings at most so much of them again.
	cursorDelay = time.Second
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

	// files is held around reads and writes of files; mu never is, so that a
	// guest's ack does not wait for a disk.
	files sync.Mutex

	mu    sync.Mutex
	vms   map[string]map[string]*cursor // as far as loaded
	moved map[string]struct{}
}

func openCursors(dir string) (*cursors, error) {
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return nil, fmt.Errorf("creating the cursors' directory: %w", err)
	}
	return &cursors{
		dir: dir, wake: make(chan struct{}, 1),
		vms: make(map[string]map[string]*cursor), moved: make(map[string]struct{}),
	}, nil
}

// OpenCursor gives the position of a subscription's durable cursor. One that is
// new is on disk before it is given.
func (b *Broker) OpenCursor(sub *session.Subscription, start uint64) (uint64, error) {
	next, err := b.cursors.open(sub.Session().VM(), sub.Cursor(), sub.Topic(), start)
	if err != nil {
		b.Unsubscribe(sub)
		return 0, err
	}
	if end := b.events.Committed() + 1; next > end {
		b.log.WithFields(logrus.Fields{"vm": sub.Session().VM(), "cursor": sub.Cursor(), "seq": next}).
			Warn("a cursor lies beyond the end of the event log, which was cut or restored; it is set to the end")
		next = end
	}
	return next, nil
}

func (c *cursors) open(vm, name, topic string, start uint64) (uint64, error) {
	c.files.Lock()
	defer c.files.Unlock()
	if err := c.load(vm); err != nil {
		return 0, bus.Errorf(bus.CodeInternal, "reading the cursors of %s: %v", vm, err)
	}
	c.mu.Lock()
	known, count := c.vms[vm][name], len(c.vms[vm])
	next := start
	if known != nil {
		next = known.Next
	} else if count < maxCursors {
		c.vms[vm][name] = &cursor{Topic: topic, Next: start}
	}
	c.mu.Unlock()
	switch {
	case known != nil && known.Topic != topic: // a cursor's topic never changes
		return 0, bus.Errorf(bus.CodeBadFrame, "cursor %s is for topic %s; use another name for %s", name, known.Topic, topic)
	case known != nil:
		return next, nil
	case count >= maxCursors:
		return 0, bus.Errorf(bus.CodeTooManySubscriptions, "a VM may have %d cursors; use one of those there are", maxCursors)
	}
	if err := c.save(vm); err != nil {
		c.mu.Lock()
		delete(c.vms[vm], name)
		c.mu.Unlock()
		refusal := bus.Errorf(bus.CodeStorageFull, "the cursor cannot be stored: %v", err)
		refusal.RetryAfter = time.Second
		return 0, refusal
	}
	return next, nil
}

// load reads a VM's cursors once. Call with files held.
func (c *cursors) load(vm string) error {
	c.mu.Lock()
	known := c.vms[vm] != nil
	c.mu.Unlock()
	if known {
		return nil
	}
	of := make(map[string]*cursor)
	data, err := os.ReadFile(c.path(vm))
	if err == nil {
		err = json.Unmarshal(data, &of)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	c.mu.Lock()
	c.vms[vm] = of
	c.mu.Unlock()
	return nil
}

func (c *cursors) path(vm string) string { return filepath.Join(c.dir, vm+".json") }

// save replaces a VM's file durably. Call with files held.
func (c *cursors) save(vm string) error {
	c.mu.Lock()
	data, err := json.Marshal(c.vms[vm])
	c.mu.Unlock()
	if err != nil {
		return err
	}
	return replaceDurably(c.path(vm), append(data, '\n'))
}

// move takes in an acknowledgement. Positions never go back.
func (c *cursors) move(sub *session.Subscription, seq uint64) {
	if sub.Cursor() == "" {
		return
	}
	vm := sub.Session().VM()
	c.mu.Lock()
	if cur := c.vms[vm][sub.Cursor()]; cur != nil && seq+1 > cur.Next {
		cur.Next = seq + 1
		c.moved[vm] = struct{}{}
	}
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// run writes what has moved until ctx is done, and then the rest.
func (c *cursors) run(ctx context.Context, log *logrus.Logger) {
	for {
		select {
		case <-c.wake:
			t := time.NewTimer(cursorDelay)
			select {
			case <-t.C:
			case <-ctx.Done():
				t.Stop()
			}
		case <-ctx.Done():
		}
		if err := c.flush(); err != nil {
			log.WithError(err).Error("cannot store how far guests have read; some of it may be delivered again")
		}
		if ctx.Err() != nil {
			return
		}
	}
}

func (c *cursors) flush() error {
	c.mu.Lock()
	moved := c.moved
	c.moved = make(map[string]struct{})
	c.mu.Unlock()
	c.files.Lock()
	defer c.files.Unlock()
	var errs []error
	for vm := range moved {
		if err := c.save(vm); err != nil {
			errs = append(errs, err)
			c.mu.Lock()
			c.moved[vm] = struct{}{} // the next move tries again
			c.mu.Unlock()
		}
	}
	return errors.Join(errs...)
}

// replaceDurably gives path the contents data, whole or not at all, and such
// that a power cut does not take it back.
func replaceDurably(path string, data []byte) error {
	tmp := path + ".tmp"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o640)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
