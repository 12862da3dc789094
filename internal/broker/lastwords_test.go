package broker

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bubble"
	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/presence"
)

// words gives the log records of presence, +VM for one that is reachable, -VM for one that
// is not any more, and of whatever else is there.
func words(t *testing.T, log *eventlog.Log, said ...string) {
	t.Helper()
	for _, s := range said {
		e := eventlog.Entry{VM: "web1", Topic: []byte("t"), Payload: []byte(s)}
		if vm := s[1:]; s[0] == '+' || s[0] == '-' {
			e = presenceEntry(presence.Change{VM: vm, Reachable: s[0] == '+', Reason: "test"})
		}
		b := &eventlog.Batch{Entries: []eventlog.Entry{e}}
		if err := log.Append(t.Context(), b); err != nil {
			t.Fatal(err)
		}
		if err := b.Entries[0].Err; err != nil {
			t.Fatal(err)
		}
	}
}

func testLog(t *testing.T, dir string) *eventlog.Log {
	t.Helper()
	log, _, err := eventlog.Open(eventlog.Options{Dir: dir, SegmentSize: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = log.Close() })
	return log
}

// What was said last of each VM is the list, and what the log has behind it.
func TestWhoWasAnnounced(t *testing.T) {
	for name, test := range map[string]struct {
		file string // "": there is none
		log  []string
		want []string
		err  string
	}{
		"nothing": {want: []string{}},
		"no list, as after a first run that was killed": {log: []string{"+a", "+b", "7", "-a", "+c"}, want: []string{"b", "c"}},
		"a list of everything":                          {file: `{"seq":3,"reachable":["a","b"]}`, log: []string{"+a", "+b", "7"}, want: []string{"a", "b"}},
		"more was said":                                 {file: `{"seq":2,"reachable":["a","b"]}`, log: []string{"+a", "+b", "-a", "+c", "+a", "-c", "-b"}, want: []string{"a"}},
		"what is before it is not looked at":            {file: `{"seq":3,"reachable":[]}`, log: []string{"+a", "+b", "7", "+c"}, want: []string{"c"}},
		"the log was cut, or begun anew":                {file: `{"seq":9,"reachable":["a","c"]}`, log: []string{"+b", "-c"}, want: []string{"a", "b"}},
		"the list has no number, as it once had none":   {file: `["a","b"]`, log: []string{"+c", "-b"}, want: []string{"a", "c"}},
		"a list that is none":                           {file: `{"seq":`, log: []string{"+a"}, want: []string{"a"}, err: "reachable.json"},
		"names that are none":                           {file: `{"seq":0,"reachable":["../x","host","web1","web1"]}`, want: []string{"web1"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			log := testLog(t, filepath.Join(dir, "log"))
			words(t, log, test.log...)
			path := filepath.Join(dir, "reachable.json")
			if test.file != "" {
				if err := os.WriteFile(path, []byte(test.file), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			a, err := recallWords(path, log, recallBytes)
			if got := fmt.Sprint(err); (err != nil) != (test.err != "") || !strings.Contains(got, test.err) {
				t.Errorf("the error is %v", err)
			}
			if got, _ := a.names(); !slices.Equal(got, test.want) {
				t.Errorf("reachable were %v, want %v", got, test.want)
			}
		})
	}
}

// The list never says that it has what is still on its way to the log.
func TestListBesideWordsOnTheirWay(t *testing.T) {
	dir := t.TempDir()
	log := testLog(t, filepath.Join(dir, "log"))
	path := filepath.Join(dir, "reachable.json")
	a, err := recallWords(path, log, recallBytes)
	if err != nil {
		t.Fatal(err)
	}
	listed := func(want string) {
		t.Helper()
		if err := a.write(); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != want+"\n" {
			t.Errorf("the list is %s, %v, want %s", got, err, want)
		}
	}
	words(t, log, "1", "2")
	listed(`{"seq":2,"reachable":[]}`)
	a.begin()
	words(t, log, "+b", "+a")
	listed(`{"seq":2,"reachable":[]}`)
	a.stored([]presence.Change{{VM: "b", Reachable: true}, {VM: "a", Reachable: true}})
	listed(`{"seq":4,"reachable":["a","b"]}`)
}

// The list is written where a start would have much to hear behind it, and else after a
// while in which anything was published.
func TestListIsBehind(t *testing.T) {
	dir := t.TempDir()
	bubble.Test(t, func(t *testing.T) {
		log := testLog(t, filepath.Join(dir, "log"))
		a, err := recallWords(filepath.Join(dir, "reachable.json"), log, recallBytes)
		if err != nil {
			t.Fatal(err)
		}
		is := func(want bool, when string) {
			t.Helper()
			if a.behind() != want {
				t.Errorf("%s it is behind: %v", when, !want)
			}
		}
		time.Sleep(time.Hour)
		is(false, "without a record")
		words(t, log, "1")
		is(true, "an hour later")
		if err := a.write(); err != nil {
			t.Fatal(err)
		}
		is(false, "just written")
		words(t, log, "2")
		is(false, "with a record more")
		large := `"` + strings.Repeat("x", 60_000) + `"`
		for range maxBehind/60_000 + 20 { // more than that by a segment
			words(t, log, large)
		}
		is(true, "with many more")
	})
}

// What comes before the newest bytes that a start is to read is left to the list.
func TestRecallIsBounded(t *testing.T) {
	dir := t.TempDir()
	log, _, err := eventlog.Open(eventlog.Options{Dir: filepath.Join(dir, "log"), SegmentSize: 4096})
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	words(t, log, "+old")
	for range 20 {
		words(t, log, `"`+strings.Repeat("x", 1000)+`"`)
	}
	words(t, log, "+new")
	path := filepath.Join(dir, "reachable.json")
	for most, want := range map[int64][]string{8192: {"new"}, 1 << 20: {"new", "old"}} {
		a, err := recallWords(path, log, most)
		if gap, missed := errors.AsType[*eventlog.Gap](err); missed != (len(want) == 1) || missed && gap.From != 1 {
			t.Errorf("with %d bytes the error is %v", most, err)
		}
		if got, _ := a.names(); !slices.Equal(got, want) {
			t.Errorf("of %d bytes it hears of %v, want %v", most, got, want)
		}
	}
}

// failingFS is a file system on which a read fails, once.
type failingFS struct {
	eventlog.FS
	due atomic.Bool
}

func (s *failingFS) OpenFile(name string, flag int, perm fs.FileMode) (eventlog.File, error) {
	f, err := s.FS.OpenFile(name, flag, perm)
	return failingFile{f, s}, err
}

type failingFile struct {
	eventlog.File
	fs *failingFS
}

func (f failingFile) ReadAt(b []byte, off int64) (int, error) {
	if f.fs.due.Swap(false) {
		return 0, syscall.EIO
	}
	return f.File.ReadAt(b, off)
}

// What a start could not hear for a disk that failed, no list claims to have, and the next
// start hears.
func TestRecallWithAFailingDisk(t *testing.T) {
	dir := t.TempDir()
	log := testLog(t, filepath.Join(dir, "log"))
	words(t, log, "+a", "+b")
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	disk := &failingFS{FS: eventlog.OS}
	log, _, err := eventlog.Open(eventlog.Options{Dir: filepath.Join(dir, "log"), SegmentSize: 1 << 20, FS: disk})
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	path := filepath.Join(dir, "reachable.json")
	disk.due.Store(true)
	a, err := recallWords(path, log, recallBytes)
	if !errors.Is(err, syscall.EIO) {
		t.Fatalf("the error is %v", err)
	}
	words(t, log, "-b")
	a.stored([]presence.Change{{VM: "b"}})
	if err := a.write(); err != nil {
		t.Fatal(err)
	}
	if a, err = recallWords(path, log, recallBytes); err != nil {
		t.Fatal(err)
	}
	if got, _ := a.names(); !slices.Equal(got, []string{"a"}) {
		t.Errorf("the next start hears of %v", got)
	}
}

// A list that is beyond the log's end is written anew before another word is said: its
// number will be another record's.
func TestListBeyondTheLog(t *testing.T) {
	o := testOptions(t, t.TempDir())
	if err := os.MkdirAll(o.StateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(o.StateDir, "reachable.json"), []byte(`{"seq":100,"reachable":["a"]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	b := start(t, o)
	connect(t, b.addr, "b")
	eventually(t, "both words are said", func() bool { return b.events.Committed() == 2 })
	b = start(t, testOptions(t, killed(t, o)))
	eventually(t, "the second is said to be gone", func() bool { return count(t, b, `{"vm":"b","state":"unreachable"`) == 1 })
	if n := count(t, b, `{"vm":"a","state":"unreachable"`); n != 1 {
		t.Errorf("the first is said to be gone %d times", n)
	}
}

// killed gives a copy of what a castrad with these options has on disk just now.
func killed(t *testing.T, o Options) (dir string) {
	t.Helper()
	dir = t.TempDir()
	eventually(t, "what there is on disk is copied", func() bool { // unless a file comes or goes meanwhile
		_ = os.RemoveAll(dir)
		return os.CopyFS(dir, os.DirFS(filepath.Dir(o.StateDir))) == nil
	})
	return dir
}

// A castrad that is killed the moment after a word was said is succeeded by one that knows of it.
func TestKilledBehindAWord(t *testing.T) {
	o := testOptions(t, t.TempDir())
	b := start(t, o)
	gone := connect(t, b.addr, "gone")
	eventually(t, "it is listed", func() bool {
		list, _ := os.ReadFile(filepath.Join(o.StateDir, "reachable.json"))
		return strings.Contains(string(list), `["gone"]`)
	})
	for i := range 5 {
		connect(t, b.addr, fmt.Sprint("vm", i))
	}
	_ = gone.conn.Close()
	eventually(t, "all is said", func() bool { return b.events.Committed() == 7 })
	b = start(t, testOptions(t, killed(t, o)))
	eventually(t, "the others are said to be gone", func() bool {
		return count(t, b, `"state":"unreachable","reason":"restarted"`) == 5
	})
	connect(t, b.addr, "last")
	eventually(t, "something else is said", func() bool { return count(t, b, `{"vm":"last","state":"reachable"`) == 1 })
	if n := count(t, b, `"state":"unreachable"`); n != 6 {
		t.Errorf("%d have been said to be gone, want 6", n)
	}
	if n := count(t, b, `{"vm":"gone","state":"unreachable"`); n != 1 {
		t.Errorf("%d times it is said that the one that left is gone", n)
	}
}

// handedOver ends a broker and starts the one that its guests are handed over to; between
// is called while they are.
func handedOver(t *testing.T, b *running, between func()) *running {
	t.Helper()
	var kept *os.File
	keep := keep(t, &kept)
	if _, err := b.HandOver(func(f *os.File) error { between(); return keep(f) }); err != nil {
		t.Fatal(err)
	}
	_ = b.Close() // it may have something to say that it cannot store
	return start(t, successor(t, b, kept))
}

// Who comes or goes while the disk is full is announced after a restart at which the others stay.
func TestHandOverOnFullDisk(t *testing.T) {
	disk := &fullFS{FS: eventlog.OS}
	o := testOptions(t, t.TempDir())
	o.FS = disk
	b := start(t, o)
	connect(t, b.addr, "stays")
	goes := connect(t, b.addr, "goes")
	eventually(t, "both are announced", func() bool { return b.events.Committed() == 2 })
	disk.full.Store(true)
	_ = goes.conn.Close()
	connect(t, b.addr, "comes")
	eventually(t, "who went is known to have gone", func() bool { return !b.Status([]string{"goes"}).VMs[0].Reachable })
	b = handedOver(t, b, func() { disk.full.Store(false) })
	for word, want := range map[string]int{
		`{"vm":"goes","state":"unreachable"`: 1, `{"vm":"comes","state":"reachable"`: 1, `{"vm":"stays"`: 1,
	} {
		eventually(t, word+" is said", func() bool { return count(t, b, word) >= want })
		if n := count(t, b, word); n != want {
			t.Errorf("%s is said %d times, want %d", word, n, want)
		}
	}
}

// What a castrad says while its guests are handed over, the next one does not say again.
func TestHandOverBehindAWord(t *testing.T) {
	o := testOptions(t, t.TempDir())
	o.ReachableWithin = time.Second
	b := start(t, o)
	old := dial(t, b.addr)
	old.say("hello vm:old capabilities=exec\n")
	const gone = `{"vm":"old","state":"unreachable"`
	eventually(t, "the old guest is announced", func() bool { return b.events.Committed() == 1 })
	b = handedOver(t, b, func() {
		eventually(t, "it is said to be gone", func() bool { return count(t, b, gone) == 1 })
	})
	connect(t, b.addr, "new")
	eventually(t, "something else is said", func() bool { return count(t, b, `"vm":"new"`) == 1 })
	if n := count(t, b, gone); n != 1 || b.events.Committed() != 3 {
		t.Errorf("it is said %d times, in %d words", n, b.events.Committed())
	}
}
