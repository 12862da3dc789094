package guest

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/castrabus/castra/internal/bubble"
	"github.com/castrabus/castra/internal/eventlog"
)

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
