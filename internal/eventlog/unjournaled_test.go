package eventlog

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestUnjournaled(t *testing.T) {
	dir := t.TempDir()
	var st syscall.Stat_t
	if err := syscall.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	for task, want := range map[string]string{"<none>\n": "sda1", "1234\n": "", "": ""} {
		sys := t.TempDir()
		at, ext4 := filepath.Join(sys, "dev/block"), filepath.Join(sys, "fs/ext4/sda1")
		if err := errors.Join(os.MkdirAll(at, 0o755), os.MkdirAll(ext4, 0o755)); err != nil {
			t.Fatal(err)
		}
		if got := unjournaled(sys, dir); got != "" {
			t.Errorf("a device that nobody knows is %q", got)
		}
		if err := os.Symlink("../../devices/sda/sda1", filepath.Join(at, fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))); err != nil {
			t.Fatal(err)
		}
		if got := unjournaled(sys, dir); got != "" { // another file system
			t.Errorf("without a word it is %q", got)
		}
		if err := os.WriteFile(filepath.Join(ext4, "journal_task"), []byte(task), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := unjournaled(sys, dir); got != want {
			t.Errorf("%q: it is %q", task, got)
		}
	}
}
