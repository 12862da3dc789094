// Package identity is the registry of VMs: which names may connect, and with
// which key each must prove its own.
package identity

import (
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

// KeySize is the length of a VM's key in bytes (contract 2).
const KeySize = 32

// Entry is a registered VM. Its slices must not be changed.
type Entry struct {
	Name     string
	Key      []byte   // nil: the name is admitted without proof
	Forwards []string // "tcp:HOST:GUEST"
	Source   string   // the file that it comes from
	DropIn   bool     // kept as a file by an administrator, not by command
}

// Problem is a file that could not be used.
type Problem struct{ File, Reason string }

// Registry holds the VMs of two directories: one that commands write, and one
// of drop-in files, which win. Its methods may be called by anybody.
type Registry struct {
	dir, dropins string

	entries atomic.Pointer[map[string]Entry] // replaced, never changed in place
	mu      sync.Mutex                       // held by whoever changes files or entries
}

// Open reads the registry. Files that cannot be used are left out and told of;
// an error means that the registry cannot work at all.
func Open(dir, dropins string) (*Registry, []Problem, error) {
	// Keys are for castrad's user alone.
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("creating the registry of VMs: %w", err)
	}
	r := &Registry{dir: dir, dropins: dropins}
	problems, err := r.Reload()
	return r, problems, err
}

// Lookup gives the VM called name. It touches no disk.
func (r *Registry) Lookup(name string) (Entry, bool) {
	e, ok := (*r.entries.Load())[name]
	return e, ok
}

// List gives all VMs by name.
func (r *Registry) List() []Entry {
	all := slices.Collect(maps.Values(*r.entries.Load()))
	slices.SortFunc(all, func(a, b Entry) int { return cmp.Compare(a.Name, b.Name) })
	return all
}

// Len tells how many VMs are registered.
func (r *Registry) Len() int { return len(*r.entries.Load()) }

// Reload reads both directories again.
func (r *Registry) Reload() ([]Problem, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	entries := make(map[string]Entry)
	var problems []Problem
	for _, source := range []struct {
		dir, suffix string
		parse       func(name, path string) (Entry, error)
		optional    bool
	}{
		{r.dir, recordSuffix, parseRecord, false},
		{r.dropins, dropInSuffix, parseDropIn, true},
	} {
		if source.dir == "" {
			continue
		}
		files, err := os.ReadDir(source.dir)
		if errors.Is(err, fs.ErrNotExist) && source.optional {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reading the registry of VMs: %w", err)
		}
		for _, f := range files {
			name, ok := strings.CutSuffix(f.Name(), source.suffix)
			if !ok || strings.HasPrefix(name, ".") {
				continue
			}
			path := filepath.Join(source.dir, f.Name())
			e, err := source.parse(name, path)
			if err == nil {
				err = checkForwards(e, entries)
			}
			if err != nil {
				problems = append(problems, Problem{File: path, Reason: err.Error()})
				continue
			}
			entries[name] = e
		}
	}
	r.entries.Store(&entries)
	return problems, nil
}

// Add registers a VM and gives its new key, nil if it has none. With IfMissing
// a VM that is there already is left as it is, and created is false. It is on
// disk before Add returns. The error is a *bus.Error.
func (r *Registry) Add(req bus.AddVMRequest) (created bool, key []byte, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	entries := maps.Clone(*r.entries.Load())
	e := Entry{Name: req.Name, Forwards: req.Forwards, Source: r.path(req.Name)}
	switch old, known := entries[req.Name]; {
	case wire.Reserved(req.Name):
		return false, nil, bus.Errorf(bus.CodeInvalidName, "the name %s is the host's own; choose another", req.Name)
	case !wire.ValidName(req.Name):
		return false, nil, bus.Errorf(bus.CodeInvalidName, "%q is no name for a VM: 1 to %d of A-Za-z0-9._-, beginning with a letter or digit", req.Name, wire.MaxName)
	case known && req.IfMissing:
		return false, nil, nil
	case known:
		return false, nil, bus.Errorf(bus.CodeVMExists, "%s is registered already (%s); castractl vm rekey %s gives it a new key", req.Name, old.Source, req.Name)
	}
	if err := checkForwards(e, entries); err != nil {
		return false, nil, bus.Errorf(bus.CodeInvalidArg, "%v", err)
	}
	if !req.NoKey {
		e.Key = newKey()
	}
	if err := writeRecord(e, time.Now()); err != nil {
		return false, nil, bus.Errorf(bus.CodeInternal, "%s is not registered: %v", req.Name, err)
	}
	entries[req.Name] = e
	r.entries.Store(&entries)
	return true, e.Key, nil
}

// Remove forgets a VM. The error is a *bus.Error.
func (r *Registry) Remove(name string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	entries := maps.Clone(*r.entries.Load())
	if err := changeable(entries, name); err != nil {
		return err
	}
	if err := os.Remove(r.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return bus.Errorf(bus.CodeInternal, "%s stays registered: %v", name, err)
	}
	if err := syncDir(r.dir); err != nil {
		return bus.Errorf(bus.CodeInternal, "%s may be registered again after a crash: %v", name, err)
	}
	delete(entries, name)
	r.entries.Store(&entries)
	return nil
}

// Rekey gives a VM a new key. The error is a *bus.Error.
func (r *Registry) Rekey(name string) ([]byte, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	entries := maps.Clone(*r.entries.Load())
	if err := changeable(entries, name); err != nil {
		return nil, err
	}
	e := entries[name]
	e.Key = newKey()
	if err := writeRecord(e, time.Now()); err != nil {
		return nil, bus.Errorf(bus.CodeInternal, "%s keeps its old key: %v", name, err)
	}
	entries[name] = e
	r.entries.Store(&entries)
	return e.Key, nil
}

func changeable(entries map[string]Entry, name string) error {
	switch e, ok := entries[name]; {
	case !ok:
		return bus.Errorf(bus.CodeNoSuchVM, "no VM called %q is registered; castractl vm list shows those that are", name)
	case e.DropIn:
		return bus.Errorf(bus.CodeInvalidArg, "%s comes from %s; change or remove that file and run systemctl reload castrad", name, e.Source)
	}
	return nil
}

func (r *Registry) path(name string) string { return filepath.Join(r.dir, name+recordSuffix) }

func newKey() []byte {
	key := make([]byte, KeySize)
	_, _ = rand.Read(key) // never fails (crypto/rand, Go 1.24)
	return key
}
