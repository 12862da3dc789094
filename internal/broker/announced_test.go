package broker

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

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
		"the log is another":                            {file: `{"seq":9,"reachable":["a"]}`, log: []string{"+b"}, want: []string{"a"}},
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
			a, err := recallAnnounced(path, log)
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
	a, err := recallAnnounced(path, log)
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
	if a.behind() {
		t.Error("the list is taken for old")
	}
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
	killed := t.TempDir()
	eventually(t, "what there is on disk is copied", func() bool { // unless a file comes or goes meanwhile
		_ = os.RemoveAll(killed)
		return os.CopyFS(killed, os.DirFS(filepath.Dir(o.StateDir))) == nil
	})
	b = start(t, testOptions(t, killed))
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
