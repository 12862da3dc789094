package eventlog

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func seedRecord(seq, synced uint64) []byte {
	return appendRecord(nil, &Entry{VM: "web1", Topic: []byte("t"), ID: []byte("i\x01ä"), Reply: []byte("r"), Payload: []byte(`{"a":1}`)}, seq, synced, "2026-11-23T21:03:00.123456Z")
}

// FuzzRecord takes whatever line apart, once as it is and once with the checksum
// that its bytes have: what is a record then is one to jq too.
func FuzzRecord(f *testing.F) {
	for _, line := range [][]byte{seedRecord(1, 0), seedRecord(18446744073709551615, 41), []byte(`{"crc":"00000000",`), []byte(`{"crc":"00000000","seq":1,"time":"","vm":"","topic":"","id":"\`), nil} {
		f.Add(bytes.TrimSuffix(line, []byte("\n")))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		var rec Record
		if parseRecord(line, &rec, true) == nil {
			checkRecord(t, &rec)
		}
		if parseRecord(line, &rec, false) == nil && !bytes.HasSuffix(line, rec.Body) {
			t.Errorf("%q has the body %q", line, rec.Body)
		}
	})
}

func checkRecord(t *testing.T, rec *Record) {
	t.Helper()
	if rec.Seq == 0 || len(rec.Payload) == 0 || !bytes.HasSuffix(rec.Line, rec.Body) {
		t.Errorf("%q gives %+v", rec.Line, rec)
	}
	rec.When()
}

// FuzzScanTail recovers whatever bytes as the newest segment: it keeps a beginning
// of them, in which numbers rise, and a second look finds the same.
func FuzzScanTail(f *testing.F) {
	whole := append(seedRecord(1, 0), seedRecord(2, 1)...)
	f.Add(whole)
	f.Add(append(bytes.Clone(whole), seedRecord(3, 2)[:20]...))
	f.Add(append(append(bytes.Clone(whole), "damage\n"...), seedRecord(4, 3)...))
	f.Add(append(bytes.Clone(whole), seedRecord(2, 0)...))
	f.Add(append(bytes.Clone(whole), make([]byte, 4096)...))
	f.Add(append(seedRecord(9, 8), whole...))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		path := filepath.Join(dir, "segment")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		file, err := OS.OpenFile(path, os.O_RDONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		got, err := scanTail(file, int64(len(data)), 1, 0)
		if err != nil || got.end < 0 || got.end > int64(len(data)) || got.end > 0 && data[got.end-1] != '\n' {
			t.Fatalf("%+v, %v of %d bytes", got, err, len(data))
		}
		for _, off := range got.damaged {
			if off < 0 || off >= got.end {
				t.Errorf("damage at %d, and the end is %d", off, got.end)
			}
		}
		again, err := scanTail(file, got.end, 1, 0)
		if err != nil || again.end != got.end || again.last != got.last {
			t.Errorf("%+v, and of what was kept %+v, %v", got, again, err)
		}
		if _, end, err := lastRecord(file, int64(len(data))); err != nil || end > int64(len(data)) {
			t.Errorf("the last record ends at %d, %v", end, err)
		}
	})
}

// FuzzIDs reads whatever bytes as a VM's ids.
func FuzzIDs(f *testing.F) {
	f.Add(bytes.Repeat([]byte{0, 1}, idEntry))
	f.Add(make([]byte, idEntry))
	f.Add([]byte("short"))
	f.Add(append(append(make([]byte, idHash), 0, 0, 0, 0, 0, 0, 0, 1), append(make([]byte, idHash), 0, 0, 0, 0, 0, 0, 0, 2)...))
	dir := f.TempDir()
	path := filepath.Join(dir, "x.ids")
	ids := newIDIndex(OS, dir, 0, nil)
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := ids.read("x", idWindow)
		if err != nil || len(got)%idEntry != 0 || !bytes.Contains(data, got) {
			t.Errorf("%d bytes of %d, %v", len(got), len(data), err)
		}
	})
}

// FuzzQuoted writes whatever id as JSON, which ends where it is said to.
func FuzzQuoted(f *testing.F) {
	for _, id := range []string{"a", `"`, `\`, "\x00", "ä", "\u2028", ""} {
		f.Add([]byte(id))
	}
	f.Fuzz(func(t *testing.T, id []byte) {
		q := appendQuoted(nil, id)
		var s string
		if end := quotedEnd(append(bytes.Clone(q), `,"x"`...)); end != len(q) || json.Unmarshal(q, &s) != nil {
			t.Errorf("%q is quoted as %q, which ends at %d", id, q, end)
		}
	})
}

// FuzzSegment reads whatever bytes as a sealed segment: numbers rise, each search
// ends, what is behind the damage is reached, and Verify takes it all in.
func FuzzSegment(f *testing.F) {
	whole := append(seedRecord(1, 0), seedRecord(2, 1)...)
	f.Add(whole)
	f.Add(append(bytes.Clone(whole), "damage\n"...))
	f.Add(append(append([]byte("damage\n"), whole...), seedRecord(7, 2)[:30]...))
	f.Add(append(bytes.Clone(whole), append(make([]byte, 4096), seedRecord(5, 2)...)...))
	f.Add(append(bytes.Repeat([]byte("x"), cursorBuffer+7), append([]byte("\n"), whole...)...))
	f.Add(append(seedRecord(200, 1), seedRecord(3, 2)...))
	const behind = 100
	dir := f.TempDir()
	if err := os.WriteFile(filepath.Join(dir, segmentName(behind)), seedRecord(behind, behind-1), 0o600); err != nil {
		f.Fatal(err)
	}
	all := func(*Record) (bool, error) { return true, nil }
	owner := testOptions(dir).PerVM.Owner
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(filepath.Join(dir, segmentName(1)), data, 0o600); err != nil {
			t.Fatal(err)
		}
		st := &stream{fs: OS, dir: dir}
		if err := st.load(); err != nil {
			t.Fatal(err)
		}
		c := &cursor{st: st}
		defer c.close()
		last := uint64(0)
		for {
			var rec Record
			err := c.read(&rec)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil || rec.Seq <= last || rec.Seq > behind {
				t.Fatalf("behind %d comes %d, %v", last, rec.Seq, err)
			}
			checkRecord(t, &rec)
			last = rec.Seq
		}
		if last != behind {
			t.Errorf("the last record is %d", last)
		}
		if seq, err := st.lastMatching(1000, behind, all); err != nil || seq == 0 || seq > behind {
			t.Errorf("of the last ones the first is %d, %v", seq, err)
		}
		if seq, ok, err := st.firstSince(time.Unix(0, 0)); err != nil || !ok || seq == 0 || seq > behind {
			t.Errorf("the first record is %d, %v, %v", seq, ok, err)
		}
		if _, err := Verify(VerifyOptions{Dir: dir, Sender: "host", Owner: owner}, func(Finding) {}); err != nil {
			t.Error(err)
		}
	})
}

// FuzzPosition reads whatever bytes as the note of how far the VMs' streams are: what
// it does not understand it takes for the beginning.
func FuzzPosition(f *testing.F) {
	for _, text := range []string{`{"seq":7}`, `{"seq":7,"lazy":true}`, `{"seq":-1}`, `{"seq":18446744073709551616}`, `{}`, `null`, "[", "", "\x00", `{"seq":7}x`, `{"seq":7` + strings.Repeat(" ", 64) + "}"} {
		f.Add([]byte(text))
	}
	path := filepath.Join(f.TempDir(), "position")
	o := &PerVMOptions{PositionFile: path}
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		pos, err := o.loadPosition(OS)
		if err != nil || !json.Valid(data) && pos != (savedPosition{}) && len(data) <= 64 {
			t.Errorf("%q is %+v, %v", data, pos, err)
		}
	})
}
