package broker

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/logging"
)

const (
	// strangersInterval is how often it is looked who has left files behind: in
	// between names that nobody registered may add some, ten a second at most.
	strangersInterval = 5 * time.Minute
	// strangersFirst is when that is first done: not while all guests come back that the
	// castrad before had, for it reads the directories of ten thousand.
	strangersFirst = 2 * time.Minute

	// leastShare is what a stranger's stream may take, however many there are.
	leastShare = 64 << 10
)

// share is how many bytes of a VM's stream are kept, 0: as the configuration has it.
// Names that nobody registered cost nothing to make up, so all of them have together
// what the host stream has.
func (b *Broker) share(vm string) int64 {
	if b.opts.HostRetention <= 0 || b.registered(vm) {
		return 0
	}
	n := max(1, b.leftBehind.Load(), int64(b.table.Strangers()))
	return max(leastShare, b.opts.HostRetention/n)
}

// watchStrangers forgets, at times, names that nobody registered.
func (b *Broker) watchStrangers() {
	t := time.NewTimer(strangersFirst)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			t.Reset(strangersInterval)
		case <-b.ctx2.Done():
			return
		}
		err := b.forgetStrangers(b.ctx2, time.Now())
		if err != nil && b.ctx2.Err() == nil {
			logging.ExpiryFailed.On(b.log).WithError(err).Warn("what names left behind that nobody registered cannot be removed; trying again")
		}
	}
}

// forgetStrangers removes the files of names that nobody registered and that have no
// session: of those written to longest ago while there are more names than may be
// remembered, and of those that are not, once they are older than records are kept.
func (b *Broker) forgetStrangers(ctx context.Context, now time.Time) error {
	stranger := func(vm string) bool { return !b.registered(vm) }
	found, err := b.events.ListVMs(stranger)
	if err != nil {
		return err
	}
	found, err = b.withRecords(found, stranger)
	if err != nil {
		return err
	}
	b.leftBehind.Store(int64(len(found)))
	// Who was heard of goes last: of him there may be an honest guest again.
	known := make(map[string]bool)
	for _, f := range found {
		known[f.VM] = b.table.Heard(f.VM)
	}
	slices.SortFunc(found, func(x, y eventlog.VMFiles) int {
		switch {
		case known[x.VM] == known[y.VM]:
			return x.Written.Compare(y.Written)
		case known[x.VM]:
			return 1
		default:
			return -1
		}
	})
	excess, age := 0, b.opts.RetentionAge
	if most := b.settings.Load().MaxVMs; most > 0 {
		excess = len(found) - most
	}
	forgotten := 0
	for _, f := range found {
		old := age > 0 && now.Sub(f.Written) > age && !known[f.VM]
		if excess <= 0 && !old {
			continue
		}
		done := b.keepOut(f.VM)
		if done == nil {
			continue // he is here
		}
		if old {
			b.table.Forget(f.VM) // or what is remembered of an earlier castrad's would stay for ever
		}
		err := b.forgetFiles(ctx, f.VM)
		done()
		if err != nil {
			return err
		}
		forgotten++
		excess--
	}
	if forgotten > 0 {
		b.leftBehind.Add(int64(-forgotten))
		logging.StrangersForgotten.On(b.log).WithFields(logrus.Fields{"count": forgotten}).
			Info("the records of names that nobody registered are removed: there were more than limits.max_vms, or they were older than store.retention_age")
	}
	return nil
}

// departure is a name whose files are being removed.
type departure struct {
	vm   string
	over chan struct{} // closed when they are gone
}

// keepOut lets no guest in as vm until done is called; it is nil if there is one. Who
// came while his files are removed would lose what he has just been promised: a
// cursor, or that a retry is stored once. One goroutine calls it.
func (b *Broker) keepOut(vm string) (done func()) {
	b.admission.Lock()
	defer b.admission.Unlock()
	if b.table.SessionOf(vm) != nil {
		return nil
	}
	d := &departure{vm, make(chan struct{})}
	b.leaving = d
	return func() {
		b.admission.Lock()
		b.leaving = nil
		b.admission.Unlock()
		close(d.over)
	}
}

// enter holds admission for reading once nobody removes the files of vm.
func (b *Broker) enter(ctx context.Context, vm string) error {
	for {
		b.admission.RLock()
		d := b.leaving
		if d == nil || d.vm != vm {
			return nil
		}
		b.admission.RUnlock()
		select {
		case <-d.over:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// withRecords adds the names that have cursors or a file about their last handshake.
func (b *Broker) withRecords(found []eventlog.VMFiles, want func(string) bool) ([]eventlog.VMFiles, error) {
	at := make(map[string]int, len(found))
	for i, f := range found {
		at[f.VM] = i
	}
	for _, dir := range []string{b.cursors.dir, b.records.dir} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			vm, ok := strings.CutSuffix(e.Name(), ".json")
			if !ok || strings.HasPrefix(vm, ".") || !e.Type().IsRegular() || !want(vm) {
				continue
			}
			info, err := e.Info()
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, err
			}
			i, ok := at[vm]
			if !ok {
				i = len(found)
				at[vm] = i
				found = append(found, eventlog.VMFiles{VM: vm})
			}
			if info.ModTime().After(found[i].Written) {
				found[i].Written = info.ModTime()
			}
		}
	}
	return found, nil
}

// forgetFiles removes what is on disk of a VM.
func (b *Broker) forgetFiles(ctx context.Context, vm string) error {
	if err := b.events.ForgetVM(ctx, vm); err != nil {
		return err
	}
	if err := b.cursors.forget(vm); err != nil {
		return err
	}
	if b.table.Has(vm) {
		return nil // its file says when it was last heard of
	}
	err := os.Remove(filepath.Join(b.records.dir, vm+".json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
