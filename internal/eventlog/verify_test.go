package eventlog

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// verifyOptions are what Verify is to look at of a log with o.
func verifyOptions(o Options) VerifyOptions {
	return VerifyOptions{Dir: o.Dir, VMDir: o.PerVM.Dir, Sender: "host", Owner: o.PerVM.Owner, window: 7}
}

// verify gives the findings as "kind file:offset from-to", files beneath dir.
func verify(t testing.TB, o VerifyOptions) []string {
	t.Helper()
	var got []string
	sum, err := Verify(o, func(f Finding) {
		name := strings.TrimPrefix(f.File, filepath.Dir(o.Dir)+"/")
		got = append(got, fmt.Sprintf("%s %s:%d+%d %d-%d", f.Kind, name, f.Offset, f.Bytes, f.From, f.To))
		if f.What == "" {
			t.Errorf("%s is not explained", f.Kind)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if sum.Streams == 0 {
		t.Errorf("%+v", sum)
	}
	return got
}

// verifyLog makes a log with several segments in the host stream and in web1's.
// Each line of it has 150 bytes: 27 fit a segment.
func verifyLog(t testing.TB) Options {
	t.Helper()
	o := testOptions(t.TempDir())
	o.SegmentSize, o.PerVM.SegmentSize = 4096, 4096
	l := mustOpen(t, o)
	add := func(vm, topic string) {
		pad := ""
		for range 2 { // a line's length depends on the widths of its numbers
			next := l.Committed() + 1
			e := Entry{VM: vm, Topic: []byte(topic), Payload: fmt.Appendf(nil, "%q", pad)}
			pad = strings.Repeat("x", 150-len(appendRecord(nil, &e, next, next-1, time.Now().UTC().Format(timeLayout)))+len(pad))
		}
		publish(t, l, vm, topic, "", fmt.Sprintf("%q", pad))
	}
	for range 20 {
		add("web1", "t")
		add("host", "vm:web1/x")
		add("web2", "t")
		add("host", "t")
	}
	mustClose(t, l)
	return o
}

func TestVerify(t *testing.T) {
	const (
		line = 150
		host = "host/00000000000000000001.jsonl"
		web1 = "vm/web1/00000000000000000001.jsonl"
		web2 = "vm/web2/00000000000000000003.jsonl"
	)
	edit := func(file string, change func(b []byte) []byte) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			path := filepath.Join(dir, file)
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, change(b), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	flip := func(at int) func([]byte) []byte {
		return func(b []byte) []byte { b[at] ^= 4; return b }
	}
	cutOut := func(from, to int) func([]byte) []byte {
		return func(b []byte) []byte { return slices.Delete(b, from, to) }
	}
	record := func(seq uint64, vm, topic string) string {
		return string(appendRecord(nil, &Entry{VM: vm, Topic: []byte(topic)}, seq, 0, "2026-11-23T21:03:00.123456Z"))
	}
	add := func(text string) func([]byte) []byte {
		return func(b []byte) []byte { return append(b, text...) }
	}
	remove := func(t *testing.T, dir, file string) {
		if err := os.Remove(filepath.Join(dir, file)); err != nil {
			t.Fatal(err)
		}
	}
	write := func(file string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			if err := os.WriteFile(filepath.Join(dir, file), []byte("abc"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	tests := []struct {
		name   string
		change func(t *testing.T, dir string)
		want   []string // "" for a length: not compared
	}{
		{"nothing", func(*testing.T, string) {}, nil},
		{"a flipped bit", edit(host, flip(2*line+100)), []string{"bad-checksum " + host + ":300+150 0-0", "hole " + host + ":450+0 3-3"}},
		{"a flipped newline", edit(host, flip(3*line-1)), []string{"bad-checksum " + host + ":300+300 0-0", "hole " + host + ":600+0 3-4"}},
		{"the last newline of a sealed segment", edit(host, flip(27*line-1)), []string{"cut-short " + host + ":3900+150 0-0", "hole " + host + ":4050+0 27-27"}},
		{"the last newline of all", edit("host/00000000000000000055.jsonl", flip(26*line-1)), []string{"cut-short host/00000000000000000055.jsonl:3750+150 0-0"}},
		{"no record", edit(host, func(b []byte) []byte { copy(b[line:], "xyz"); return b }), []string{"not-a-record " + host + ":150+150 0-0", "hole " + host + ":300+0 2-2"}},
		{"NULs", edit(host, func(b []byte) []byte { clear(b[line : 3*line]); return b }), []string{"nul-bytes " + host + ":150+450 0-0", "hole " + host + ":600+0 2-4"}},
		{"NULs at the end", edit("host/00000000000000000055.jsonl", add(strings.Repeat("\x00", 2<<20))), []string{"nul-bytes host/00000000000000000055.jsonl:3900+2097152 0-0"}},
		{"a line cut out", edit(host, cutOut(4*line, 6*line)), []string{"hole " + host + ":600+0 5-6"}},
		{"the last line of a sealed segment cut out", edit(host, cutOut(26*line, 27*line)), []string{"hole " + host + ":3900+0 27-27"}},
		{"a line twice", edit(host, func(b []byte) []byte { return slices.Insert(b, line, b[:line]...) }), []string{"out-of-order " + host + ":150+150 1-1"}},
		{"a segment gone", func(t *testing.T, dir string) { remove(t, dir, "host/00000000000000000028.jsonl") }, []string{"hole " + host + ":4050+0 28-54"}},
		{"the oldest segment gone", func(t *testing.T, dir string) { remove(t, dir, host) }, nil},
		{"void records", edit(host, add(record(28, "web1", "t")+record(29, "web1", "t")[:50])), []string{"void " + host + ":4050+154 0-0"}},
		{"an unfinished write", edit("host/00000000000000000055.jsonl", add(record(81, "web1", "t")[:50])), []string{"unfinished-tail host/00000000000000000055.jsonl:3900+50 0-0"}},
		{"a directory for a segment", func(t *testing.T, dir string) {
			if err := os.Mkdir(filepath.Join(dir, "host", segmentName(9)), 0o700); err != nil {
				t.Fatal(err)
			}
		}, []string{"foreign host/00000000000000000009.jsonl:0+0 0-0"}},
		{"kept aside", write(host + ".cut-1"), []string{"cut-aside " + host + ".cut-1:0+3 0-0"}},
		{"a copy", write(host + ".bak"), []string{"foreign " + host + ".bak:0+0 0-0"}},
		{"a file among the VMs", write("vm/x"), []string{"foreign vm/x:0+0 0-0"}},
		{"no segments", func(t *testing.T, dir string) {
			for _, first := range []uint64{1, 28, 55} {
				remove(t, dir, filepath.Join("host", segmentName(first)))
			}
			remove(t, dir, web1)
			remove(t, dir, "vm/web1/00000000000000000054.jsonl")
			edit(web2, func(b []byte) []byte { return b[:line] })(t, dir)
		}, []string{"not-in-host-stream " + web2 + ":0+150 3-3"}},
		{"a flipped bit in a VM's", edit(web1, flip(line+100)), []string{"bad-checksum " + web1 + ":150+150 0-0"}},
		{"a line cut out of a VM's", edit(web1, cutOut(line, 2*line)), []string{"missing vm/web1:0+0 2-2"}},
		{"two lines cut out of a VM's", edit(web1, cutOut(2*line, 4*line)), []string{"missing vm/web1:0+0 1-7"}},
		{"a VM's tail", edit(web2, add("{")), []string{"unfinished-tail " + web2 + ":3000+1 0-0"}},
		{"another record", edit(web2, func(b []byte) []byte { return append([]byte(record(3, "web2", "t")), b[line:]...) }), []string{"differs-from-host " + web2 + ":0+103 3-3"}},
		{"another VM's record", edit(web2, add(record(80, "web1", "t"))), []string{"wrong-stream " + web2 + ":3000+104 80-80"}},
		{"a record beyond the host's", edit(web2, add(record(81, "web2", "t"))), []string{"not-in-host-stream " + web2 + ":3000+104 81-81"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o := verifyLog(t)
			tt.change(t, filepath.Dir(o.Dir))
			if got := verify(t, verifyOptions(o)); !slices.Equal(got, tt.want) {
				t.Errorf("got\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(tt.want, "\n\t"))
			}
		})
	}
}

// A bit flipped in any byte of a sealed segment is found, with file and line.
func TestVerifyFlippedBits(t *testing.T) {
	o := verifyLog(t)
	for _, path := range []string{filepath.Join(o.Dir, segmentName(1)), filepath.Join(o.PerVM.Dir, "web1", segmentName(1))} {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		set := func(at int, b byte) {
			if _, err := f.WriteAt([]byte{b}, int64(at)); err != nil {
				t.Fatal(err)
			}
		}
		for at, b := range data {
			if at > 3*150 && at < len(data)-2*150 {
				continue // more of the same
			}
			set(at, b^1<<(at%8))
			found := false
			if _, err := Verify(verifyOptions(o), func(f Finding) {
				found = found || f.Damage && f.File == path && f.Offset <= int64(at) && int64(at) < f.Offset+f.Bytes
			}); err != nil || !found {
				t.Fatalf("%s: a flipped bit in byte %d is not found (%v)", path, at, err)
			}
			set(at, b)
		}
	}
}

// slowWriter ends a line when its file is opened a second time.
type slowWriter struct {
	FS
	file  string
	opens int
	rest  []byte
	t     *testing.T
}

func (w *slowWriter) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	f, err := w.FS.OpenFile(name, flag, perm)
	if err != nil || name != w.file {
		return f, err
	}
	if w.opens++; w.opens == 2 {
		out, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			w.t.Fatal(err)
		}
		defer out.Close()
		if _, err := out.Write(w.rest); err != nil {
			w.t.Fatal(err)
		}
	}
	return f, nil
}

// A line that is just being written is no unfinished one.
func TestVerifyGrowingLine(t *testing.T) {
	o := verifyLog(t)
	path := filepath.Join(o.Dir, segmentName(55))
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	cut := len(data) - 70
	if err := os.WriteFile(path, data[:cut], 0o600); err != nil {
		t.Fatal(err)
	}
	vo := verifyOptions(o)
	vo.window = 0 // so that the file is read at once
	vo.FS = &slowWriter{FS: OS, file: path, rest: data[cut:], t: t}
	if got := verify(t, vo); len(got) > 0 {
		t.Error(got)
	}
}

// Beside a log that is being written, rotated and expired nothing is wrong.
func TestVerifyBesideWriting(t *testing.T) {
	o := testOptions(t.TempDir())
	o.SegmentSize, o.Retention = 16<<10, 64<<10
	o.PerVM.SegmentSize, o.PerVM.Retention = 4<<10, 16<<10
	l := mustOpen(t, o)
	defer mustClose(t, l)
	publish(t, l, "web1", "t", "", "1")
	var work sync.WaitGroup
	defer work.Wait()
	for p := range 4 {
		work.Go(func() {
			for i := range 1500 {
				publish(t, l, fmt.Sprint("web", p), "t", "", fmt.Sprint(i))
			}
		})
	}
	vo := verifyOptions(o)
	vo.window = 0
	for l.Committed() < 5000 {
		if got := verify(t, vo); len(got) > 0 {
			t.Fatal(got)
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	o := testOptions(b.TempDir())
	o.SegmentSize, o.PerVM.SegmentSize, o.PerVM.Retention = 64<<20, 8<<20, 0
	o.SyncEvery = -1
	l := mustOpen(b, o)
	batch := &Batch{}
	for i := range 512 {
		batch.Entries = append(batch.Entries, Entry{VM: fmt.Sprint("web", i%64), Topic: []byte("t"), Payload: []byte(`"` + strings.Repeat("x", 256) + `"`)})
	}
	for range 1000 {
		if err := l.Append(b.Context(), batch); err != nil {
			b.Fatal(err)
		}
	}
	mustClose(b, l)
	vo := verifyOptions(o)
	vo.window = 0
	for b.Loop() {
		sum, err := Verify(vo, func(f Finding) { b.Fatal(f) })
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(sum.Bytes)
	}
}
