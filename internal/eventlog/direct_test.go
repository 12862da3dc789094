package eventlog

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// bufferedFS is a file system that has no direct I/O, and finds out when it is asked to
// op: "open", "write" or "read".
type bufferedFS struct {
	FS
	op string
}

func (s bufferedFS) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	direct := flag&syscall.O_DIRECT != 0
	if direct && s.op == "open" {
		return nil, &fs.PathError{Op: s.op, Path: name, Err: syscall.EINVAL}
	}
	f, err := s.FS.OpenFile(name, flag&^syscall.O_DIRECT, perm)
	if direct && err == nil {
		f = bufferedFile{f, s.op}
	}
	return f, err
}

type bufferedFile struct {
	File
	op string
}

func (f bufferedFile) WriteAt(b []byte, off int64) (int, error) {
	if f.op == "write" {
		return 0, syscall.EINVAL
	}
	return f.File.WriteAt(b, off)
}

func (f bufferedFile) ReadAt(b []byte, off int64) (int, error) {
	if f.op == "read" {
		return 0, syscall.EINVAL
	}
	return f.File.ReadAt(b, off)
}

// A journal is kept on every file system, past the page cache where it can be.
func TestJournalWithoutDirectIO(t *testing.T) {
	for _, op := range []string{"", "open", "write", "read"} {
		o := testOptions(t.TempDir())
		o.Journal, o.PerVM = filepath.Join(filepath.Dir(o.Dir), "journal"), nil
		if op != "" {
			o.FS = bufferedFS{OS, op}
		}
		l, _, err := open(o)
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if err := commitOf(l, 1); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := l.c.journal.read(nil); err != nil { // as after a sync that failed
			t.Errorf("refused in %q: %v", op, err)
		}
		b, err := os.ReadFile(o.Journal)
		if j, ok := parseJournal(b); err != nil || !ok || bytes.Count(j.data, newline) != 2 || len(b) != smallJournal.size {
			t.Errorf("refused in %q: %d bytes, %v, beginning with %.200q", op, len(b), err, b)
		}
		if f, err := OS.OpenFile(o.Journal, os.O_RDWR|syscall.O_DIRECT, 0); err == nil && op == "" {
			err = l.c.journal.file.(osFile).control("fcntl", func(fd int) error {
				flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
				if flags&unix.O_DIRECT == 0 {
					t.Error("there is direct I/O, and it is not in use")
				}
				return err
			})
			if err = errors.Join(err, f.Close()); err != nil {
				t.Error(err)
			}
		}
		if err := l.finish(); err != nil {
			t.Error(err)
		}
	}
}

// rounds counts what a log asks of its segment while the journal takes the records.
type rounds struct {
	FS
	dir   string
	syncs int
	begun []int64 // pairs of offset and end
}

func (s *rounds) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	f, err := s.FS.OpenFile(name, flag, perm)
	if err == nil && filepath.Dir(name) == s.dir && strings.HasSuffix(name, segmentSuffix) {
		f = roundsFile{f, s}
	}
	return f, err
}

type roundsFile struct {
	File
	s *rounds
}

func (f roundsFile) Sync() error {
	f.s.syncs++
	return f.File.Sync()
}

func (f roundsFile) WriteBack(off, n int64) { f.s.begun = append(f.s.begun, off, off+n) }

// openRounds opens a log on disk whose rounds are as long as castrad's.
func openRounds(t *testing.T, disk *simDisk) (*Log, *rounds) {
	t.Helper()
	o := journalOptions(nil)
	seen := &rounds{FS: disk, dir: o.Dir}
	o.FS, o.SegmentSize, o.room = seen, 64<<20, wholeJournal
	l, _, err := open(o)
	if err != nil {
		t.Fatal(err)
	}
	return l, seen
}

// The segment is synced once a round of the journal, for which there are blocks reserved,
// and the disk has begun to write most of it by then.
func TestRoundOfTheJournal(t *testing.T) {
	l, seen := openRounds(t, newSimDisk(rand.New(rand.NewPCG(1, 1))))
	const record, commits = 60_000, 300
	const want = 1 + commits/((2<<20)/(record+journalHeader+recordOverhead/4)-1) // the first has nothing reserved yet
	for range commits {
		if err := commitOf(l, record); err != nil {
			t.Fatal(err)
		}
	}
	if seen.syncs < want/2 || seen.syncs > want {
		t.Errorf("%d syncs of the segment, where %d rounds are enough", seen.syncs, want)
	}
	var last int64
	for i := 0; i < len(seen.begun); i += 2 {
		if from, to := seen.begun[i], seen.begun[i+1]; from > last+record+1<<16 || to-from < 256<<10 {
			t.Fatalf("the disk is told of %d to %d behind %d", from, to, last)
		}
		last = seen.begun[i+1]
	}
	if last < l.c.size-512<<10 {
		t.Errorf("of %d bytes the disk is told of %d", l.c.size, last)
	}
}

// What is reserved is used up in rounds, too, where the disk has no more.
func TestRoundOnAFullDisk(t *testing.T) {
	disk := newSimDisk(rand.New(rand.NewPCG(1, 1)))
	l, seen := openRounds(t, disk)
	for l.c.size < preallocStep-(256<<10) {
		if err := commitOf(l, 60_000); err != nil {
			t.Fatal(err)
		}
		disk.noRoom = true
	}
	if seen.syncs > 3 {
		t.Errorf("%d syncs of the segment for %d bytes", seen.syncs, l.c.size)
	}
}

// What one version leaves the next one takes: entries stand directly behind each other,
// whatever is a block, and what follows in the last one is empty lines.
func TestJournalInBlocks(t *testing.T) {
	disk := newSimDisk(rand.New(rand.NewPCG(1, 1)))
	o := journalOptions(disk)
	o.room = journalRoom{16 << 10, 4 << 10, simBlock}
	l, _, err := open(o)
	if err != nil {
		t.Fatal(err)
	}
	for round := range 3 {
		var want []byte
		for i := 0; ; i++ {
			from := l.c.size
			if err := commitOf(l, 1+i*37%600); err != nil {
				t.Fatal(err)
			}
			if !l.c.journal.ahead { // the round is over
				break
			}
			segment := nodeOf(t, disk, filepath.Join(o.Dir, segmentName(l.c.first)))
			want = append(want, segment.data[from:l.c.size]...)
			b := nodeOf(t, disk, o.Journal).durable
			j, ok := parseJournal(b)
			if !ok || !bytes.Equal(j.data, want) {
				t.Fatalf("round %d, commit %d: it has %d bytes, not %d", round, i, len(j.data), len(want))
			}
			at := int(l.c.journal.at)
			if rest := b[at:roundUp(at, simBlock)]; strings.Trim(string(rest), "\n") != "" {
				t.Fatalf("behind the last entry stands %q", rest)
			}
		}
	}
}
