package eventlog

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A clean end leaves no journal, and all of it in the segment.
func TestJournalGoesWithTheLog(t *testing.T) {
	disk := newSimDisk(rand.New(rand.NewPCG(1, 1)))
	l, o, segment := crashed(t, disk)
	if err := l.finish(); err != nil {
		t.Fatal(err)
	}
	if _, err := disk.OpenFile(o.Journal, os.O_RDWR, 0); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the journal: %v", err)
	}
	if n := nodeOf(t, disk, segment); !bytes.Equal(n.data, n.durable) {
		t.Error("the segment is not synced")
	}
}

// A segment that cannot be synced at the end keeps its journal, and the next start
// takes from it what the kernel has dropped; so it does when castrad is killed.
func TestJournalOutlivesASyncThatFails(t *testing.T) {
	for _, end := range []string{"closed", "killed"} {
		disk := newSimDisk(rand.New(rand.NewPCG(1, 1)))
		l, o, segment := crashed(t, disk)
		n := nodeOf(t, disk, segment)
		durable := bytes.Clone(n.durable)
		disk.fault = func(op, path string) error {
			if op == "sync" && path == segment {
				return syscall.EIO
			}
			return nil
		}
		if end == "closed" {
			if err := l.finish(); !errors.Is(err, syscall.EIO) {
				t.Errorf("closing: %v", err)
			}
		} else if err := commitOf(l, smallJournal.most); !errors.Is(err, syscall.EIO) {
			t.Errorf("a large record: %v", err)
		}
		n.pending, n.durable, n.data = nil, durable, bytes.Clone(durable) // nothing was written
		disk.fault = nil
		if _, rec, err := open(o); err != nil || rec.Last != 4 || rec.Journal != nil {
			t.Errorf("%s: %+v, %v", end, rec, err)
		}
	}
}

// Where the journal cannot be told that a sync of the segment begins, none does: it might
// fail, and castrad be killed in it.
func TestJournalThatCannotBeMarked(t *testing.T) {
	for seed := range uint64(128) { // a write that fails may have written any part
		disk := newSimDisk(rand.New(rand.NewPCG(seed, 1)))
		l, o, segment := crashed(t, disk)
		disk.fault = func(op, path string) error {
			switch {
			case op == "write" && path == o.Journal:
				return syscall.EIO
			case op == "sync" && path == segment:
				n := nodeOf(t, disk, segment)
				n.pending, n.data = nil, bytes.Clone(n.durable)
				panic(errPowerCut)
			}
			return nil
		}
		func() {
			defer func() { _ = recover() }()
			if err := commitOf(l, smallJournal.most); !errors.Is(err, syscall.EIO) {
				t.Errorf("a large record: %v", err)
			}
		}()
		disk.fault = nil
		if _, rec, err := open(o); err != nil || rec.Last < 4 {
			t.Fatalf("seed %d: %+v, %v", seed, rec, err)
		}
	}
}

// A journal that cannot be removed has what was refused, for which a start on a full disk
// finds room.
func TestJournalThatStays(t *testing.T) {
	for seed := range uint64(16) { // a sync that fails may have written all the same
		disk := newSimDisk(rand.New(rand.NewPCG(seed, 1)))
		l, o, _ := crashed(t, disk)
		disk.fault = func(op, path string) error {
			if path == o.Journal && (op == "sync" || op == "remove") {
				return syscall.EIO
			}
			return nil
		}
		if err := commitOf(l, 1); !errors.Is(err, syscall.EIO) {
			t.Fatalf("a record that the journal does not take: %v", err)
		}
		disk.fault = nil
		o.Boot = strings.Repeat("b", bootDigits)
		disk.noRoom = true
		if _, rec, err := open(o); err != nil || rec.Last < 4 {
			t.Errorf("seed %d: a start on the full disk: %+v, %v", seed, rec, err)
		}
	}
}

// A disk whose syncs fail may go away and come back before castrad has it all on it: what
// castrad itself has done to the segment by then keeps no start from taking the journal.
func TestJournalOfADiskThatFailedAndWentAway(t *testing.T) {
	for seed := range uint64(16) {
		disk := newSimDisk(rand.New(rand.NewPCG(seed, 1)))
		l, o, segment := crashed(t, disk)
		failing := 2
		disk.fault = func(op, path string) error {
			if op == "sync" && path == segment && failing > 0 {
				failing--
				return syscall.EIO
			}
			return nil
		}
		if err := commitOf(l, smallJournal.most); !errors.Is(err, syscall.EIO) {
			t.Fatalf("a large record: %v", err)
		}
		disk.fault = nil
		disk.crash(true, false)
		if _, rec, err := open(o); err != nil || rec.Last != 4 || len(rec.Damaged) > 0 {
			t.Fatalf("seed %d: %+v, %v", seed, rec, err)
		}
	}
}

// What the journal has behind the last record that was acknowledged was refused, and is
// not written to the segment with the others.
func TestRestoreEndsBeforeWhatWasRefused(t *testing.T) {
	for seed := range uint64(16) {
		disk := newSimDisk(rand.New(rand.NewPCG(seed, 1)))
		l, o, segment := crashed(t, disk)
		failing := 2 // of the segment, before it is left and when it is written again
		disk.fault = func(op, path string) error {
			switch {
			case op == "sync" && path == o.Journal && failing == 2:
				return syscall.EIO
			case op == "sync" && path == segment && failing > 0:
				failing--
				return syscall.EIO
			}
			return nil
		}
		if err := commitOf(l, 1); !errors.Is(err, syscall.EIO) || !l.c.journal.lost {
			t.Fatalf("a fifth record: %v", err)
		}
		if err := l.mend(); err != nil {
			t.Fatal(err)
		}
		disk.crash(true, true)
		o.Boot = otherBoot
		if _, rec, err := open(o); err != nil || rec.Last != 4 {
			t.Fatalf("seed %d: %+v, %v", seed, rec, err)
		}
	}
}

// A journal that cannot be read just now is no less for it: what it has is there for the
// next try, or for the next start. What is behind its entries need not be read at all.
func TestRestoreFromAJournalWithABadSector(t *testing.T) {
	for _, bad := range []int64{0, 17 * simBlock} {
		disk := newSimDisk(rand.New(rand.NewPCG(1, 1)))
		o := journalOptions(disk)
		o.room = journalRoom{32 << 10, 4 << 10, simBlock}
		l, o, segment := crashedWith(t, o)
		n := nodeOf(t, disk, segment)
		durable := bytes.Clone(n.durable)
		disk.badSector = func(path string, off int64, n int) bool {
			return path == o.Journal && off <= bad && bad < off+int64(n)
		}
		disk.fault = func(op, path string) error {
			if op == "sync" && path == segment {
				disk.fault = nil
				n.pending, n.data = nil, bytes.Clone(durable) // nothing was written
				return syscall.EIO
			}
			return nil
		}
		if err := commitOf(l, o.room.most); !errors.Is(err, syscall.EIO) {
			t.Fatalf("a large record: %v", err)
		}
		if restored := !l.c.journal.lost; restored != (bad > 0) {
			t.Errorf("a bad sector at %d: restored %v", bad, restored)
		}
		disk.badSector = nil
		disk.crash(true, false)
		o.Boot = otherBoot
		if _, rec, err := open(o); err != nil || rec.Last != 4 || rec.Journal != nil {
			t.Errorf("a bad sector at %d: %+v, %v", bad, rec, err)
		}
	}
}

// A start that is killed while it writes to the segment again, in the boot in which the
// disk went away, has not changed it: the next start does it all.
func TestJournalRedoneAgain(t *testing.T) {
	for seed := range uint64(8) {
		disk := newSimDisk(rand.New(rand.NewPCG(seed, 1)))
		_, o, segment := crashed(t, disk)
		n := nodeOf(t, disk, segment)
		n.pending, n.data, n.changed = nil, bytes.Clone(n.durable), n.durableChanged
		disk.fault = func(op, path string) error { // writes a part
			if op == "write" && path == segment {
				return syscall.EIO
			}
			return nil
		}
		if _, _, err := open(o); !errors.Is(err, syscall.EIO) {
			t.Fatal(err)
		}
		disk.fault = nil
		if _, rec, err := open(o); err != nil || rec.Last != 4 {
			t.Errorf("seed %d: %+v, %v", seed, rec, err)
		}
	}
}

// killedIn runs f up to where the disk kills castrad.
func killedIn(t *testing.T, f func()) {
	t.Helper()
	defer func() {
		if r := recover(); r != any(errPowerCut) {
			t.Fatalf("it is not killed: %v", r)
		}
	}()
	f()
}

// A sync of the segment may fail for so long that castrad is killed in it: the next start
// takes nothing from the kernel.
func TestJournalOfASyncThatNeverEnded(t *testing.T) {
	disk := newSimDisk(rand.New(rand.NewPCG(1, 1)))
	l, o, segment := crashed(t, disk)
	disk.fault = func(op, path string) error {
		if op == "sync" && path == segment {
			n := nodeOf(t, disk, segment)
			n.pending, n.data = nil, bytes.Clone(n.durable)
			panic(errPowerCut)
		}
		return nil
	}
	killedIn(t, func() { _ = commitOf(l, smallJournal.most) })
	disk.fault = nil
	if _, rec, err := open(o); err != nil || rec.Last != 4 {
		t.Errorf("%+v, %v", rec, err)
	}
}

// A record that the journal failed to take may come back where castrad is killed before
// the journal is gone. There is room for it, on a disk that is full by then.
func TestJournalThatFailedOnAFullDisk(t *testing.T) {
	for seed := range uint64(64) {
		disk := newSimDisk(rand.New(rand.NewPCG(seed, 1)))
		l, o, _ := crashed(t, disk)
		disk.fault = func(op, path string) error {
			switch {
			case path != o.Journal:
			case op == "sync":
				return syscall.EIO
			case op == "remove":
				panic(errPowerCut)
			}
			return nil
		}
		killedIn(t, func() { _ = commitOf(l, 1) })
		disk.fault = nil
		disk.crash(seed%2 == 0, true)
		disk.noRoom, o.Boot = true, otherBoot
		if _, rec, err := open(o); err != nil || rec.Last < 4 {
			t.Fatalf("seed %d: %+v, %v", seed, rec, err)
		}
	}
}

// What somebody touched after castrad was killed is not taken from the journal, but all
// that is there is written back, also where that was tried in vain before.
func TestJournalOfATouchedSegment(t *testing.T) {
	disk := newSimDisk(rand.New(rand.NewPCG(1, 1)))
	_, o, segment := crashed(t, disk)
	n := nodeOf(t, disk, segment)
	n.pending = nil // the kernel has written it, in vain
	n.changed = time.Now().Add(time.Hour).UnixNano()
	if _, rec, err := open(o); err != nil || rec.Last != 4 {
		t.Fatalf("%+v, %v", rec, err)
	}
	if !bytes.Equal(n.durable, n.data) {
		t.Error("not all of it was written back")
	}
}

// What is in the journal's place is never a reason not to start, nor is a boot without a
// name; and the journal has no NULs.
func TestJournalOnDisk(t *testing.T) {
	for name, put := range map[string]func(path string) error{
		"nothing":     func(string) error { return nil },
		"a directory": func(path string) error { return os.MkdirAll(filepath.Join(path, "x"), 0o750) },
		"a link":      func(path string) error { return os.Symlink("/dev/null", path) },
		"a pipe":      func(path string) error { return syscall.Mkfifo(path, 0o600) },
		"a text":      func(path string) error { return os.WriteFile(path, []byte("hello\n"), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			o := testOptions(t.TempDir())
			o.Journal = filepath.Join(filepath.Dir(o.Dir), "journal")
			if err := put(o.Journal); err != nil {
				t.Fatal(err)
			}
			l, rec, err := Open(o)
			if err != nil || (rec.Journal == nil) != (name == "nothing") {
				t.Fatal(rec, err)
			}
			for range 3 {
				publish(t, l, "web1", "t", "", "1")
			}
			b, err := os.ReadFile(o.Journal)
			if err != nil || len(b) != smallJournal.size || bytes.IndexByte(b, 0) >= 0 || bytes.Count(b, []byte(`"seq"`)) != 2 {
				t.Errorf("%d bytes, %v, beginning with %.200q", len(b), err, b)
			}
			mustClose(t, l)
			if got := slices.Collect(names(t, filepath.Dir(o.Journal))); slices.Contains(got, "journal") || slices.Contains(got, "journal.tmp") {
				t.Errorf("left: %v", got)
			}
		})
	}
}

func names(t *testing.T, dir string) func(func(string) bool) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return func(yield func(string) bool) {
		for _, e := range entries {
			if !yield(e.Name()) {
				return
			}
		}
	}
}

func TestBootName(t *testing.T) {
	for name, want := range map[string]string{
		"00112233-4455-6677-8899-AABBCCDDEEFF\n": thisBoot,
		thisBoot:                                 thisBoot,
		"b":                                      "",
		strings.Repeat("g", 32):                  "",
		noBoot:                                   "",
	} {
		if got := bootName(name); got != want {
			t.Errorf("%q is %q", name, got)
		}
	}
	if _, err := os.Stat(bootFile); err == nil && bootName("") == "" {
		t.Error(fmt.Sprint(bootFile, " is not understood"))
	}
}
