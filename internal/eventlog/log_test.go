package eventlog

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

func testOptions(dir string) Options {
	return Options{
		Dir: filepath.Join(dir, "host"), SegmentSize: 64 << 10, room: smallJournal,
		PerVM: &PerVMOptions{
			Dir: filepath.Join(dir, "vm"), IDDir: filepath.Join(dir, "ids"), PositionFile: filepath.Join(dir, "position"),
			SegmentSize: 64 << 10, Retention: 1 << 20, Sender: "host",
			Owner: func(topic []byte) ([]byte, bool) {
				rest, ok := bytes.CutPrefix(topic, []byte("vm:"))
				name, _, _ := bytes.Cut(rest, []byte("/"))
				return name, ok
			},
		},
	}
}

func mustOpen(t testing.TB, o Options) *Log {
	t.Helper()
	l, _, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func mustClose(t testing.TB, l *Log) {
	t.Helper()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

// publish appends one record and gives its number.
func publish(t testing.TB, l *Log, vm, topic, id, payload string) uint64 {
	t.Helper()
	seq, refused := offer(t, l, vm, topic, id, payload)
	if refused != nil {
		t.Fatal(refused)
	}
	return seq
}

// offer appends one record and gives its number, or why the log refused it.
func offer(t testing.TB, l *Log, vm, topic, id, payload string) (seq uint64, refused error) {
	t.Helper()
	b := &Batch{Entries: []Entry{{VM: vm, Topic: []byte(topic), ID: []byte(id), Payload: []byte(payload)}}}
	if err := l.Append(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	return b.Entries[0].Seq, b.Entries[0].Err
}

// commitOf commits a record of so many bytes and gives why it was refused, in a log
// without goroutines.
func commitOf(l *Log, size int) error {
	b := &Batch{done: make(chan struct{}, 1), Entries: []Entry{{VM: "web1", Topic: []byte("t"), Payload: bytes.Repeat([]byte("1"), size)}}}
	l.commit(b)
	return b.Entries[0].Err
}

// readFirst begins to read a VM's stream, and gives the first record.
func readFirst(t testing.TB, l *Log, vm string) (*Reader, Record) {
	t.Helper()
	r, err := l.NewVMReader(vm, 1)
	if err != nil {
		t.Fatal(err)
	}
	var rec Record
	if ok, err := r.Next(&rec); !ok || err != nil {
		t.Fatal(ok, err)
	}
	return r, rec
}

// readWithGaps reads to the end: numbers, and gaps as "gap FROM-TO".
func readWithGaps(t testing.TB, r *Reader) []string {
	t.Helper()
	var got []string
	for {
		var rec Record
		ok, err := r.Next(&rec)
		gap, gone := errors.AsType[*Gap](err)
		switch {
		case gone:
			got = append(got, fmt.Sprintf("gap %d-%d", gap.From, gap.To))
		case err != nil:
			t.Fatal(err)
		case !ok:
			return got
		default:
			got = append(got, fmt.Sprint(rec.Seq))
		}
	}
}

// readAll reads what is committed from seq on; gaps fail the test.
func readAll(t testing.TB, r *Reader) []string {
	t.Helper()
	defer r.Close()
	var got []string
	var rec Record
	for {
		ok, err := r.Next(&rec)
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			return got
		}
		got = append(got, fmt.Sprintf("%d %s %s %s %s", rec.Seq, rec.VM, rec.Topic, rec.ID, rec.Payload))
	}
}

func TestRestartGoesOn(t *testing.T) {
	o := testOptions(t.TempDir())
	for round := range 5 {
		l := mustOpen(t, o)
		for i := range 100 {
			want := uint64(round*100 + i + 1)
			if got := publish(t, l, "web1", "t", "", fmt.Sprint(i)); got != want {
				t.Fatalf("round %d: seq %d, want %d", round, got, want)
			}
		}
		mustClose(t, l)
	}
	l := mustOpen(t, o)
	defer mustClose(t, l)
	got := readAll(t, l.NewReader(1))
	if len(got) != 500 || got[499] != "500 web1 t  99" {
		t.Fatalf("%d records, the last %q", len(got), got[len(got)-1])
	}
}

func TestReadersFromMemoryAndDisk(t *testing.T) {
	o := testOptions(t.TempDir())
	o.Recent = 16 << 10
	l := mustOpen(t, o)
	defer mustClose(t, l)
	big := `"` + strings.Repeat("x", 1000) + `"`
	for range 500 {
		publish(t, l, "web1", "t", "", big)
	}
	publish(t, l, "web1", "t", "", `"`+strings.Repeat("y", 61000)+`"`)
	for _, from := range []uint64{1, 2, 63, 64, 65, 250, 499, 501} {
		got := readAll(t, l.NewReader(from))
		if len(got) != int(502-from) || !strings.HasPrefix(got[0], fmt.Sprint(from, " ")) {
			t.Errorf("from %d: %d records, the first %.20q", from, len(got), got[0])
		}
	}
	for n, want := range map[uint64]uint64{1: 501, 2: 500, 100: 402, 501: 1, 600: 1} {
		got, err := l.LastMatching(n, func(*Record) (bool, error) { return true, nil })
		if err != nil || got != want {
			t.Errorf("last %d begin at %d, %v; want %d", n, got, err, want)
		}
	}
	segs, err := filepath.Glob(filepath.Join(o.Dir, "*.jsonl"))
	if err != nil || len(segs) < 8 {
		t.Errorf("%d segments, %v", len(segs), err)
	}
	for _, s := range segs {
		if st, err := os.Stat(s); err != nil || st.Size() > o.SegmentSize {
			t.Errorf("%s: %d bytes, %v", s, st.Size(), err)
		}
	}
}

func TestDuplicateIDs(t *testing.T) {
	o := testOptions(t.TempDir())
	l := mustOpen(t, o)
	for i := range 10 {
		publish(t, l, "web1", "t", fmt.Sprint("id", i), "1")
	}
	if got := publish(t, l, "web1", "t", "id3", "2"); got != 4 {
		t.Errorf("a retry got %d, want 4", got)
	}
	if got := publish(t, l, "web2", "t", "id3", "2"); got != 11 {
		t.Errorf("another VM's id got %d, want 11", got)
	}
	mustClose(t, l)
	l = mustOpen(t, o)
	defer mustClose(t, l)
	if got := publish(t, l, "web1", "t", "id9", "2"); got != 10 {
		t.Errorf("a retry after a restart got %d, want 10", got)
	}
	b := &Batch{Entries: []Entry{
		{VM: "web1", Topic: []byte("t"), ID: []byte("new")},
		{VM: "web1", Topic: []byte("t"), ID: []byte("new")},
	}}
	if err := l.Append(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	if e := b.Entries; e[0].Seq != 12 || e[1].Seq != 12 || e[0].Duplicate || !e[1].Duplicate {
		t.Errorf("twice in one batch: %+v", e)
	}
}

func TestPerVMStreams(t *testing.T) {
	o := testOptions(t.TempDir())
	l := mustOpen(t, o)
	for i := range 50 {
		publish(t, l, "web1", "a", "", fmt.Sprint(i))
		publish(t, l, "web2", "b", "", fmt.Sprint(i))
		publish(t, l, "host", "vm:web1", "", fmt.Sprint(i))
		publish(t, l, "host", "vm:web1/x", "", fmt.Sprint(i))
		publish(t, l, "host", "broadcast", "", fmt.Sprint(i))
	}
	mustClose(t, l)
	data, err := os.ReadFile(filepath.Join(o.PerVM.Dir, "web1", segmentName(1)))
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(data, []byte("\n")); n != 150 {
		t.Errorf("web1's stream has %d records, want 150", n)
	}
	// Repair: a stream that lost its end, as a crash leaves it.
	if err := os.WriteFile(filepath.Join(o.PerVM.Dir, "web1", segmentName(1)), data[:len(data)-10], 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(o.PerVM.PositionFile); err != nil {
		t.Fatal(err)
	}
	l = mustOpen(t, o)
	defer mustClose(t, l)
	again, err := os.ReadFile(filepath.Join(o.PerVM.Dir, "web1", segmentName(1)))
	if err != nil || !bytes.Equal(again, data) {
		t.Errorf("repaired: %d bytes, %v; want %d", len(again), err, len(data))
	}
	r, err := l.NewVMReader("web1", 0)
	if err != nil {
		t.Fatal(err)
	}
	if got := readAll(t, r); len(got) != 150 {
		t.Errorf("%d records read from web1's stream, want 150", len(got))
	}
	seq, err := l.LastMatchingOf("web1", 3, func(r *Record) (bool, error) { return string(r.Topic) == "vm:web1", nil })
	if err != nil || seq != 238 {
		t.Errorf("the last 3 of vm:web1 begin at %d, %v; want 238", seq, err)
	}
}

// However many records are copied at once, a VM's segments are full ones.
func TestPerVMSegmentsAreFull(t *testing.T) {
	o := testOptions(t.TempDir())
	o.PerVM.Retention = 0
	l := mustOpen(t, o)
	b := &Batch{}
	for i := range 2000 {
		b.Entries = append(b.Entries, Entry{VM: "web1", Topic: []byte("t"), Payload: fmt.Appendf(nil, "%q", strings.Repeat("x", 100+i%50))})
	}
	if err := l.Append(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	mustClose(t, l)
	files, err := filepath.Glob(filepath.Join(o.PerVM.Dir, "web1", "*.jsonl"))
	if err != nil || len(files) < 5 {
		t.Fatal(files, err)
	}
	for _, f := range files[:len(files)-1] {
		if st, err := os.Stat(f); err != nil || st.Size() > o.PerVM.SegmentSize || st.Size() < o.PerVM.SegmentSize-400 {
			t.Errorf("%s has %d bytes, %v", f, st.Size(), err)
		}
	}
}

func TestRetentionGivesGap(t *testing.T) {
	o := testOptions(t.TempDir())
	o.Retention, o.Recent = 256<<10, 1
	l := mustOpen(t, o)
	defer mustClose(t, l)
	r := l.NewReader(1)
	defer r.Close()
	big := `"` + strings.Repeat("x", 1000) + `"`
	for range 1000 {
		publish(t, l, "web1", "t", "", big)
	}
	waitFor(t, "web1's stream has what goes, and it is gone", func() bool {
		files, _ := filepath.Glob(filepath.Join(o.Dir, "*.jsonl"))
		var size int64
		for _, f := range files {
			if st, err := os.Stat(f); err == nil {
				size += st.Size()
			}
		}
		return size <= o.Retention+o.SegmentSize
	})
	var rec Record
	_, err := r.Next(&rec)
	var gap *Gap
	if !errors.As(err, &gap) || gap.From != 1 || gap.To != l.Oldest()-1 {
		t.Fatalf("got %v, want a gap from 1 to %d", err, l.Oldest()-1)
	}
	if ok, err := r.Next(&rec); !ok || err != nil || rec.Seq != gap.To+1 {
		t.Fatalf("behind the gap: %d, %v, %v", rec.Seq, ok, err)
	}
}

func TestManyPublishers(t *testing.T) {
	l := mustOpen(t, testOptions(t.TempDir()))
	defer mustClose(t, l)
	var wg sync.WaitGroup
	for p := range 16 {
		wg.Go(func() {
			b := &Batch{}
			for i := range 200 {
				b.Entries = append(b.Entries[:0],
					Entry{VM: fmt.Sprint("vm", p), Topic: []byte("t"), Payload: fmt.Append(nil, 2*i)},
					Entry{VM: fmt.Sprint("vm", p), Topic: []byte("t"), Payload: fmt.Append(nil, 2*i+1)})
				if err := l.Append(t.Context(), b); err != nil || b.Entries[0].Err != nil || b.Entries[1].Seq <= b.Entries[0].Seq {
					t.Error(err, b.Entries)
					return
				}
			}
		})
	}
	wg.Wait()
	next := map[string]int{}
	for i, line := range readAll(t, l.NewReader(1)) {
		var seq, n int
		var vm, topic string
		if _, err := fmt.Sscan(line, &seq, &vm, &topic, &n); err != nil || seq != i+1 || next[vm] != n {
			t.Fatalf("record %d is %q, want number %d of %s", i+1, line, next[vm], vm)
		}
		next[vm]++
	}
	if len(next) != 16 {
		t.Fatalf("%d publishers", len(next))
	}
}

// Publishers that commit themselves, and others that have it done, take turns: every
// record is told of once, in order, and each time it is known who did it.
func TestAppendHere(t *testing.T) {
	o := testOptions(t.TempDir())
	var told uint64 // of who commits
	led := map[bool]int{}
	o.OnCommit = func(c Commit) {
		if c.c.first != told+1 {
			t.Errorf("%d is told of behind %d", c.c.first, told)
		}
		told = c.c.last()
		led[c.Led()]++
	}
	l := mustOpen(t, o)
	var here atomic.Int32
	var wg sync.WaitGroup
	publish := func(vm string, commit func(b *Batch) error) {
		b := &Batch{}
		for i := range 500 {
			b.Entries = []Entry{{VM: vm, Topic: []byte("t"), Payload: fmt.Append(nil, i)}}
			if err := commit(b); err != nil || b.Entries[0].Err != nil {
				t.Error(err, b.Entries[0].Err)
			}
		}
	}
	for p := range 8 {
		wg.Go(func() {
			publish(fmt.Sprint("vm", p), func(b *Batch) error {
				if p%2 == 0 {
					return l.Append(t.Context(), b)
				}
				led, err := l.AppendHere(t.Context(), b, func() { t.Error("nothing stalled") })
				if led {
					here.Add(1)
				}
				return err
			})
		})
	}
	wg.Wait()
	own := &Batch{Entries: []Entry{{VM: "vm0", Topic: []byte("t")}}}
	waitFor(t, "one that is alone does it himself", func() bool { // the committer may not have ended its round
		led, err := l.AppendHere(t.Context(), own, nil)
		return led && err == nil
	})
	mustClose(t, l)                                                                     // all is told of by then
	if told != own.Entries[0].Seq || led[true] <= int(here.Load()) || led[false] == 0 { // one that fills a segment is told of twice
		t.Errorf("told of %d, in commits %v, %d of them led and one alone", told, led, here.Load())
	}
	if led, err := l.AppendHere(t.Context(), own, nil); led || !errors.Is(err, ErrClosed) {
		t.Errorf("closed: %v, %v", led, err)
	}
}

// Who publishes himself does not go before what waits for the committer: it may be of the
// same VM, which was told that its disk stalls, or has come back by another connection.
func TestAppendHereKeepsOrder(t *testing.T) {
	for _, taken := range []bool{false, true} {
		l, _, err := open(Options{Dir: t.TempDir(), SegmentSize: 1 << 20}) // no committer yet
		if err != nil {
			t.Fatal(err)
		}
		first, second := &Batch{Entries: []Entry{{VM: "a", Topic: []byte("t")}}}, &Batch{Entries: []Entry{{VM: "a", Topic: []byte("t")}}}
		if err := l.enqueue(t.Context(), first, l.gate.Load()); err != nil {
			t.Fatal(err)
		}
		waiting := 2
		if taken { // the committer has it, and not yet its turn
			first, waiting = <-l.queue, 1
		}
		done := make(chan error, 1)
		go func() {
			_, err := l.AppendHere(t.Context(), second, nil)
			done <- err
		}()
		waitFor(t, "it waits, or is committed", func() bool { return len(l.queue) == waiting || l.Committed() > 0 })
		if taken {
			l.commitQueued(first)
		}
		go l.run()
		go l.reportState()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		<-first.Done()
		mustClose(t, l)
		if a, b := first.Entries[0].Seq, second.Entries[0].Seq; a != 1 || b != 2 {
			t.Errorf("taken %v: what was published first is %d, and second %d", taken, a, b)
		}
	}
}
