package eventlog

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// smallJournal is a quick one.
var smallJournal = journalRoom{256 << 10, 32 << 10, ioBlock}

const (
	thisBoot  = "00112233445566778899aabbccddeeff"
	otherBoot = "ffeeddccbbaa99887766554433221100"
)

// The journal shown in docs/EVENTLOG.md is one, byte for byte.
func TestDocumentedJournal(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join("..", "..", "docs", "EVENTLOG.md"))
	if err != nil {
		t.Fatal(err)
	}
	want := appendEntry([]byte(journalHead+thisBoot+"\n"), 42, 1234, 1795896180123456789, []byte("{}\n"))
	if !bytes.Contains(doc, want) {
		t.Errorf("it does not have\n%s", want)
	}
	if got, ok := parseJournal(want); !ok || got.boot != thisBoot || got.segment != 42 || got.from != 1234 || got.written != 1795896180123456789 || string(got.data) != "{}\n" {
		t.Errorf("%+v, %v", got, ok)
	}
}

func TestParseJournal(t *testing.T) {
	head := []byte(journalHead + thisBoot + "\n")
	entry := func(b []byte, segment uint64, off int64, data string) []byte {
		return appendEntry(bytes.Clone(b), segment, off, 1, []byte(data))
	}
	two := entry(entry(head, 7, 100, "abc\n"), 7, 104, "de\n")
	flipped := func(at int) []byte { b := bytes.Clone(two); b[at] ^= 0x20; return b }
	for name, c := range map[string]struct {
		b    []byte
		none bool
		want string
	}{
		"none":                    {nil, true, ""},
		"another version":         {bytes.Replace(two, []byte("journal 1"), []byte("journal 2"), 1), true, ""},
		"cut in the first line":   {two[:journalStart-1], true, ""},
		"empty":                   {head, false, ""},
		"filled":                  {append(bytes.Clone(two), "\n\n\n"...), false, "abc\nde\n"},
		"cut in the second":       {two[:len(two)-1], false, "abc\n"},
		"cut in its first line":   {two[:journalStart+journalHeader+4+30], false, "abc\n"},
		"flipped in the first":    {flipped(journalStart + journalHeader), false, ""},
		"flipped in a number":     {flipped(journalStart + 19), false, ""},
		"flipped in the checksum": {flipped(journalStart + journalHeader - 2), false, ""},
		"flipped in the second":   {flipped(len(two) - 1), false, "abc\n"},
		"behind a hole":           {entry(two, 7, 108, "f\n"), false, "abc\nde\n"},
		"of an earlier round":     {entry(two, 7, 104, "f\n"), false, "abc\nde\n"},
		"of another segment":      {entry(two, 8, 107, "f\n"), false, "abc\nde\n"},
		"of the next":             {entry(two, 7, 107, "f\n"), false, "abc\nde\nf\n"},
		"without data":            {appendEntry(bytes.Clone(two), 7, 107, 1, nil), false, "abc\nde\n"},
	} {
		if got, ok := parseJournal(c.b); ok == c.none || string(got.data) != c.want {
			t.Errorf("%s: %q, %v", name, got.data, ok)
		}
	}
}

// The journal is as large as it is to be, and takes commits to match.
func TestJournalRoom(t *testing.T) {
	for want, room := range map[journalRoom]journalRoom{smallJournal: smallJournal, wholeJournal: {}} {
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

// FuzzJournal takes whatever bytes as a journal: what it gives is what stands there,
// and written again it is the same.
func FuzzJournal(f *testing.F) {
	head := []byte(journalHead + thisBoot + "\n")
	one := appendEntry(bytes.Clone(head), 1, 0, 1, seedRecord(1, 0))
	f.Add(head)
	f.Add(one)
	f.Add(appendEntry(bytes.Clone(one), 1, int64(len(seedRecord(1, 0))), 2, seedRecord(2, 1)))
	f.Add(append(bytes.Clone(one), one[journalStart:]...))
	f.Add(appendEntry(bytes.Clone(head), 1<<64-1, 1<<63-1, -1, []byte("\n")))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, ok := parseJournal(b)
		if !ok {
			if len(got.data) > 0 {
				t.Errorf("%q is none and has %q", b, got.data)
			}
			return
		}
		if len(got.boot) != bootDigits || len(got.data) > 0 && got.from < 0 {
			t.Errorf("%+v", got)
		}
		again := appendEntry([]byte(journalHead+got.boot+"\n"), got.segment, got.from, got.written, got.data)
		if len(got.data) > 0 {
			if second, ok := parseJournal(again); !ok || !bytes.Equal(second.data, got.data) || second.from != got.from || second.segment != got.segment {
				t.Errorf("%+v is read again as %+v", got, second)
			}
		}
	})
}

// journalOptions are those of a log with a journal that takes all but the first commit.
func journalOptions(fsys FS) Options {
	o := testOptions("/log")
	o.FS, o.PerVM, o.Journal, o.Boot = fsys, nil, "/log/journal", thisBoot
	return o
}

// crashed makes a log of four records, the last three of them in the journal, that is
// left without having been closed.
func crashed(t *testing.T, disk *simDisk) (l *Log, o Options, segment string) {
	t.Helper()
	return crashedWith(t, journalOptions(disk))
}

// crashedWith is crashed of a log with the options o.
func crashedWith(t *testing.T, o Options) (*Log, Options, string) {
	t.Helper()
	l, _, err := open(o)
	if err != nil {
		t.Fatal(err)
	}
	for range 4 {
		if err := commitOf(l, 1); err != nil {
			t.Fatal(err)
		}
	}
	if !l.c.journal.ahead {
		t.Fatal("nothing is in the journal")
	}
	return l, o, filepath.Join(o.Dir, segmentName(1))
}

func nodeOf(t *testing.T, disk *simDisk, path string) *simNode {
	t.Helper()
	_, n, err := disk.find(path)
	if err != nil || n == nil {
		t.Fatalf("%s: %v", path, err)
	}
	return n
}

// What a start makes of a journal, by what was left of log and journal.
func TestJournalRecovery(t *testing.T) {
	lose := func(n *simNode) { // all that was not synced
		n.pending = n.pending[:0]
		n.data = bytes.Clone(n.durable)
		n.changed = n.durableChanged
	}
	cut := func(t *testing.T, d *simDisk, path string, size int64) {
		f, err := d.OpenFile(path, os.O_RDWR, 0)
		if err != nil || f.Truncate(size) != nil {
			t.Fatal(err)
		}
	}
	flip := func(t *testing.T, d *simDisk, path string, at int64) {
		f, err := d.OpenFile(path, os.O_RDWR, 0)
		b := make([]byte, 1)
		if err == nil {
			_, err = f.ReadAt(b, at)
		}
		b[0] ^= 1
		if err == nil {
			_, err = f.WriteAt(b, at)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	const journal = "/log/journal"
	for name, c := range map[string]struct {
		left func(t *testing.T, d *simDisk, o *Options, segment string)
		last uint64
		told bool
	}{
		"killed": {func(*testing.T, *simDisk, *Options, string) {}, 4, false},
		"power cut": {func(t *testing.T, d *simDisk, o *Options, segment string) {
			lose(nodeOf(t, d, segment))
			o.Boot = otherBoot
		}, 4, false},
		"power cut, a lazy log since": {func(t *testing.T, d *simDisk, o *Options, segment string) {
			lose(nodeOf(t, d, segment))
			o.Boot, o.SyncEvery = otherBoot, 1<<40
		}, 4, false},
		"power cut, what was lost is said to be newer": {func(t *testing.T, d *simDisk, o *Options, segment string) {
			lose(nodeOf(t, d, segment))
			nodeOf(t, d, segment).changed = 1 << 62
			o.Boot = otherBoot
		}, 4, false},
		"the disk went away and came back": {func(t *testing.T, d *simDisk, _ *Options, segment string) {
			lose(nodeOf(t, d, segment))
		}, 4, false},
		"written back in vain before castrad was killed": {func(t *testing.T, d *simDisk, _ *Options, segment string) {
			n := nodeOf(t, d, segment)
			n.pending, n.data = n.pending[:0], grow(bytes.Clone(n.durable), len(n.data))
		}, 4, false},
		"killed, and cut by somebody": {func(t *testing.T, d *simDisk, _ *Options, segment string) {
			cut(t, d, segment, int64(len(nodeOf(t, d, segment).data)-3))
		}, 3, false},
		"power cut, and no journal": {func(t *testing.T, d *simDisk, o *Options, segment string) {
			lose(nodeOf(t, d, segment))
			o.Boot = otherBoot
			if err := d.Remove(journal); err != nil {
				t.Fatal(err)
			}
		}, 1, false},
		"power cut, and half a journal": {func(t *testing.T, d *simDisk, o *Options, segment string) {
			lose(nodeOf(t, d, segment))
			o.Boot = otherBoot
			cut(t, d, journal, int64(journalStart+journalHeader+len(nodeOf(t, d, segment).data)+60))
		}, 2, false},
		"power cut, and a flipped bit in the journal": {func(t *testing.T, d *simDisk, o *Options, segment string) {
			first := int64(len(nodeOf(t, d, segment).durable))
			lose(nodeOf(t, d, segment))
			o.Boot = otherBoot
			flip(t, d, journal, int64(journalStart)+2*int64(journalHeader)+first) // in the second entry
		}, 2, true},
		"power cut, and a flipped bit in its first entry": {func(t *testing.T, d *simDisk, o *Options, segment string) {
			lose(nodeOf(t, d, segment))
			o.Boot = otherBoot
			flip(t, d, journal, int64(journalStart+journalHeader))
		}, 1, true},
		"power cut, and a journal of nothing": {func(t *testing.T, d *simDisk, o *Options, segment string) {
			lose(nodeOf(t, d, segment))
			o.Boot = otherBoot
			cut(t, d, journal, 0)
		}, 1, true},
		"a segment cut before the journal begins": {func(t *testing.T, d *simDisk, o *Options, segment string) {
			cut(t, d, segment, 0)
			o.Boot = otherBoot
		}, 0, true},
		"a newer segment": {func(t *testing.T, d *simDisk, o *Options, _ string) {
			f, err := d.OpenFile(filepath.Join(o.Dir, segmentName(5)), os.O_RDWR|os.O_CREATE, 0)
			if err != nil || f.Close() != nil {
				t.Fatal(err)
			}
			o.Boot = otherBoot
		}, 4, false},
		"no segment": {func(t *testing.T, d *simDisk, o *Options, segment string) {
			if err := d.Remove(segment); err != nil {
				t.Fatal(err)
			}
			o.Boot = otherBoot
		}, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			disk := newSimDisk(rand.New(rand.NewPCG(1, 1)))
			_, o, segment := crashed(t, disk)
			c.left(t, disk, &o, segment)
			l, rec, err := open(o)
			if err != nil || rec.Last != c.last || (rec.Journal != nil) != c.told {
				t.Fatalf("%+v, %v; want %d records, told %v", rec, err, c.last, c.told)
			}
			for range 2 {
				if err := commitOf(l, 1); err != nil {
					t.Fatal(err)
				}
			}
			if ahead := l.c.journal.ahead; ahead == l.Lazy() {
				t.Errorf("the journal is in use: %v", ahead)
			}
			// And what the log has now no journal takes back.
			o.Boot = thisBoot[1:] + "0"
			if _, rec, err = open(o); err != nil || rec.Last != c.last+2 || rec.Journal != nil {
				t.Errorf("again: %+v, %v", rec, err)
			}
		})
	}
}

// Of a damaged journal is told how far it went, which may be far behind the damage.
func TestDamagedJournalTellsItsEnd(t *testing.T) {
	disk := newSimDisk(rand.New(rand.NewPCG(1, 1)))
	_, o, segment := crashed(t, disk)
	n := nodeOf(t, disk, segment)
	end := len(n.data)
	n.pending, n.data = nil, bytes.Clone(n.durable)
	nodeOf(t, disk, o.Journal).data[journalStart+journalHeader] ^= 1 // in the first of three entries
	o.Boot = otherBoot
	_, rec, err := open(o)
	if want := fmt.Sprintf("beyond byte %d of %s, up to %d at least", len(n.durable), segment, end); err != nil || rec.Journal == nil || !strings.HasSuffix(rec.Journal.Error(), want) {
		t.Errorf("told %v, %v; want %q", rec.Journal, err, want)
	}
}
