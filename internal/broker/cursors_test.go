package broker

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/castrabus/castra/internal/bubble"
	"github.com/castrabus/castra/internal/token"
)

// to99 is a log of so many records.
func to99() uint64 { return 99 }

// A move after a pause is soon on disk; moves in a row are written once a second.
func TestCursorsAreWrittenSoon(t *testing.T) {
	dir := t.TempDir()
	bubble.Test(t, func(t *testing.T) {
		c, err := openCursors(dir)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := c.open("g", "c", "t", 1, to99); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			c.run(ctx, func(err error) {
				if err != nil {
					t.Error(err)
				}
			})
		}()
		move := func(next uint64) {
			c.mu.Lock()
			c.vms["g"].all["c"].Next = next
			c.moved["g"] = struct{}{}
			c.mu.Unlock()
			token.Leave(c.wake)
		}
		onDisk := func(want string) {
			t.Helper()
			synctest.Wait()
			got, err := os.ReadFile(filepath.Join(dir, "g.json"))
			if err != nil || !strings.Contains(string(got), `"next":`+want+`}`) {
				t.Fatalf("%s, %v; want %s", got, err, want)
			}
		}
		time.Sleep(2 * cursorDelay)
		move(5)
		time.Sleep(cursorGather)
		onDisk("5")
		move(6)
		time.Sleep(cursorGather)
		move(7)
		time.Sleep(cursorDelay - 2*cursorGather)
		onDisk("5")
		time.Sleep(cursorGather)
		onDisk("7")
		move(8)
		cancel() // a clean end leaves nothing behind
		<-done
		onDisk("8")
	})
}

// A cursor that lay beyond the log's end is given only once its new place is on disk:
// until then the file has the old one, to which a crash would bring it back.
func TestCursorBeyondTheEndIsStoredFirst(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "g.json")
	if err := os.WriteFile(path, []byte(`{"c":{"topic":"t","next":900}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := openCursors(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.open("g", "c", "another", 1, to99); err == nil {
		t.Fatal("a cursor was given for a topic that is not its own")
	}
	blocked := filepath.Join(path+".tmp", "in-the-way") // what is written first cannot be made
	if err := os.MkdirAll(blocked, 0o700); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if next, _, err := c.open("g", "c", "t", 1, to99); err == nil {
			t.Fatalf("a cursor was given at %d, and could not be stored", next)
		}
	}
	if err := os.RemoveAll(path + ".tmp"); err != nil {
		t.Fatal(err)
	}
	if next, lost, err := c.open("g", "c", "t", 1, to99); err != nil || next != 100 || lost != 900 {
		t.Fatalf("%d, %d, %v; want the end, and where it was", next, lost, err)
	}
	if got, err := os.ReadFile(path); err != nil || !strings.Contains(string(got), `"next":100}`) {
		t.Fatalf("%s, %v; want the end", got, err)
	}
}

// A cursor that acks have moved while its file was waited for is not set back to where
// the log ended before.
func TestCursorMovedMeanwhile(t *testing.T) {
	c, err := openCursors(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.open("g", "c", "t", 1, to99); err != nil {
		t.Fatal(err)
	}
	var committed atomic.Uint64
	committed.Store(99)
	v := c.hold("g")
	got := make(chan uint64, 1) // one answer
	go func() {
		next, _, _ := c.open("g", "c", "t", 1, committed.Load)
		got <- next
	}()
	for range 100 {
		runtime.Gosched() // so that it waits for the file, or the test sees less
	}
	committed.Store(150)
	c.mu.Lock()
	v.all["c"].Next = 151
	c.mu.Unlock()
	v.file.Unlock()
	if next := <-got; next != 151 {
		t.Errorf("it is at %d", next)
	}
}

// What somebody has set back to before the first record begins with that.
func TestCursorSetToZero(t *testing.T) {
	all, err := parseCursors([]byte(`{"c":{"topic":"t","next":0}}`))
	if err != nil || all["c"].Next != 1 {
		t.Errorf("%v, %v", all["c"], err)
	}
}

// A VM that is forgotten while its cursors cannot be stored stays forgotten: to store
// them again there is nothing.
func TestCursorsForgottenMeanwhile(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "missing")
	c := &cursors{dir: missing, vms: make(map[string]*vmCursors), moved: make(map[string]struct{})}
	for range 20_000 {
		c.vms["g"] = &vmCursors{path: filepath.Join(missing, "g.json"), loaded: true, all: map[string]*cursor{"c": {"t", 1}}}
		c.moved["g"] = struct{}{}
		var work sync.WaitGroup
		work.Go(func() { _ = c.flush() }) // which fails, unless it came too late
		work.Go(func() { _ = c.forget("g") })
		work.Wait()
		if _, again := c.moved["g"]; again && c.vms["g"] == nil {
			t.Fatal("it is to be stored")
		}
	}
}

// One cursor too many is refused by a limit that is not that of subscriptions.
func TestCursorsAreNoSubscriptions(t *testing.T) {
	b := start(t, testOptions(t, t.TempDir()))
	g := connect(t, b.addr, "g")
	for i := range maxCursors {
		g.send(fmt.Sprintf(`{"type":"subscribe","topic":"vm:g","cursor":"c%d"}`, i))
		g.expect(`{"ack":"subscribe","status":"ok"}`)
	}
	g.send(`{"type":"subscribe","topic":"vm:g","cursor":"another"}`)
	g.expect(`{"ack":"subscribe","code":"too-many-subscriptions"}`)
	if got := b.Status(nil).Broker.Limited[limitSubscriptions]; got != 0 {
		t.Errorf("%d subscriptions were refused", got)
	}
}
