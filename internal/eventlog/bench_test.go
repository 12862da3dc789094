package eventlog

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

const (
	benchSegment = 64 << 20 // as castrad's default

	// benchLarge is the variable that adds the log of 10 GiB to the benchmarks.
	benchLarge = "CASTRA_BENCH_LARGE"
)

// BenchmarkAppend has so many publishers append a record each, again and again,
// waiting for each to be durable.
func BenchmarkAppend(b *testing.B) {
	for _, publishers := range []int{1, 10, 64, 256, 1000} {
		for _, size := range []int{64, 256, 4 << 10, 32 << 10} {
			b.Run(fmt.Sprintf("publishers=%d/payload=%d", publishers, size), func(b *testing.B) {
				dir := b.TempDir()
				l := openBench(b, Options{Dir: dir, Journal: filepath.Join(dir, "journal"), SegmentSize: benchSegment, Retention: 1 << 30})
				defer closeBench(b, l)
				benchAppend(b, l, publishers, size)
			})
		}
	}
}

func benchAppend(b *testing.B, l *Log, publishers, size int) {
	payload := benchPayload(size)
	took := make([]time.Duration, max(b.N, publishers)) // of each Append
	var next atomic.Int64
	var work sync.WaitGroup
	b.ResetTimer()
	for range publishers {
		work.Go(func() {
			batch := &Batch{Entries: []Entry{{VM: "web1", Topic: []byte("bench.append"), Payload: payload}}}
			for {
				i := next.Add(1) - 1
				if i >= int64(b.N) {
					return
				}
				began := time.Now()
				if err := errors.Join(l.Append(b.Context(), batch), batch.Entries[0].Err); err != nil {
					b.Error(err)
					return
				}
				took[i] = time.Since(began)
			}
		})
	}
	work.Wait()
	b.StopTimer()
	took = took[:b.N]
	slices.Sort(took)
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
	b.ReportMetric(float64(size)*float64(b.N)/b.Elapsed().Seconds()/1e6, "payload-MB/s")
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
}

// BenchmarkReplay reads a log of 512 MiB from its beginning: plain is in pieces of
// 128 KiB as cat does; checksums finds the lines in them, too, and computes the
// checksum of each, which no reader that promises to find damage can do without;
// reader is record by record through a Reader. disk is with nothing of the log in
// the page cache, memory with all of it; recent is what the log itself keeps for
// readers that are nearly up to date. MB/cpu-s is by the processor's time, which on
// a machine that others use as well says more than the clock's.
func BenchmarkReplay(b *testing.B) {
	for _, size := range []int{256, 4 << 10, 32 << 10} {
		dir := b.TempDir()
		total := fillLog(b, dir, 512<<20, size)
		l := openBench(b, Options{Dir: dir, SegmentSize: benchSegment})
		for _, cold := range []bool{true, false} {
			from := "memory"
			if cold {
				from = "disk"
			}
			run := func(how string, read func(*testing.B)) {
				b.Run(fmt.Sprintf("payload=%d/%s/%s", size, from, how), func(b *testing.B) {
					b.SetBytes(total)
					var used time.Duration
					for b.Loop() {
						if cold {
							b.StopTimer()
							dropCache(b, dir)
							b.StartTimer()
						}
						before := processorTime(b)
						read(b)
						used += processorTime(b) - before
					}
					b.ReportMetric(float64(total)*float64(b.N)/used.Seconds()/1e6, "MB/cpu-s")
				})
			}
			run("plain", func(b *testing.B) { readPlainly(b, dir) })
			run("checksums", func(b *testing.B) { readChecked(b, dir) })
			run("reader", func(b *testing.B) { replayAll(b, l, 1) })
		}
		closeBench(b, l)
	}
	b.Run("payload=256/recent/reader", func(b *testing.B) {
		l := openBench(b, Options{Dir: b.TempDir(), SegmentSize: benchSegment, SyncEvery: -1, Recent: 64 << 20})
		defer closeBench(b, l)
		batch := &Batch{Entries: make([]Entry, 1000)}
		for i := range batch.Entries {
			batch.Entries[i] = Entry{VM: "web1", Topic: []byte("bench.replay"), Payload: benchPayload(256)}
		}
		for range 128 {
			if err := l.Append(b.Context(), batch); err != nil {
				b.Fatal(err)
			}
		}
		b.SetBytes(l.c.size)
		for b.Loop() {
			replayAll(b, l, 1)
		}
	})
}

// BenchmarkOpen starts with a log of some size, its newest segment full, which is
// the longest that a start takes, and with nothing of it in the page cache.
func BenchmarkOpen(b *testing.B) {
	for _, log := range benchLogs(b) {
		b.Run(log.name, func(b *testing.B) {
			dir := b.TempDir()
			fillLog(b, filepath.Join(dir, "host"), log.size, 256)
			opts := Options{Dir: filepath.Join(dir, "host"), SegmentSize: benchSegment, PerVM: &PerVMOptions{
				Dir: filepath.Join(dir, "vm"), IDDir: filepath.Join(dir, "ids"), PositionFile: filepath.Join(dir, "position"),
				SegmentSize: 8 << 20, Sender: "host", Owner: func([]byte) ([]byte, bool) { return nil, false },
			}}
			// The VMs' streams are taken to be complete; their copying is not measured.
			if err := os.WriteFile(opts.PerVM.PositionFile, []byte(`{"seq":18446744073709551615}`), filePerm); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				b.StopTimer()
				dropCache(b, opts.Dir)
				b.StartTimer()
				l := openBench(b, opts)
				b.StopTimer()
				l.perVM.opts.PositionFile += ".closed" // the next one is to find it as it was
				closeBench(b, l)
				b.StartTimer()
			}
		})
	}
}

// BenchmarkLookup finds a place in a log: of a time, as --since and `from` do, and
// of a number, up to the record itself. cold is with nothing of the log in the page
// cache.
func BenchmarkLookup(b *testing.B) {
	for _, log := range benchLogs(b) {
		dir := b.TempDir()
		fillLog(b, dir, log.size, 256)
		l := openBench(b, Options{Dir: dir, SegmentSize: benchSegment})
		target := func() uint64 { return 1 + rand.Uint64N(l.Committed()) } //nolint:gosec // any number will do
		since := func(b *testing.B) {
			want := target()
			if got, err := l.FirstSince(benchTime(want)); err != nil || got != want {
				b.Fatalf("the first record since that of %d is %d, %v", want, got, err)
			}
		}
		seq := func(b *testing.B) {
			want := target()
			r := l.NewReader(want)
			defer r.Close()
			var rec Record
			if ok, err := r.Next(&rec); err != nil || !ok || rec.Seq != want {
				b.Fatalf("looking for %d: %v, %d, %v", want, ok, rec.Seq, err)
			}
		}
		for _, how := range []struct {
			name string
			find func(*testing.B)
		}{{"since", since}, {"seq", seq}} {
			b.Run(log.name+"/"+how.name+"/cold", func(b *testing.B) {
				for b.Loop() {
					b.StopTimer()
					dropCache(b, dir)
					b.StartTimer()
					how.find(b)
				}
			})
			b.Run(log.name+"/"+how.name+"/warm", func(b *testing.B) {
				for b.Loop() {
					how.find(b)
				}
			})
		}
		closeBench(b, l)
		if err := os.RemoveAll(dir); err != nil { // 10 GiB at once are enough
			b.Fatal(err)
		}
	}
}

type benchLog struct {
	name string
	size int64
}

// benchLogs gives the sizes of logs to look at, as far as there is room for them.
func benchLogs(b *testing.B) []benchLog {
	logs := []benchLog{{"10MiB", 10 << 20}, {"1GiB", 1 << 30}}
	if os.Getenv(benchLarge) != "" {
		logs = append(logs, benchLog{"10GiB", 10 << 30})
	} else {
		b.Logf("the log of 10 GiB is left out; %s=1 has it too", benchLarge)
	}
	var disk syscall.Statfs_t
	if err := syscall.Statfs(os.TempDir(), &disk); err != nil {
		b.Fatal(err)
	}
	free := int64(disk.Bavail) * disk.Bsize
	return slices.DeleteFunc(logs, func(l benchLog) bool {
		const spare = 2 << 30 // for whoever else is on the disk
		if short := l.size + spare - free; short > 0 {
			b.Logf("the log of %s is left out: %s lacks %d MiB of room; TMPDIR names another place", l.name, os.TempDir(), short>>20)
			return true
		}
		return false
	})
}

func openBench(b *testing.B, opts Options) *Log {
	b.Helper()
	l, _, err := Open(opts)
	if err != nil {
		b.Fatal(err)
	}
	return l
}

func closeBench(b *testing.B, l *Log) {
	b.Helper()
	if err := l.Close(); err != nil {
		b.Fatal(err)
	}
}

// processorTime is what the process has used so far, user's and system's.
func processorTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// benchPayload is a JSON string that takes size bytes.
func benchPayload(size int) []byte {
	p := make([]byte, size)
	for i := range p {
		p[i] = 'a' + byte(i%26)
	}
	p[0], p[size-1] = '"', '"'
	return p
}

// benchTime is when the record seq of fillLog is said to have been written: ten
// thousand a second, so that no two have the same time.
func benchTime(seq uint64) time.Time {
	return time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC).Add(time.Duration(seq) * 100 * time.Microsecond)
}

// fillLog makes a log of at least so many bytes in dir, as the committer would have
// but for its syncs, and gives its size.
func fillLog(b *testing.B, dir string, size int64, payload int) int64 {
	b.Helper()
	if err := os.MkdirAll(dir, dirPerm); err != nil {
		b.Fatal(err)
	}
	e := &Entry{VM: "web1", Topic: []byte("bench.replay"), Payload: benchPayload(payload)}
	total, buf := int64(0), []byte(nil)
	for next := uint64(1); total < size; {
		buf = buf[:0]
		first := next
		for limit := min(benchSegment, size-total); int64(len(buf)) < limit; next++ {
			mark := uint64(0)
			if next%64 == 0 { // as of a committer with so many in each write
				mark = next - 1
			}
			buf = appendRecord(buf, e, next, mark, benchTime(next).Format(timeLayout))
		}
		name := filepath.Join(dir, segmentName(first))
		if err := os.WriteFile(name, buf, filePerm); err != nil {
			b.Fatal(err)
		}
		// A segment's time of change bounds the times in it.
		when := benchTime(next - 1)
		if err := os.Chtimes(name, when, when); err != nil {
			b.Fatal(err)
		}
		total += int64(len(buf))
	}
	dropCache(b, dir) // writes it, too: it must not go on beside what is measured
	return total
}

// dropCache makes the kernel forget what it has in memory of dir's files.
func dropCache(b *testing.B, dir string) {
	b.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*"+segmentSuffix))
	if err != nil {
		b.Fatal(err)
	}
	for _, name := range names {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			b.Fatal(err)
		}
		const dontNeed = 4 // POSIX_FADV_DONTNEED, linux/fadvise.h
		err = f.Sync()     // dirty pages stay
		if err == nil {
			if _, _, errno := syscall.Syscall6(syscall.SYS_FADVISE64, f.Fd(), 0, 0, dontNeed, 0, 0); errno != 0 {
				err = errno
			}
		}
		if err = errors.Join(err, f.Close()); err != nil {
			b.Fatal(err)
		}
	}
}

// readPlainly reads dir's files as cat does.
func readPlainly(b *testing.B, dir string) {
	buf := make([]byte, 128<<10)
	eachFile(b, dir, func(f *os.File) (err error) {
		for err == nil {
			_, err = f.Read(buf)
		}
		return err
	})
}

// readChecked is readPlainly with the checksum of each line.
func readChecked(b *testing.B, dir string) {
	buf := make([]byte, 128<<10)
	eachFile(b, dir, func(f *os.File) (err error) {
		for begun := 0; err == nil; {
			var n int
			n, err = f.Read(buf[begun:])
			rest := buf[:begun+n]
			for i := bytes.IndexByte(rest, '\n'); i >= 0; i = bytes.IndexByte(rest, '\n') {
				checksum = crc32.Checksum(rest[crcCovered:i], castagnoli)
				rest = rest[i+1:]
			}
			begun = copy(buf, rest)
		}
		return err
	})
}

var checksum uint32 // for readChecked's to be used

// eachFile has read read each of dir's segments to io.EOF.
func eachFile(b *testing.B, dir string, read func(*os.File) error) {
	b.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*"+segmentSuffix))
	if err != nil {
		b.Fatal(err)
	}
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			b.Fatal(err)
		}
		err = read(f)
		_ = f.Close() // opened for reading
		if !errors.Is(err, io.EOF) {
			b.Fatal(err)
		}
	}
}

// replayAll reads all records from first on.
func replayAll(b *testing.B, l *Log, first uint64) {
	r := l.NewReader(first)
	defer r.Close()
	var rec Record
	for want := first; ; want++ {
		ok, err := r.Next(&rec)
		if err != nil || ok && rec.Seq != want {
			b.Fatalf("reading record %d: %v, %d, %v", want, ok, rec.Seq, err)
		}
		if !ok {
			if want != l.Committed()+1 {
				b.Fatalf("the log ends before %d", want)
			}
			return
		}
	}
}
