package identity

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// FuzzDropIn reads whatever bytes as an administrator's file. A VM is without a key
// only where the file says so.
func FuzzDropIn(f *testing.F) {
	key := strings.Repeat("A", 43) + "="
	for _, text := range []string{
		"key = \"" + key + "\"\n", "no_key = true\n", "no_key = false\n", "key_file = \"k\"\n", "key_file = \"../../etc/passwd\"\n", "key_file = \"/dev/zero\"\n",
		"key = \"\"\nno_key = true\nforwards = [\"tcp:2222:22\"]\n", "Key = \"x\"\n", "[key]\n", "\x00",
	} {
		f.Add([]byte(text))
	}
	dir := f.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "k"), []byte(key), 0o600); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		path := filepath.Join(dir, "web1.toml")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		e, err := readDropIn("web1", path)
		if err == nil && (e.Key == nil && !bytes.Contains(data, []byte("no_key")) || e.Key != nil && len(e.Key) != KeySize) {
			t.Errorf("%q gives %+v", data, e)
		}
	})
}

// FuzzKey reads whatever bytes as a key file.
func FuzzKey(f *testing.F) {
	text := strings.Repeat("A", 43) + "="
	for _, data := range []string{text, text + "\n", smbiosPrefix + text, smbiosPrefix + smbiosPrefix + text, strings.Repeat("k", KeySize), "", text + text, strings.Repeat("A", 44)} {
		f.Add([]byte(data))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		key, err := ParseKey(data)
		if err == nil && len(key) != KeySize {
			t.Errorf("%q is a key of %d bytes", data, len(key))
		}
		if err != nil && len(data) > 8 && strings.Contains(err.Error(), string(data)) {
			t.Errorf("the error gives the key away: %v", err)
		}
	})
}

// FuzzForward reads forwards: what is taken can be written in one way only.
func FuzzForward(f *testing.F) {
	for _, text := range []string{"tcp:2222:22", "udp:53:53", "tcp:02222:22", "tcp:0:1", "tcp:65536:1", "tcp:1:2:3", "TCP:1:2", "tcp:+1:2", ""} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if checkForward(text) == nil && (strings.Count(text, ":") != 2 || strings.ContainsAny(text, " +-\n") || !strings.HasPrefix(text, portOf(text)+":")) {
			t.Errorf("%q is taken", text)
		}
	})
}
