// Package identity is the registry of VMs: which names may connect, and with
// which key each must prove its own.
package identity

import (
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

// KeySize is the length of a VM's key in bytes (contract 2).
const KeySize = 32

// Entry is a registered VM. Its slices must not be changed.
type Entry struct {
	Name     string
	Key      []byte   // KeySize bytes; nil: the name is admitted without proof
	Forwards []string // "tcp:HOSTPORT:GUESTPORT"
	Source   string   // the file that it comes from
	DropIn   bool     // kept as a file by an administrator, not by command

	created int64 // Unix seconds; 0: nobody wrote it down
}

// Registry holds the VMs of two directories: one that commands write, and one of
// drop-in files, which win. Its methods may be called by anybody at any time;
// those that change something wait for the disk and for each other, and nobody
// else waits for them.
type Registry struct {
	dir, dropins string
	sync         func(*os.File) error // (*os.File).Sync

	changing sync.Mutex // held by whoever changes files or entries

	mu      sync.RWMutex // never held while the disk is waited for
	entries map[string]Entry
	ports   map[string]string // whose a port of the host is: see portOf
}

// Open reads the registry, and makes dir if it is missing. Files that cannot be
// used are left out and told of; an error means that the registry cannot work at
// all. dropins may be missing, or empty for none.
func Open(dir, dropins string) (*Registry, []Problem, error) {
	r := &Registry{dir: dir, dropins: dropins, sync: (*os.File).Sync}
	if err := r.prepare(); err != nil {
		return nil, nil, fmt.Errorf("preparing the registry of VMs: %w", err)
	}
	problems, err := r.Reload()
	if err != nil {
		return nil, nil, err
	}
	return r, problems, nil
}

// Lookup gives the VM called name. It touches no disk.
func (r *Registry) Lookup(name string) (Entry, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	e, ok := r.entries[name]
	return e, ok
}

// List gives all VMs by name.
func (r *Registry) List() []Entry {
	r.mu.RLock()
	all := slices.Collect(maps.Values(r.entries))
	r.mu.RUnlock()
	slices.SortFunc(all, func(a, b Entry) int { return cmp.Compare(a.Name, b.Name) })
	return all
}

// Len tells how many VMs are registered.
func (r *Registry) Len() int {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return len(r.entries)
}

// Add registers a VM and gives its new key, nil if it has none. With IfMissing a
// VM that is there already is left as it is, and created is false. When Add has
// returned, a power cut does not undo it. The error is a *bus.Error.
func (r *Registry) Add(req bus.AddVMRequest) (created bool, key []byte, err error) {
	r.changing.Lock()
	defer r.changing.Unlock()
	if err := checkName(req.Name); err != nil {
		return false, nil, bus.Errorf(bus.CodeInvalidName, "%v", err)
	}
	e := Entry{Name: req.Name, Forwards: slices.Clone(req.Forwards), Source: r.path(req.Name), created: time.Now().Unix()}
	switch old, known := r.Lookup(req.Name); {
	case known && req.IfMissing:
		return false, nil, nil
	case known && old.DropIn:
		return false, nil, bus.Errorf(bus.CodeVMExists, "%s is registered already, by %s; change that file to change it", e.Name, old.Source)
	case known:
		return false, nil, bus.Errorf(bus.CodeVMExists, "%s is registered already; castractl vm rekey %s gives it a new key", e.Name, e.Name)
	}
	if err := r.checkFree(e); err != nil {
		return false, nil, err
	}
	if err := r.checkForwards(e); err != nil {
		code := bus.CodeInvalidArg
		if errors.Is(err, errPortTaken) {
			code = bus.CodePortTaken
		}
		return false, nil, bus.Errorf(code, "%v", err)
	}
	if !req.NoKey {
		e.Key = newKey()
	}
	if placed, err := r.write(e); err != nil {
		if placed { // what nobody has the key of must not be there after a restart
			err = errors.Join(err, os.Remove(e.Source))
		}
		return false, nil, failure(err, e.Name+" is not registered")
	}
	r.put(e)
	return true, e.Key, nil
}

// checkFree refuses a name for which there is a file that could not be used.
func (r *Registry) checkFree(e Entry) error {
	dropin := filepath.Join(r.dropins, e.Name+dropInSuffix)
	if _, err := os.Lstat(dropin); err == nil && r.dropins != "" {
		return bus.Errorf(bus.CodeVMExists, "%s is there for %s; systemctl reload castrad takes it in, or logs what is wrong with it", dropin, e.Name)
	}
	// It may hold a key that somebody still needs.
	if _, err := os.Lstat(e.Source); err == nil {
		return bus.Errorf(bus.CodeVMExists, "%s is there for %s and cannot be used; mend it and run systemctl reload castrad, or remove it: castractl vm remove %s", e.Source, e.Name, e.Name)
	}
	return nil
}

// Remove forgets a VM, also one whose file could not be used. When it has
// returned, a power cut does not undo it. The error is a *bus.Error.
func (r *Registry) Remove(name string) error {
	r.changing.Lock()
	defer r.changing.Unlock()
	e, err := r.changeable(name)
	if err != nil {
		return err
	}
	// It stays known until it is gone for good, so that the command can be
	// repeated.
	err = os.Remove(e.Source)
	if err == nil || errors.Is(err, os.ErrNotExist) {
		err = r.syncDir(r.dir)
	}
	if err != nil {
		return failure(err, name+" stays registered")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, fwd := range r.entries[name].Forwards {
		delete(r.ports, portOf(fwd))
	}
	delete(r.entries, name)
	return nil
}

// Rekey gives a VM a new key, also one that had none. When it has returned, a
// power cut does not undo it. The error is a *bus.Error.
func (r *Registry) Rekey(name string) (key []byte, err error) {
	r.changing.Lock()
	defer r.changing.Unlock()
	old, err := r.changeable(name)
	if err != nil {
		return nil, err
	}
	if old.Name == "" {
		return nil, bus.Errorf(bus.CodeNoSuchVM, "%s cannot be used as it is; remove it with castractl vm remove %s, and add the VM again", old.Source, name)
	}
	e := old
	e.Key = newKey()
	if placed, err := r.write(e); err != nil {
		if placed { // the guest has the old key, and nobody the new one
			_, werr := r.write(old)
			err = errors.Join(err, werr)
		}
		return nil, failure(err, name+" keeps its old key")
	}
	r.put(e)
	return e.Key, nil
}

// changeable gives the VM that a command may change; without a name if there is
// only a file that could not be used.
func (r *Registry) changeable(name string) (Entry, error) {
	e, known := r.Lookup(name)
	if known && e.DropIn {
		return Entry{}, bus.Errorf(bus.CodeNotHere, "%s is registered by %s; change or remove that file and run systemctl reload castrad", name, e.Source)
	}
	if !known {
		e = Entry{Source: r.path(name)}
		if checkName(name) != nil {
			return Entry{}, noSuchVM(name)
		}
		if _, err := os.Lstat(e.Source); err != nil {
			return Entry{}, noSuchVM(name)
		}
	}
	return e, nil
}

func noSuchVM(name string) error {
	return bus.Errorf(bus.CodeNoSuchVM, "no VM called %q is registered; castractl vm list shows those that are", name)
}

func (r *Registry) put(e Entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.entries[e.Name] = e
	for _, fwd := range e.Forwards {
		r.ports[portOf(fwd)] = e.Name
	}
}

func (r *Registry) path(name string) string { return filepath.Join(r.dir, name+recordSuffix) }

// failure makes of an error from the disk one that a caller is meant to see.
func failure(err error, outcome string) error {
	text := strings.ReplaceAll(err.Error(), "\n", "; ") // joined errors
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return bus.Errorf(bus.CodeStorageFull, "%s: %s; make room there and try again", outcome, text)
	}
	return bus.Errorf(bus.CodeInternal, "%s: %s; try again when the disk is well", outcome, text)
}

func checkName(name string) error {
	switch {
	case wire.Reserved(name):
		return fmt.Errorf("the name %s is the host's own; choose another", name)
	case !wire.ValidName(name):
		return fmt.Errorf("%q is no name for a VM: 1 to %d of A-Za-z0-9._-, beginning with a letter or digit", name, wire.MaxName)
	}
	return nil
}

func newKey() []byte {
	key := make([]byte, KeySize)
	_, _ = rand.Read(key) // never fails: it ends the process instead
	return key
}
