package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/castrabus/castra/internal/bubble"
	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/wire"
)

// badFS is the machine's file system over a disk that can fail, block, and lose what
// was not synced.
type badFS struct {
	eventlog.FS
	write, sync, create atomic.Pointer[error]
	blocked             atomic.Pointer[chan struct{}] // syncs wait for it
	syncs               atomic.Int64

	mu     sync.Mutex
	synced map[string]int64 // by path: the size that a power cut leaves
	cut    bool             // nothing is done any more
}

func newBadFS() *badFS { return &badFS{FS: eventlog.OS, synced: make(map[string]int64)} }

var errPowerCut = errors.New("the power is off")

func (b *badFS) off() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.cut
}

func (b *badFS) OpenFile(name string, flag int, perm fs.FileMode) (eventlog.File, error) {
	if b.off() {
		return nil, errPowerCut
	}
	if err := b.create.Load(); err != nil && flag&os.O_CREATE != 0 {
		return nil, *err
	}
	f, err := b.FS.OpenFile(name, flag, perm)
	if err != nil {
		return nil, err
	}
	return &badFile{f, b, name}, nil
}

// SyncDir takes no time: which names a power cut takes away is for eventlog's tests.
func (b *badFS) SyncDir(string) error {
	if b.off() {
		return errPowerCut
	}
	return nil
}

func (b *badFS) Rename(from, to string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cut {
		return errPowerCut
	}
	b.synced[to] = b.synced[from]
	delete(b.synced, from)
	return b.FS.Rename(from, to)
}

func (b *badFS) Remove(name string) error {
	if b.off() {
		return errPowerCut
	}
	return b.FS.Remove(name)
}

type badFile struct {
	eventlog.File
	fs   *badFS
	name string
}

func (f *badFile) WriteAt(p []byte, off int64) (int, error) {
	if f.fs.off() {
		return 0, errPowerCut
	}
	if err := f.fs.write.Load(); err != nil {
		n, _ := f.File.WriteAt(p[:len(p)/2], off)
		return n, *err
	}
	return f.File.WriteAt(p, off)
}

func (f *badFile) Truncate(size int64) error {
	if f.fs.off() {
		return errPowerCut
	}
	return f.File.Truncate(size)
}

func (f *badFile) Preallocate(off, n int64) error {
	if err := f.fs.write.Load(); err != nil {
		return *err
	}
	return f.File.Preallocate(off, n)
}

func (f *badFile) Sync() error {
	if ch := f.fs.blocked.Load(); ch != nil {
		<-*ch
	}
	if err := f.fs.sync.Load(); err != nil {
		return *err
	}
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.fs.cut {
		return errPowerCut
	}
	size, err := f.Size()
	if err == nil {
		f.fs.synced[f.name] = size
		f.fs.syncs.Add(1)
	}
	return err
}

// powerCut stops the disk and takes from every file what was not synced, or some
// of it.
func (b *badFS) powerCut(t *testing.T, dir string, rng *rand.Rand) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.cut = true
	files, err := filepath.Glob(filepath.Join(dir, "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range files {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		safe := b.synced[path]
		if info.Size() > safe {
			if err := os.Truncate(path, safe+rng.Int64N(info.Size()-safe+1)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// diskBox is a box whose spool is on disk, its keeper and its loader at work.
type diskBox struct {
	*box
	fs   *badFS
	logs *logs
	dir  string
	stop func()
}

func openBox(t *testing.T, dir string, limit int64) *diskBox {
	t.Helper()
	b := &diskBox{fs: newBadFS(), logs: &logs{}, dir: dir}
	files, _ := filepath.Glob(filepath.Join(dir, "*", "*"))
	for _, path := range files {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		b.fs.synced[path] = info.Size() // what a power cut left is on the disk
	}
	d, err := openDisk(diskOptions{dir: dir, vm: "web1", size: limit, fs: b.fs, log: b.logs.entry()})
	if err != nil {
		t.Fatal(err)
	}
	b.box = &box{outbox: newOutbox(limit, d), t: t, told: make(map[string]result)}
	b.wake, b.note = func() {}, func() {}
	b.lost = func(r *Record, _ *bus.Error) { b.given = append(b.given, r.ID) }
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	work.Go(func() { b.keeper(ctx) })
	work.Go(func() { b.loader(ctx) })
	b.stop = sync.OnceFunc(func() {
		b.outbox.close()
		cancel()
		work.Wait()
		d.close(time.Hour)
	})
	t.Cleanup(b.stop)
	return b
}

// try publishes without anything that fails the test, and notes what is told.
func (b *diskBox) try(id string) error {
	return b.put(Record{Topic: "t", ID: id, Payload: []byte(`"` + strings.Repeat("x", 50) + `"`)}, func(r result) {
		b.tells.Lock()
		defer b.tells.Unlock()
		b.told[id] = r
	})
}

// heard gives what the publisher of a record was told, the zero result if nothing.
func (b *diskBox) heard(id string) result {
	b.tells.Lock()
	defer b.tells.Unlock()
	return b.told[id]
}

// host is the other side of all that a spool does.
type host struct {
	seqs map[string]uint64
	ids  []string // in order, each once
}

// take answers what b sends, as long as it sends something.
func (h *host) take(b *diskBox, most int) {
	for most > 0 {
		synctest.Wait()
		ids, _ := b.send()
		if len(ids) == 0 {
			return
		}
		for _, id := range ids {
			if h.seqs[id] == 0 {
				h.ids = append(h.ids, id)
				h.seqs[id] = uint64(len(h.ids))
			}
		}
		for _, id := range ids {
			if most--; most < 0 {
				b.end() // stored, and the answer is lost
				return
			}
			b.ok(id, h.seqs[id])
		}
	}
}

// What a program was told is kept or stored reaches the host once and in order,
// though the power fails at any point; and so does the rest if it is published again.
func TestSpoolThroughPowerCuts(t *testing.T) {
	for seed := range uint64(16) {
		bubble.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 7))
			dir := t.TempDir()
			h := &host{seqs: make(map[string]uint64)}
			next := 0
			var open []string // published, and nothing told
			told := make(map[string]bool)
			for range 12 {
				b := openBox(t, dir, 1<<20)
				for _, id := range open {
					if err := b.try(id); err != nil {
						t.Fatal(err)
					}
				}
				for range rng.IntN(30) {
					switch rng.IntN(6) {
					case 0:
						b.begin()
					case 1:
						b.end()
					case 2:
						h.take(b, rng.IntN(100))
					case 3:
						time.Sleep(time.Duration(rng.IntN(1500)) * time.Millisecond)
					default:
						for range rng.IntN(40) {
							id := fmt.Sprint(next)
							next++
							open = append(open, id)
							if err := b.try(id); err != nil {
								t.Fatal(err)
							}
						}
					}
					if rng.IntN(3) == 0 {
						synctest.Wait()
					}
				}
				if rng.IntN(4) > 0 {
					b.fs.powerCut(t, dir, rng)
				}
				synctest.Wait()
				// What was told after the power went was told to nobody, and is no lie
				// either: the disk has refused it.
				b.stop()
				b.tells.Lock()
				for id, r := range b.told {
					if r.err == nil {
						told[id] = true
					}
				}
				b.tells.Unlock()
				open = slices.DeleteFunc(open, func(id string) bool { return told[id] })
			}
			b := openBox(t, dir, 1<<20)
			for _, id := range open {
				if err := b.try(id); err != nil {
					t.Fatal(err)
				}
			}
			b.begin()
			h.take(b, 1<<30)
			if n := b.counts().records; n > 0 {
				t.Fatalf("seed %d: %d records are left", seed, n)
			}
			for i := range next {
				if h.seqs[fmt.Sprint(i)] == 0 {
					t.Fatalf("seed %d: %d is lost (told: %v)", seed, i, told[fmt.Sprint(i)])
				}
			}
			at := 0
			for _, id := range h.ids {
				var n int
				_, _ = fmt.Sscan(id, &n)
				if n != at {
					t.Fatalf("seed %d: the host has %d where %d was due", seed, n, at)
				}
				at++
			}
		})
	}
}

func pointer(err error) *error { return &err }

// A disk that refuses refuses publishers, while the host is away and no longer.
func TestSpoolOnAFailingDisk(t *testing.T) {
	for _, tt := range []struct {
		name  string
		fault func(*badFS) *atomic.Pointer[error]
		err   error
		state string
	}{
		{"full", func(b *badFS) *atomic.Pointer[error] { return &b.write }, syscall.ENOSPC, "disk full"},
		{"write", func(b *badFS) *atomic.Pointer[error] { return &b.write }, syscall.EIO, "disk error"},
		{"sync", func(b *badFS) *atomic.Pointer[error] { return &b.sync }, syscall.EIO, "disk error"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble.Test(t, func(t *testing.T) {
				dir := t.TempDir()
				b := openBox(t, dir, 1<<20)
				h := &host{seqs: make(map[string]uint64)}
				b.publish("before")
				synctest.Wait()
				if r := b.heard("before"); !r.queued || !r.durable {
					t.Fatalf("%+v", r)
				}
				tt.fault(b.fs).Store(pointer(tt.err))
				for _, id := range []string{"1", "2", "3"} {
					b.publish(id)
					synctest.Wait()
					if r := b.heard(id); r.err == nil || r.err.Code != bus.CodeStorageFull || r.err.RetryAfter <= 0 {
						t.Errorf("%s was told %+v", id, r)
					}
				}
				if c := b.counts(); c.records != 1 || !c.durable || c.trouble != tt.state {
					t.Errorf("%+v", c)
				}
				// With the host there is no need of the disk.
				b.begin()
				h.take(b, 100)
				b.publish("live")
				time.Sleep(2 * spillAfter)
				if r := b.heard("live"); r != (result{}) {
					t.Errorf("told %+v before the host said anything", b.heard("live"))
				}
				h.take(b, 100)
				if r := b.heard("live"); r.seq != 2 {
					t.Errorf("%+v", r)
				}
				// On its way when the connection breaks: the host may have it.
				b.publish("open")
				b.wantSent("open")
				b.end()
				synctest.Wait()
				if r := b.heard("open"); r.err == nil || r.err.Code != bus.CodeStorageStalled {
					t.Errorf("%+v", r)
				}
				tt.fault(b.fs).Store(nil)
				time.Sleep(2 * time.Second)
				b.publish("after")
				synctest.Wait()
				if r := b.heard("after"); !r.queued || !r.durable {
					t.Errorf("when the disk works again: %+v", r)
				}
				if b.logs.count("the spool cannot be written") != 1 || b.logs.count("takes messages again") != 1 {
					t.Error(b.logs)
				}
				b.stop()
				b = openBox(t, dir, 1<<20)
				b.begin()
				h.take(b, 100)
				if want := []string{"before", "live", "after"}; !slices.Equal(h.ids, want) {
					t.Errorf("the host has %q, want %q", h.ids, want)
				}
			})
		})
	}
}

// A disk that blocks keeps nobody waiting for ever: not publishers, not the session,
// not the end.
func TestSpoolOnABlockedDisk(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		b := openBox(t, t.TempDir(), 1<<20)
		h := &host{seqs: make(map[string]uint64)}
		time.Sleep(time.Second)
		wait := make(chan struct{})
		b.fs.blocked.Store(&wait)
		begun := time.Now()
		b.publish("a", "b")
		time.Sleep(storePatience + time.Second)
		synctest.Wait()
		if r := b.heard("b"); r.err == nil || r.err.Code != bus.CodeStorageStalled || time.Since(begun) > 2*storePatience {
			t.Errorf("after %v: %+v", time.Since(begun), r)
		}
		if err := b.try("c"); refusalOf(err).Code != bus.CodeStorageStalled {
			t.Errorf("while it blocks: %v", err)
		}
		if c := b.counts(); c.trouble != "disk stalled" {
			t.Errorf("%+v", c)
		}
		b.begin()
		b.publish("live")
		h.take(b, 100)
		if r := b.heard("live"); r.seq != 1 {
			t.Errorf("%+v", b.heard("live"))
		}
		b.publish("slow") // the host does not answer it
		b.wantSent("slow")
		time.Sleep(ackPatience)
		synctest.Wait()
		if r := b.heard("slow"); r.err == nil || r.err.Code != bus.CodeStorageStalled {
			t.Errorf("%+v", r)
		}
		// What was on its way to the disk is there in the end, and goes out.
		b.fs.blocked.Store(nil)
		close(wait)
		b.end()
		b.begin()
		h.take(b, 100)
		slices.Sort(h.ids)
		if want := []string{"a", "b", "live", "slow"}; !slices.Equal(h.ids, want) {
			t.Errorf("the host has %q, want %q", h.ids, want)
		}
		if n := b.counts().records; n != 0 {
			t.Errorf("%d records are left", n)
		}
	})
}

func TestAgentEndsThoughItsDiskBlocks(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		bad := newBadFS()
		f := runAgent(t, func(o *Options) { o.SpoolDir, o.fs = t.TempDir(), bad })
		f.net.refuse(errRefusedConnection)
		wait := make(chan struct{})
		bad.blocked.Store(&wait)
		done := f.publish(bus.PublishRequest{Topic: "t"})
		if err := f.Probe(t.Context()); err != nil {
			t.Error(err)
		}
		begun := time.Now()
		f.stop()
		if d := time.Since(begun); d > drainFor+3*diskPatience {
			t.Errorf("ended after %v", d)
		}
		if r := <-done; refusalOf(r.err).Code != bus.CodeStorageStalled {
			t.Errorf("%+v", r)
		}
		close(wait)
	})
}

// While the host answers, the guest's disk has nothing to do; when it is slow, or the
// session or the daemon ends, what waits goes to the disk.
func TestSpoolSparesTheDisk(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		b := openBox(t, dir, 1<<20)
		h := &host{seqs: make(map[string]uint64)}
		b.begin()
		before := b.fs.syncs.Load()
		for i := range 100 {
			b.publish(fmt.Sprint(i))
			time.Sleep(spillAfter / 2)
			h.take(b, 100)
		}
		if n := b.fs.syncs.Load() - before; n > 0 {
			t.Errorf("%d syncs", n)
		}
		b.publish("slow")
		b.wantSent("slow")
		time.Sleep(spillAfter)
		synctest.Wait()
		if n := b.fs.syncs.Load() - before; n != 1 {
			t.Errorf("%d syncs for one that the host left waiting", n)
		}
		if r := b.heard("slow"); r != (result{}) {
			t.Error("told before the host had its time")
		}
		time.Sleep(ackPatience)
		synctest.Wait()
		if r := b.heard("slow"); !r.queued || !r.durable {
			t.Errorf("%+v", r)
		}
		b.publish("broken")
		b.end()
		synctest.Wait()
		if r := b.heard("broken"); !r.queued || !r.durable {
			t.Errorf("%+v", r)
		}
		b.begin()
		b.publish("last")
		b.stop()
		b.abandon()
		if r := b.heard("last"); !r.queued || !r.durable {
			t.Errorf("%+v", r)
		}
		b = openBox(t, dir, 1<<20)
		b.begin()
		h.take(b, 100)
		if got, want := h.ids[100:], []string{"slow", "broken", "last"}; !slices.Equal(got, want) {
			t.Errorf("sent after the restart: %q, want %q", got, want)
		}
	})
}

// What is damaged on disk is told with file and offset; what is behind it is sent.
func TestSpoolWithDamage(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		b := openBox(t, dir, 1<<20)
		for i := range 9 {
			b.publish(fmt.Sprint(i))
			synctest.Wait() // a write each: all but the last were known durable by the next
		}
		b.stop()
		path := filepath.Join(dir, "web1", "00000000000000000001.jsonl")
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.SplitAfter(string(data), "\n")
		offset := len(lines[0]) + len(lines[1]) + len(lines[2])
		data[offset+100] ^= 1
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		b = openBox(t, dir, 1<<20)
		b.begin()
		h := &host{seqs: make(map[string]uint64)}
		h.take(b, 100)
		if want := []string{"0", "1", "2", "4", "5", "6", "7", "8"}; !slices.Equal(h.ids, want) {
			t.Errorf("the host has %q, want %q", h.ids, want)
		}
		if !strings.Contains(b.logs.String(), fmt.Sprintf("offset=%d", offset)) || b.logs.count("they are lost") != 1 {
			t.Error(b.logs)
		}
		if n, bytes := b.size(); n != 0 || bytes != 0 {
			t.Errorf("%d records of %d bytes are left", n, bytes)
		}
	})
}

// However much goes through it the spool stays within its bound on disk, and how far
// it is released is known there before the host could have forgotten the ids.
func TestSpoolIsReleased(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		const limit = 512 << 10
		b := openBox(t, dir, limit)
		h := &host{seqs: make(map[string]uint64)}
		released := func() uint64 {
			n, err := readReleased(eventlog.OS, filepath.Join(dir, "web1"))
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		n := 0
		for range 10 {
			for {
				if err := b.try(fmt.Sprint(n)); err != nil {
					break
				}
				n++
			}
			synctest.Wait()
			var size int64
			files, _ := filepath.Glob(filepath.Join(dir, "web1", "*"))
			for _, f := range files {
				if info, err := os.Stat(f); err == nil {
					size += info.Size()
				}
			}
			if size > limit*5/4 {
				t.Fatalf("%d bytes in %d files", size, len(files))
			}
			b.begin()
			h.take(b, 1<<30)
			b.end()
			time.Sleep(saveEvery)
			synctest.Wait()
			if got := released(); got != uint64(n) {
				t.Errorf("released up to %d of %d", got, n)
			}
			if files, _ := filepath.Glob(filepath.Join(dir, "web1", "*.jsonl")); len(files) != 1 {
				t.Errorf("%d segments are left", len(files))
			}
		}
		if len(h.ids) != n {
			t.Errorf("%d of %d arrived", len(h.ids), n)
		}
		// The clock stands still from here on.
		b.publish("spilled")
		synctest.Wait()
		b.begin()
		h.take(b, 100)
		for i := range saveAfter + windowRecords {
			b.publish(fmt.Sprint("direct", i))
			if i%windowRecords == windowRecords-1 {
				h.take(b, 1<<30)
			}
		}
		synctest.Wait()
		if got := released(); got != uint64(n)+1 {
			t.Errorf("after %d more records it is still said to be released up to %d", saveAfter, got)
		}
	})
}

// On a disk that the spool itself has filled there is no room for the note of what is
// released, before what is released has gone.
func TestSpoolThatFilledItsDisk(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		b := openBox(t, dir, 512<<10)
		h := &host{seqs: make(map[string]uint64)}
		segments := func() int {
			files, _ := filepath.Glob(filepath.Join(dir, "web1", "*.jsonl"))
			return len(files)
		}
		for i := 0; segments() < 4; i++ {
			b.publish(fmt.Sprint(i))
			synctest.Wait()
		}
		b.fs.create.Store(pointer(syscall.ENOSPC))
		b.begin()
		h.take(b, 1<<30)
		time.Sleep(2 * saveEvery)
		synctest.Wait()
		if n := segments(); n != 1 {
			t.Errorf("the host has everything, and %d segments are left", n)
		}
		b.stop() // without a note
		b = openBox(t, dir, 512<<10)
		if n := b.counts().records; n >= len(h.ids) {
			t.Errorf("%d records wait again of %d", n, len(h.ids))
		}
		b.publish("after")
		arrived := len(h.ids)
		b.begin()
		h.take(b, 1<<30)
		if len(h.ids) != arrived+1 || h.ids[arrived] != "after" {
			t.Errorf("the host has %q after the restart", h.ids[arrived:])
		}
	})
}

// A position beyond the log's end must not swallow what is published next.
func TestSpoolThatWasReplaced(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		if err := os.MkdirAll(filepath.Join(dir, "web1"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "web1", releasedFile), []byte("{\"seq\":500}\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		openBox(t, dir, 1<<20).stop()
		b := openBox(t, dir, 1<<20)
		b.publish("a")
		b.stop()
		b = openBox(t, dir, 1<<20)
		h := &host{seqs: make(map[string]uint64)}
		b.begin()
		h.take(b, 100)
		if len(h.ids) != 1 {
			t.Errorf("the host has %q", h.ids)
		}
	})
}

func TestSpoolIsLocked(t *testing.T) {
	dir := t.TempDir()
	opts := diskOptions{dir: dir, vm: "web1", size: 1 << 20, fs: eventlog.OS, log: (&logs{}).entry()}
	d, err := openDisk(opts)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := openDisk(opts); err == nil || !strings.Contains(err.Error(), "held by another process") {
		t.Errorf("opened twice: %v", err)
	}
	d.close(hang)
	if d, err = openDisk(opts); err != nil {
		t.Fatal(err)
	}
	d.close(hang)
}

// A publisher that is faster than the disk waits; it is not told that the spool is
// full, which it is not.
func TestPublisherWaitsForTheDisk(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		b := openBox(t, t.TempDir(), 4<<20)
		payload := []byte(`"` + strings.Repeat("x", wire.MaxPayload-2) + `"`)
		for i := range 40 {
			if err := b.put(Record{Topic: "t", ID: fmt.Sprint(i), Payload: payload}, func(result) {}); err != nil {
				t.Fatal(i, err)
			}
		}
	})
}
