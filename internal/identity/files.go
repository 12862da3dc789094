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
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/BurntSushi/toml"

	"github.com/castrabus/castra/internal/wire"
)

const (
	recordSuffix = ".json"
	dropInSuffix = ".toml"

	// maxFile is more than any honest file of a VM takes.
	maxFile = 64 << 10
)

// record is a VM's file in the directory that commands write.
type record struct {
	VM       string   `json:"vm"`
	Created  int64    `json:"created"`       // Unix seconds
	Key      []byte   `json:"key,omitempty"` // base64; absent: admitted without proof
	Forwards []string `json:"forwards,omitempty"`
}

// readFile reads a regular file of bounded size. A link is refused: what it
// points to may not be castrad's to trust.
func readFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, syscall.ELOOP) {
		return nil, errors.New("it is a symbolic link")
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // opened for reading
	if st, err := f.Stat(); err != nil {
		return nil, err
	} else if !st.Mode().IsRegular() {
		return nil, errors.New("it is no regular file")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = fmt.Errorf("it is larger than %d bytes", maxFile)
	}
	return data, err
}

func checkName(name string) error {
	if wire.Reserved(name) || !wire.ValidName(name) {
		return fmt.Errorf("%q is no name for a VM", name)
	}
	return nil
}

func checkKey(key []byte) error {
	if len(key) != KeySize {
		return fmt.Errorf("the key has %d bytes, not %d", len(key), KeySize)
	}
	return nil
}

func parseRecord(name, path string) (Entry, error) {
	data, err := readFile(path)
	if err != nil {
		return Entry{}, err
	}
	var rec record
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&rec); err != nil {
		return Entry{}, err
	}
	if rec.VM != name {
		return Entry{}, fmt.Errorf("it says that it is for %q", rec.VM)
	}
	if rec.Key != nil {
		if err := checkKey(rec.Key); err != nil {
			return Entry{}, err
		}
	}
	return Entry{Name: name, Key: rec.Key, Forwards: rec.Forwards, Source: path}, checkName(name)
}

// dropIn is a VM's file in vms_dir. Exactly one of the first three is set.
type dropIn struct {
	Key      string   `toml:"key"`      // base64
	KeyFile  string   `toml:"key_file"` // 32 bytes, relative to the file itself
	NoKey    bool     `toml:"no_key"`
	Forwards []string `toml:"forwards"`
}

func parseDropIn(name, path string) (Entry, error) {
	data, err := readFile(path)
	if err != nil {
		return Entry{}, err
	}
	var d dropIn
	meta, err := toml.Decode(string(data), &d)
	if err != nil {
		return Entry{}, err
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		return Entry{}, fmt.Errorf("unknown key %s; known are key, key_file, no_key and forwards", unknown[0])
	}
	e := Entry{Name: name, Forwards: d.Forwards, Source: path, DropIn: true}
	given := 0
	for _, set := range []bool{d.Key != "", d.KeyFile != "", d.NoKey} {
		if set {
			given++
		}
	}
	switch {
	case given != 1:
		return Entry{}, errors.New("it needs one of key, key_file and no_key = true")
	case d.Key != "":
		if e.Key, err = base64.StdEncoding.DecodeString(d.Key); err != nil {
			return Entry{}, errors.New("key is not base64")
		}
	case d.KeyFile != "":
		file := d.KeyFile
		if !filepath.IsAbs(file) {
			file = filepath.Join(filepath.Dir(path), file)
		}
		if e.Key, err = readFile(file); err != nil {
			return Entry{}, fmt.Errorf("key_file: %w", err)
		}
	}
	if !d.NoKey {
		if err := checkKey(e.Key); err != nil {
			return Entry{}, err
		}
	}
	return e, checkName(name)
}

// writeRecord writes e's file such that a power cut leaves the old one or the
// new one, and after it has returned the new one.
func writeRecord(e Entry, now time.Time) error {
	data, err := json.Marshal(record{VM: e.Name, Created: now.Unix(), Key: e.Key, Forwards: e.Forwards})
	if err != nil {
		return err
	}
	// No VM's name begins with a dot.
	tmp := filepath.Join(filepath.Dir(e.Source), "."+e.Name+".tmp")
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(data, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	if err := os.Rename(tmp, e.Source); err != nil {
		return err
	}
	return syncDir(filepath.Dir(e.Source))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// checkForwards checks e's forwards, also against those of the others: a port
// of the host leads to one VM.
func checkForwards(e Entry, others map[string]Entry) error {
	taken := make(map[string]string)
	for name, o := range others {
		if name == e.Name {
			continue // about to be replaced
		}
		for _, fwd := range o.Forwards {
			if proto, host, _, err := parseForward(fwd); err == nil {
				taken[proto+strconv.Itoa(host)] = name
			}
		}
	}
	for _, fwd := range e.Forwards {
		proto, host, _, err := parseForward(fwd)
		if err != nil {
			return err
		}
		key := proto + strconv.Itoa(host)
		if owner, ok := taken[key]; ok {
			return fmt.Errorf("forward %s: port %d of the host leads to %s already", fwd, host, owner)
		}
		taken[key] = e.Name
	}
	return nil
}

// parseForward takes "tcp:HOST:GUEST" apart.
func parseForward(s string) (proto string, host, guest int, err error) {
	parts := strings.Split(s, ":")
	if len(parts) == 3 && (parts[0] == "tcp" || parts[0] == "udp") {
		h, herr := strconv.ParseUint(parts[1], 10, 16)
		g, gerr := strconv.ParseUint(parts[2], 10, 16)
		if herr == nil && gerr == nil && h > 0 && g > 0 {
			return parts[0], int(h), int(g), nil
		}
	}
	return "", 0, 0, fmt.Errorf("forward %q is not tcp:HOSTPORT:GUESTPORT or udp:HOSTPORT:GUESTPORT", s)
}
