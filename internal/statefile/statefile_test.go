package statefile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestRead(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for name, data := range map[string]string{"empty": "", "five": "12345", "long": strings.Repeat("x", 100_000)} {
		if err := os.WriteFile(at(name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(syscall.Mkfifo(at("pipe"), 0o600), os.Mkdir(at("dir"), 0o700), os.Symlink("five", at("link"))); err != nil {
		t.Fatal(err)
	}
	const ok = ""
	for _, tt := range []struct {
		name  string
		limit int64
		flags int
		want  string
		fault string
	}{
		{"empty", 10, 0, "", ok},
		{"five", 10, 0, "12345", ok},
		{"five", 5, NoFollow, "12345", ok},
		{"five", 4, 0, "", "larger than 4 bytes"},
		{"empty", 0, 0, "", ok},
		{"long", 1 << 20, 0, strings.Repeat("x", 100_000), ok},
		{"long", 99_999, 0, "", "larger than 99999 bytes"},
		{"link", 10, 0, "12345", ok},
		{"link", 10, NoFollow, "", "symbolic link"},
		{"pipe", 10, 0, "", "no regular file"},
		{"dir", 10, 0, "", "no regular file"},
		{"none", 10, 0, "", at("none")},
	} {
		data, err := Read(at(tt.name), tt.limit, tt.flags)
		switch {
		case tt.fault == ok && err != nil, tt.fault != ok && (err == nil || !strings.Contains(err.Error(), tt.fault)):
			t.Errorf("%s, at most %d bytes: %v, want %q", tt.name, tt.limit, err, tt.fault)
		case err == nil && string(data) != tt.want:
			t.Errorf("%s: %d bytes, want %d", tt.name, len(data), len(tt.want))
		}
		if missing := tt.name == "none"; errors.Is(err, fs.ErrNotExist) != missing {
			t.Errorf("%s is there: %v, but %v", tt.name, !missing, err)
		}
	}
	// What says that it has no bytes may have some all the same.
	if data, err := Read("/proc/self/status", 1<<16, 0); err != nil || !strings.HasPrefix(string(data), "Name:") {
		t.Errorf("/proc/self/status: %q, %v", data, err)
	}
}
