package eventlog

import (
	"bytes"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/castrabus/castra/internal/bubble"
)

// goldenDir is a log as format 1 has it: it must be read for ever. It was written
// by TestGolden with CASTRA_GOLDEN=write, which is for a new format only.
var goldenDir = filepath.Join("testdata", "format1")

func goldenOptions(dir string) Options {
	o := testOptions(dir)
	o.SegmentSize, o.PerVM.SegmentSize = 1024, 512
	return o
}

// goldenEntries are the records of the golden log, one write each.
var goldenEntries = []Entry{
	{VM: "web1", Topic: []byte("t"), Payload: []byte(`{"a":1}`)},
	{VM: "web1", Topic: []byte("metrics.cpu"), ID: []byte("x"), Reply: []byte("vm:web1/r"), Payload: []byte(`[1,2.50,1e400,"\u00e9\n"]`)},
	{VM: "host", Topic: []byte("vm:web1"), Payload: []byte(`"for web1"`)},
	{VM: "host", Topic: []byte("vm:web2/sub/topic"), ID: []byte("h-1")},
	{VM: "web2", Topic: []byte("broadcast"), ID: []byte("\"quoted\" \\ é \t"), Payload: []byte(`"é"`)},
	{VM: "host", Topic: []byte("castra.presence"), Payload: []byte(`{"vm":"web1","state":"reachable","reason":null}`)},
	{VM: "web2", Topic: []byte("vm:web2"), ID: []byte("2"), Payload: []byte(`"` + strings.Repeat("long", 100) + `"`)},
	{VM: "web1", Topic: []byte("t"), ID: []byte("y"), Payload: []byte(`18446744073709551616`)},
	{VM: "a.b-c_D", Topic: []byte("a/b:c"), Payload: []byte(`true`)},
}

// tree gives the contents of every file beneath dir.
func tree(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	err := fs.WalkDir(os.DirFS(dir), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		files[path], err = os.ReadFile(filepath.Join(dir, path))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// What is written today is format 1 to the byte.
func TestGolden(t *testing.T) {
	dir := t.TempDir()
	if os.Getenv("CASTRA_GOLDEN") == "write" {
		dir = goldenDir
	}
	bubble.Test(t, func(t *testing.T) { // for its clock, which stands still
		l := mustOpen(t, goldenOptions(dir))
		for _, e := range goldenEntries {
			b := &Batch{Entries: []Entry{e}}
			if err := l.Append(t.Context(), b); err != nil || b.Entries[0].Err != nil {
				t.Fatal(err, b.Entries[0].Err)
			}
		}
		mustClose(t, l)
	})
	got, want := tree(t, dir), tree(t, goldenDir)
	if !slices.Equal(slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want))) {
		t.Errorf("the files are\n%v, want\n%v", slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
	}
	for name := range want {
		if !bytes.Equal(got[name], want[name]) {
			t.Errorf("%s is\n%s\nwant\n%s", name, got[name], want[name])
		}
	}
}

// A log of format 1 is read, checked and continued.
func TestGoldenContinues(t *testing.T) {
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(goldenDir)); err != nil {
		t.Fatal(err)
	}
	before := tree(t, dir)
	o := goldenOptions(dir)
	if got := verify(t, verifyOptions(o)); len(got) > 0 {
		t.Error(got)
	}
	l, rec, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, l)
	if rec.Last != uint64(len(goldenEntries)) || rec.Cut != nil || len(rec.Damaged) > 0 {
		t.Errorf("%+v", rec)
	}
	var want []string
	for i, e := range goldenEntries {
		id, payload := "", string(e.Payload)
		if e.ID != nil {
			id = string(appendQuoted(nil, e.ID))
		}
		if payload == "" {
			payload = "null"
		}
		want = append(want, fmt.Sprintf("%d %s %s %s %s", i+1, e.VM, e.Topic, id, payload))
	}
	if got := readAll(t, l.NewReader(1)); !slices.Equal(got, want) {
		t.Errorf("read\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	r, err := l.NewVMReader("web1", 1)
	if err != nil {
		t.Fatal(err)
	}
	if got := readAll(t, r); len(got) != 4 || got[3] != want[7] {
		t.Errorf("of web1: %q", got)
	}
	for i, e := range goldenEntries {
		if e.ID != nil {
			if got := publish(t, l, e.VM, "t", string(e.ID), "1"); got != uint64(i+1) {
				t.Errorf("a retry of %d is stored as %d", i+1, got)
			}
		}
	}
	if got := publish(t, l, "web1", "t", "", "1"); got != uint64(len(goldenEntries)+1) {
		t.Errorf("the next record is %d", got)
	}
	for name, data := range before {
		if now, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.HasPrefix(now, data) {
			t.Errorf("%s has changed (%v)", name, err)
		}
	}
}
