package eventlog

import (
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// writeTo makes data all that there is in the file path.
func writeTo(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, filePerm); err != nil {
		t.Fatal(err)
	}
}

func idsAs(entries ...idSeq) (b []byte) {
	for _, e := range entries {
		b = binary.BigEndian.AppendUint64(append(b, e.key[:]...), e.seq)
	}
	return b
}

// A power cut may leave an id with the first bytes of its number alone, which is that of an
// older record then. It is not what a retry is told.
func TestTornIDs(t *testing.T) {
	a, b, none := hashID([]byte("a")), hashID([]byte("b")), hashID([]byte("none"))
	fill := `"` + strings.Repeat("x", 1000) + `"`
	for name, c := range map[string]struct {
		ids     []byte
		lazy    bool
		expired bool // the record of the id that is whole
	}{
		"of a record that is there":               {ids: idsAs(idSeq{a, 1}, idSeq{b, 256})},
		"of a record that is lost":                {ids: idsAs(idSeq{a, 1}, idSeq{none, 256}), lazy: true},
		"several":                                 {ids: idsAs(idSeq{a, 1}, idSeq{b, 256}, idSeq{none, 260})},
		"the hash as well":                        {ids: idsAs(idSeq{a, 1}, idSeq{idKey{1, 2}, 256})},
		"behind one whose record has expired":     {ids: idsAs(idSeq{a, 1}, idSeq{b, 256}), expired: true},
		"none, and the newest record has expired": {ids: idsAs(idSeq{a, 1}), expired: true},
	} {
		t.Run(name, func(t *testing.T) {
			o := testOptions(t.TempDir())
			if c.lazy {
				o.SyncEvery = -1
			}
			l := mustOpen(t, o)
			publish(t, l, "web1", "t", "a", "1")
			for l.Committed() < 300 {
				id := ""
				if l.Committed() == 255 {
					id = "b" // another VM's is none of web1's
				}
				publish(t, l, "web2", "t", id, fill)
			}
			if !c.lazy {
				publish(t, l, "web1", "t", "b", "1")
			}
			mustClose(t, l)
			writeTo(t, l.perVM.ids.path("web1"), c.ids)
			writeTo(t, o.PerVM.PositionFile, []byte(`{"seq":300}`))
			if c.expired {
				if err := os.Remove(filepath.Join(o.Dir, segmentName(1))); err != nil {
					t.Fatal(err)
				}
			}
			l = mustOpen(t, o)
			defer mustClose(t, l)
			for _, want := range []struct {
				id  string
				seq uint64
			}{{"a", 1}, {"b", 301}, {"none", 302}} {
				if got := publish(t, l, "web1", "t", want.id, "1"); got != want.seq {
					t.Errorf("the id %s is acknowledged as %d, want %d", want.id, got, want.seq)
				}
			}
		})
	}
}

// loseUnsynced takes from the files below dir what was not synced.
func loseUnsynced(t *testing.T, disk *simDisk, dir string) {
	t.Helper()
	d := nodeOf(t, disk, dir)
	for name, n := range d.names {
		if d.durableNames[name] != n {
			t.Fatalf("the name of %s is not synced", name)
		}
		if n.dir {
			loseUnsynced(t, disk, filepath.Join(dir, name))
		} else {
			n.pending, n.data = nil, append([]byte(nil), n.durable...)
		}
	}
}

// A start of a log that lost records cuts the VMs' files, and may be killed before it has
// synced that. The next one finds them as they should be, and makes that durable before it
// saves that they are.
func TestCutByAStartThatWasKilled(t *testing.T) {
	disk := newSimDisk(rand.New(rand.NewPCG(1, 1)))
	o := testOptions("/log")
	o.FS, o.SyncEvery = disk, 1<<40
	start := func() *Log {
		l, _, err := open(o)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	store := func(l *Log, vm, id string) {
		b := &Batch{done: make(chan struct{}, 1), Entries: []Entry{{VM: vm, Topic: []byte("t"), ID: []byte(id)}}}
		if err := l.perVM.ids.acquire(t.Context(), b); err != nil {
			t.Fatal(err)
		}
		l.commit(b)
		if err := errors.Join(b.Entries[0].Err, l.perVM.copyNew()); err != nil {
			t.Fatal(err)
		}
	}
	l := start()
	store(l, "web1", "a")
	l.syncLazily()
	store(l, "web1", "b")
	if err := l.perVM.checkpoint(); err != nil {
		t.Fatal(err)
	}
	loseUnsynced(t, disk, o.Dir) // the record 2

	cut := 0
	disk.fault = func(op, path string) error {
		if op == "truncate" {
			cut++
		}
		if op == "sync" && strings.Contains(path, "/vm/") {
			panic(errPowerCut)
		}
		return nil
	}
	killedIn(t, func() { start() })
	if disk.fault = nil; cut != 2 {
		t.Fatalf("%d files were cut", cut)
	}
	l = start()
	store(l, "web2", "c")
	if err := l.finish(); err != nil {
		t.Fatal(err)
	}
	loseUnsynced(t, disk, o.PerVM.Dir)
	loseUnsynced(t, disk, o.PerVM.IDDir)

	l = start()
	if seq, err := lookup(l, "web1", "b"); err != nil || seq != 0 {
		t.Errorf("the id of a record that is lost is looked up as %d, %v", seq, err)
	}
	st := &stream{fs: disk, dir: filepath.Join(o.PerVM.Dir, "web1")}
	if err := st.load(); err != nil {
		t.Fatal(err)
	}
	r := &cursor{st: st, next: 2}
	defer r.close()
	var rec Record
	if err := r.read(&rec); !errors.Is(err, io.EOF) {
		t.Errorf("the stream of web1 still has %d, %v", rec.Seq, err)
	}
}
