package cli

import (
	"encoding/base64"
	"errors"
	"fmt"
	"os"
)

// keyFile is the guest's copy of a key, for QEMU to hand over: one SMBIOS string,
// which systemd in the guest turns into the credential castra.key. It is the
// caller's own file, so that a QEMU without privileges can read it.
type keyFile struct {
	path string
	file *os.File // nil: written, and to be kept
}

// keyPath is where a VM's key file is unless the caller says otherwise.
func keyPath(name, out string) string {
	if out != "" {
		return out
	}
	return name + ".castra-key"
}

// createKeyFile makes the file, empty. An existing one may hold the only copy of
// a key that a VM needs: it is never overwritten.
func createKeyFile(name, out string) (*keyFile, error) {
	path := keyPath(name, out)
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("%s is there already, and a key is never overwritten: move it away, or choose another file with --key-out", path)
	}
	if err != nil {
		return nil, fmt.Errorf("creating the key file: %w; choose another place with --key-out", err)
	}
	return &keyFile{path: path, file: file}, nil
}

// write puts the key in. There is no line end: the file's bytes are the string.
func (k *keyFile) write(key []byte) error {
	_, err := k.file.WriteString("io.systemd.credential.binary:castra.key=" + base64.StdEncoding.EncodeToString(key))
	if err = errors.Join(err, k.file.Sync(), k.file.Close()); err != nil {
		return fmt.Errorf("writing %s: %w", k.path, err)
	}
	k.file = nil
	return nil
}

// discard removes a file that no key was written to.
func (k *keyFile) discard() {
	if k.file != nil {
		_ = k.file.Close()
		_ = os.Remove(k.path)
		k.file = nil
	}
}
