package identity

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/castrabus/castra/internal/config"
)

// Problem is a file that is not used, and why.
type Problem struct{ File, Reason string }

// Reload reads both directories again. On an error the registry stays as it is.
func (r *Registry) Reload() ([]Problem, error) {
	r.changing.Lock()
	defer r.changing.Unlock()
	// Drop-ins come first, so that they win: over the name, and over ports.
	dropins, err := filesIn(r.dropins, dropInSuffix)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("reading the registry of VMs: %w", err)
	}
	records, err := filesIn(r.dir, recordSuffix)
	if err != nil {
		return nil, fmt.Errorf("reading the registry of VMs: %w", err)
	}
	fresh := &Registry{entries: make(map[string]Entry, len(dropins)+len(records)), ports: make(map[string]string)}
	var problems []Problem
	take := func(name, path string, read func(name, path string) (Entry, error)) {
		e, err := read(name, path)
		if err == nil {
			err = errors.Join(checkName(name), fresh.checkForwards(e))
		}
		if err != nil {
			problems = append(problems, Problem{path, strings.ReplaceAll(err.Error(), "\n", "; ")})
			return
		}
		fresh.put(e)
	}
	for _, name := range slices.Sorted(maps.Keys(dropins)) {
		take(name, dropins[name], readDropIn)
	}
	for _, name := range slices.Sorted(maps.Keys(records)) {
		// Also where the drop-in is broken: it may be there to ask for a key of a VM
		// that was registered without.
		if d, ok := dropins[name]; ok {
			problems = append(problems, Problem{records[name], fmt.Sprintf("%s decides about %s; remove one of the two", d, name)})
			continue
		}
		take(name, records[name], readRecord)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.entries, r.ports = fresh.entries, fresh.ports
	return problems, nil
}

// filesIn gives a directory's files that end in suffix, by what is before it. None
// are in no directory.
func filesIn(dir, suffix string) (map[string]string, error) {
	if dir == "" {
		return nil, nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	files := make(map[string]string)
	for _, e := range entries {
		// Dots begin the names of editors' and package managers' files.
		if name, ok := strings.CutSuffix(e.Name(), suffix); ok && !strings.HasPrefix(e.Name(), ".") {
			files[name] = filepath.Join(dir, e.Name())
		}
	}
	return files, nil
}

// dropIn is a VM's file among the drop-ins. Exactly one of the first three is set:
// a VM without a key must be meant.
type dropIn struct {
	Key      string   `toml:"key"`      // base64
	KeyFile  string   `toml:"key_file"` // relative to the drop-in's directory
	NoKey    bool     `toml:"no_key"`
	Forwards []string `toml:"forwards"`
}

// readDropIn reads an administrator's file for name. It may be a link, as those
// who manage machines with files often have them.
func readDropIn(name, path string) (Entry, error) {
	text, err := readFile(path, 0)
	if err != nil {
		return Entry{}, err
	}
	var d dropIn
	if err := config.Decode("", string(text), &d); err != nil {
		return Entry{}, err
	}
	e := Entry{Name: name, Forwards: d.Forwards, Source: path, DropIn: true}
	switch {
	case d.Key != "" && d.KeyFile == "" && !d.NoKey:
		if e.Key, err = decodeKey(d.Key); err != nil {
			return Entry{}, fmt.Errorf("key: %w", err)
		}
	case d.Key == "" && d.KeyFile != "" && !d.NoKey:
		file := d.KeyFile
		if !filepath.IsAbs(file) {
			file = filepath.Join(filepath.Dir(path), file)
		}
		data, err := readFile(file, 0)
		if err == nil {
			e.Key, err = ParseKey(data)
		}
		if err != nil {
			return Entry{}, fmt.Errorf("key_file: %w", err)
		}
	case d.Key == "" && d.KeyFile == "" && d.NoKey:
	default:
		return Entry{}, errors.New("it must have one of key, key_file, and no_key = true")
	}
	return e, nil
}

// smbiosPrefix is what stands before the key in the file that castractl writes for
// QEMU (contract 7).
const smbiosPrefix = "io.systemd.credential.binary:castra.key="

// ParseKey takes the contents of a key file: KeySize bytes, or their base64, or
// what castractl wrote for QEMU. Its errors give nothing of the key away.
func ParseKey(data []byte) ([]byte, error) {
	if len(data) == KeySize {
		return data, nil
	}
	key, err := decodeKey(strings.TrimPrefix(strings.TrimSpace(string(data)), smbiosPrefix))
	if err != nil {
		return nil, fmt.Errorf("holds no key: neither %d bytes, nor their base64, nor what castractl vm add wrote", KeySize)
	}
	return key, nil
}

func decodeKey(text string) ([]byte, error) {
	key, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil || len(key) != KeySize {
		return nil, fmt.Errorf("it is not the base64 of %d bytes", KeySize)
	}
	return key, nil
}
