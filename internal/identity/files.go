package identity

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/castrabus/castra/internal/statefile"
)

const (
	recordSuffix = ".json"
	dropInSuffix = ".toml"
	// tmpSuffix ends, and a dot begins, the name of a record that is being
	// written. No VM's name begins with a dot.
	tmpSuffix = ".tmp"

	// maxFile is more than any honest file of a VM takes.
	maxFile = 64 << 10
)

// record is a VM's file in the directory that commands write.
type record struct {
	VM       string   `json:"vm"`
	Created  int64    `json:"created"` // Unix seconds
	Key      string   `json:"key"`     // base64; empty: admitted without proof
	Forwards []string `json:"forwards"`
}

// prepare makes the directory that commands write, for castrad's user alone, and
// clears away what a crash left there.
func (r *Registry) prepare() error {
	if err := os.MkdirAll(r.dir, 0o700); err != nil {
		return err
	}
	if err := r.syncDir(filepath.Dir(r.dir)); err != nil {
		return err
	}
	if err := os.Chmod(r.dir, 0o700); err != nil {
		return err
	}
	files, err := os.ReadDir(r.dir)
	if err != nil {
		return err
	}
	for _, f := range files {
		if name := f.Name(); strings.HasPrefix(name, ".") && strings.HasSuffix(name, tmpSuffix) {
			if err := os.Remove(filepath.Join(r.dir, name)); err != nil {
				return err
			}
		}
	}
	return nil
}

// write writes e's file such that a power cut leaves the old one or the new one,
// and after it has returned without an error the new one. placed says whether the
// new one stands there, though it may not last.
func (r *Registry) write(e Entry) (placed bool, err error) {
	rec := record{VM: e.Name, Created: e.created, Key: base64.StdEncoding.EncodeToString(e.Key), Forwards: append([]string{}, e.Forwards...)}
	data, err := json.Marshal(rec)
	if err != nil {
		return false, err
	}
	tmp := filepath.Join(r.dir, "."+e.Name+tmpSuffix)
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return false, err
	}
	_, err = f.Write(append(data, '\n'))
	if err == nil {
		err = r.sync(f)
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(tmp, e.Source)
	}
	if err != nil {
		return false, errors.Join(err, os.Remove(tmp))
	}
	return true, r.syncDir(r.dir)
}

func (r *Registry) syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(r.sync(d), d.Close())
}

// readFile reads a regular file of bounded size.
func readFile(path string, flags int) ([]byte, error) { return statefile.Read(path, maxFile, flags) }

// readRecord reads the file that registers name.
func readRecord(name, path string) (Entry, error) {
	// A link leads out of the directory that castrad's user alone may write.
	data, err := readFile(path, statefile.NoFollow)
	if err != nil {
		return Entry{}, err
	}
	rec, err := parseRecord(data)
	if err != nil {
		return Entry{}, err
	}
	if rec.VM != name {
		return Entry{}, fmt.Errorf("it says that it is for the VM %q", rec.VM)
	}
	e := Entry{Name: name, Forwards: rec.Forwards, Source: path, created: rec.Created}
	if rec.Key != "" {
		if e.Key, err = decodeKey(rec.Key); err != nil {
			return Entry{}, fmt.Errorf("its key: %w", err)
		}
	}
	return e, nil
}

// parseRecord is strict where encoding/json is not: who wrote "Key" in place of
// "key", or one of them twice, would be admitted without proof.
func parseRecord(data []byte) (record, error) {
	var rec record
	var vm, key *string
	members := map[string]any{"vm": &vm, "created": &rec.Created, "key": &key, "forwards": &rec.Forwards}
	dec := json.NewDecoder(bytes.NewReader(data))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return rec, errors.New("it is no JSON object")
	}
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return rec, fmt.Errorf("it is broken: %w", err)
		}
		name, _ := t.(string) // a member's name always is one
		dst, ok := members[name]
		if !ok {
			return rec, fmt.Errorf("its member %q is unknown, or there twice; vm, created, key and forwards are allowed", name)
		}
		delete(members, name)
		if err := dec.Decode(dst); err != nil {
			return rec, fmt.Errorf("its member %q: %w", name, err)
		}
	}
	if _, err := dec.Token(); err != nil {
		return rec, errors.New("it ends too early")
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return rec, errors.New("something follows the JSON object")
	}
	if vm == nil || key == nil {
		return rec, errors.New(`it lacks "vm" or "key", which is empty where the VM has none`)
	}
	rec.VM, rec.Key = *vm, *key
	return rec, nil
}
