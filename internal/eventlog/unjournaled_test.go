package eventlog

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
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

// The journal is as large as its file system wants it, and takes commits to match.
func TestJournalRoom(t *testing.T) {
	for want, room := range map[journalRoom]journalRoom{
		smallJournal:               smallJournal,
		largeJournal:               largeJournal,
		journalRoomIn(t.TempDir()): {},
	} {
		o := testOptions(filepath.Join(t.TempDir(), "new")) // as at the first start of all
		o.Journal, o.room, o.SegmentSize = filepath.Join(filepath.Dir(o.Dir), "journal"), room, 4<<20
		l := mustOpen(t, o)
		if st, err := os.Stat(o.Journal); err != nil || st.Size() != int64(want.size) {
			t.Fatal(st, err)
		}
		has := func() int {
			b, err := os.ReadFile(o.Journal)
			if j, ok := parseJournal(b); err == nil && ok {
				return len(j.data)
			}
			t.Fatalf("%v: %.200q", err, b)
			return 0
		}
		for i, size := range []int{1, 1, want.most - recordOverhead, want.most} {
			before := has()
			publish(t, l, "web1", "t", "", strings.Repeat("1", size))
			takes := i == 1 || i == 2 // the first commit syncs the room that it takes
			if now := has(); (now > before) != takes {
				t.Errorf("%+v: with a record of %d bytes it has %d and not %d", want, size, now, before)
			}
		}
		mustClose(t, l)
	}
}
