package eventlog

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
)

// checkpoint makes what was copied durable, and then the position.
func (p *perVM) checkpoint() error {
	p.unsaved = true
	if err := p.syncAll(); err != nil {
		p.lost = true // what was written since the last one may be, whatever the page cache shows
		p.forget()
		return err
	}
	p.synced = p.position.Load()
	if err := p.savePosition(p.synced); err != nil {
		return fmt.Errorf("saving how far the VMs' streams are: %w", err)
	}
	p.saved.Store(p.synced)
	p.since, p.unsaved = 0, false
	p.log.lookAround()
	return nil
}

// syncAll makes everything durable that was copied.
func (p *perVM) syncAll() error {
	vms := slices.Sorted(maps.Keys(p.unsynced)) // the first that fails is the same each time, see passOver
	for _, vm := range vms {
		if s := p.known(vm); s != nil && s.f != nil {
			if removed, err := s.f.Removed(); err == nil && removed {
				return s.streamFault("syncing", errRemoved)
			}
		}
	}
	if len(vms) >= p.opts.together && p.streamTree != nil && p.idTree != nil {
		return p.syncTrees()
	}
	for _, vm := range vms { // by name: what was known of its files may have been forgotten
		s, err := p.stream([]byte(vm))
		if err != nil {
			return err
		}
		if err := s.sync(&p.open); err != nil {
			return err
		}
	}
	clear(p.unsynced)
	if p.newDirs {
		if err := p.log.opts.FS.SyncDir(p.opts.Dir); err != nil {
			return err
		}
		p.newDirs = false
	}
	if p.newIDs {
		if err := p.log.opts.FS.SyncDir(p.opts.IDDir); err != nil {
			return err
		}
		p.newIDs = false
	}
	return nil
}

// syncTrees is syncAll where there are so many files that it is done at once.
func (p *perVM) syncTrees() error {
	if err := p.streamTree.Sync(); err != nil {
		return fmt.Errorf("syncing the VMs' streams: %w", err)
	}
	if err := p.idTree.Sync(); err != nil {
		return fmt.Errorf("syncing the VMs' ids: %w", err)
	}
	for vm := range p.unsynced {
		if s := p.known(vm); s != nil {
			s.st.unsynced = false
		}
	}
	clear(p.unsynced)
	p.newDirs, p.newIDs = false, false
	return nil
}

type savedPosition struct {
	Seq uint64 `json:"seq"`
	// Lazy: what was copied may not have been durable in the host stream.
	Lazy bool `json:"lazy,omitempty"`
}

// durable gives up to where the host stream was durable for sure; 0: nobody knows.
func (s savedPosition) durable() uint64 {
	if s.Lazy {
		return 0
	}
	return s.Seq
}

func (o *PerVMOptions) loadPosition(fsys FS) (savedPosition, error) {
	var none savedPosition
	f, err := openOwn(fsys, o.PositionFile, os.O_RDONLY, o.OnAside)
	if errors.Is(err, fs.ErrNotExist) {
		return none, nil
	}
	if err != nil {
		return none, err
	}
	defer func() { _ = f.Close() }() // opened for reading
	var b [64]byte
	n, _ := f.ReadAt(b[:], 0)
	var pos savedPosition
	if json.Unmarshal(b[:n], &pos) != nil {
		return none, nil // copy everything once more: slow, and never wrong
	}
	return pos, nil
}

func (p *perVM) savePosition(position uint64) error {
	b, err := json.Marshal(savedPosition{position, p.log.Lazy()})
	if err != nil {
		return err
	}
	// Durably, or a start might have far more to copy than what came behind this.
	return Replace(p.log.opts.FS, p.opts.PositionFile, append(b, '\n'))
}
