package broker

import (
	"encoding/json"
	"io/fs"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
)

// stuckFS is the machine's file system, whose disk a test can stop.
type stuckFS struct {
	eventlog.FS
	mu      sync.Mutex
	stopped chan struct{} // nil: it works
	what    string        // the operation that blocks
	fails   atomic.Bool   // the next sync of the host stream or its journal does
	blocked atomic.Int32  // how many wait for it
}

// stop makes what block until the returned function is called.
func (s *stuckFS) stop(what string) (goOn func()) {
	ch := make(chan struct{})
	s.mu.Lock()
	s.stopped, s.what = ch, what
	s.mu.Unlock()
	return sync.OnceFunc(func() {
		s.mu.Lock()
		s.stopped = nil
		s.mu.Unlock()
		close(ch)
	})
}

func (s *stuckFS) wait(what string) {
	s.mu.Lock()
	ch := s.stopped
	if s.what != what {
		ch = nil
	}
	s.mu.Unlock()
	if ch != nil {
		s.blocked.Add(1)
		<-ch
		s.blocked.Add(-1)
	}
}

func (s *stuckFS) OpenFile(name string, flag int, perm fs.FileMode) (eventlog.File, error) {
	f, err := s.FS.OpenFile(name, flag, perm)
	return stuckFile{f, s, strings.Contains(name, "/bus/host/") || strings.HasSuffix(name, "/bus/journal")}, err
}

type stuckFile struct {
	eventlog.File
	fs   *stuckFS
	host bool
}

func (f stuckFile) Sync() error {
	f.fs.wait("sync")
	if f.host && f.fs.fails.CompareAndSwap(true, false) {
		return syscall.EIO
	}
	return f.File.Sync()
}

func (f stuckFile) Preallocate(off, n int64) error {
	f.fs.wait("fallocate")
	return f.File.Preallocate(off, n)
}

func (f stuckFile) ReadAt(b []byte, off int64) (int, error) {
	f.fs.wait("read")
	return f.File.ReadAt(b, off)
}

// A disk that blocks in whatever it was asked: publishes are told, heartbeats
// and status go on, the watchdog is content, and all resumes by itself.
func TestStalledDisk(t *testing.T) {
	for _, what := range []string{"sync", "fallocate"} {
		t.Run(what, func(t *testing.T) {
			disk, b := stuckBroker(t)
			pub, idle := connect(t, b.addr, "pub"), connect(t, b.addr, "idle")
			eventually(t, "both are announced", func() bool { return b.events.Committed() == 2 })
			goOn := disk.stop(what)
			t.Cleanup(goOn)
			// More than is reserved ahead, so that blocks are asked for.
			big := `{"type":"publish","id":"1","payload":"` + strings.Repeat("x", 60000) + `"}`
			var frames []string
			for range 80 {
				frames = append(frames, strings.Replace(big, `"1"`, `"`+string(rune('a'+len(frames)%26))+strings.Repeat("z", len(frames))+`"`, 1))
			}
			done := make(chan struct{})
			go func() { defer close(done); pub.send(frames...) }()
			eventually(t, "status says so", func() bool { return b.State() == "degraded: disk stalled" })
			idle.send(`{"type":"heartbeat"}`)
			idle.expect(`{"ack":"heartbeat","status":"ok"}`)
			if err := b.Ping(t.Context()); err != nil {
				t.Errorf("the watchdog's probe: %v", err)
			}
			stalled := 0
			for range frames {
				switch f := pub.next(); {
				case has(f, `{"ack":"publish","status":"error","code":"storage-stalled"}`):
					stalled++
				case !has(f, `{"ack":"publish","status":"ok"}`):
					t.Fatalf("answered %.200s", f)
				}
			}
			if stalled == 0 {
				t.Error("no publish was told of it")
			}
			<-done
			goOn()
			eventually(t, "it resumes", func() bool { return b.State() == "running" })
			pub.send(`{"type":"publish","id":"after"}`, frames[len(frames)-1])
			pub.expect(`{"status":"ok","id":"after"}`, `{"status":"ok"}`)
			if got := count(t, b, `"topic":"castra.presence"`); got != 2 {
				t.Errorf("%d presence records, want 2", got)
			}
		})
	}
}

// logWorks waits until the event log takes what comes. Status hears of a fault a little
// later than who is refused, and calls a log running that is not yet known to have failed.
func (r *running) logWorks() {
	r.t.Helper()
	eventually(r.t, "the disk works", func() bool { return r.events.State().Degraded == "" })
}

// stuckBroker starts a broker on a disk that can be stopped.
func stuckBroker(t *testing.T) (*stuckFS, *running) {
	t.Helper()
	disk := &stuckFS{FS: eventlog.OS}
	o := testOptions(t, t.TempDir())
	o.FS, o.StallAfter = disk, 0
	return disk, start(t, o)
}

// unreadable starts a broker whose log has more on the topic t than is in memory, and
// cannot be read until goOn is called.
func unreadable(t *testing.T) (disk *stuckFS, b *running, goOn func()) {
	t.Helper()
	disk, b = stuckBroker(t)
	bulk(t, b, "t", 300)
	goOn = disk.stop("read")
	t.Cleanup(goOn)
	return disk, b, goOn
}

// A disk that blocks a replay delays that session's deliveries alone.
func TestStalledRead(t *testing.T) {
	_, b, goOn := unreadable(t)
	g := connect(t, b.addr, "g")
	g.send(`{"type":"subscribe","topic":"t","from":1}`, `{"type":"heartbeat"}`)
	g.expect(`{"ack":"subscribe","status":"ok"}`, `{"ack":"heartbeat","status":"ok"}`)
	_ = g.conn.Close()
	eventually(t, "the close is seen at once", func() bool { return !b.Status([]string{"g"}).VMs[0].Reachable })
	goOn()
}

// count tells how many records have text in them.
func count(t *testing.T, b *running, text string) int {
	t.Helper()
	var out strings.Builder
	if err := b.Tail(t.Context(), bus.TailRequest{All: true}, &out); err != nil {
		t.Fatal(err)
	}
	return strings.Count(out.String(), text)
}

// What happened while the disk did not answer is announced when it does: what it had
// been given then, and all that comes afterwards.
func TestStalledPresence(t *testing.T) {
	disk, b := stuckBroker(t)
	told := make(chan struct{}, 16) // more changes than there are
	t.Cleanup(b.Watch(func(bus.VM, bool) { told <- struct{}{} }))
	goOn := disk.stop("sync")
	t.Cleanup(goOn)
	connect(t, b.addr, "during")
	<-told // who announces it has given up waiting for the disk
	goOn()
	eventually(t, "it is announced", func() bool { return b.events.Committed() == 1 })
	connect(t, b.addr, "after")
	eventually(t, "who comes later is, too", func() bool { return b.events.Committed() == 2 })
}

// However often a guest asks for a place in a log that cannot be read, it is looked
// for by one.
func TestStalledSubscribe(t *testing.T) {
	_, b, goOn := unreadable(t)
	g := connect(t, b.addr, "g")
	const subscribe = `{"type":"subscribe","topic":"t","from":"2020-01-01T00:00:00Z"}`
	g.send(subscribe, subscribe, `{"type":"heartbeat"}`)
	const stalled = `{"ack":"subscribe","status":"error","code":"storage-stalled"}`
	g.expect(stalled, stalled, `{"ack":"heartbeat","status":"ok"}`)
	if n := len(b.topics.subscribers("t")); n != 1 {
		t.Errorf("%d are looking", n)
	}
	goOn()
	eventually(t, "it gets its place", func() bool {
		g.send(subscribe)
		return has(g.next(), `{"ack":"subscribe","status":"ok"}`)
	})
}

// A change of subscriptions does not wait without an end for a disk that blocks the
// deliveries: the heartbeats behind it are answered.
func TestStalledReadChange(t *testing.T) {
	disk, b, _ := unreadable(t)
	g := connect(t, b.addr, "g")
	g.send(`{"type":"subscribe","topic":"t","from":1}`)
	g.expect(`{"ack":"subscribe","status":"ok"}`)
	eventually(t, "the deliveries wait", func() bool { return disk.blocked.Load() > 0 })
	g.send(`{"type":"subscribe","topic":"u"}`, `{"type":"unsubscribe","topic":"t"}`, `{"type":"heartbeat"}`)
	g.expect(`{"ack":"subscribe","status":"error","code":"storage-stalled"}`, `{"ack":"unsubscribe","status":"error","code":"storage-stalled"}`, `{"ack":"heartbeat","status":"ok"}`)
	if n := len(b.topics.subscribers("u")); n != 0 {
		t.Errorf("%d subscriptions are left of one that was refused", n)
	}
}

// Who publishes alone commits on the goroutine that reads for the session. A disk that
// keeps it does not keep the session: the publish and the heartbeat behind it are answered.
func TestStalledOwnCommit(t *testing.T) {
	disk, b := stuckBroker(t)
	g := connect(t, b.addr, "g")
	eventually(t, "it is announced", func() bool { return b.events.Committed() == 1 })
	goOn := disk.stop("sync")
	t.Cleanup(goOn)
	const publish = `{"type":"publish","id":"1"}`
	g.send(publish)
	eventually(t, "the commit waits", func() bool { return disk.blocked.Load() > 0 })
	g.send(`{"type":"heartbeat"}`, publish, `{"type":"heartbeat"}`)
	const stalled, heard = `{"status":"error","code":"storage-stalled","id":"1"}`, `{"ack":"heartbeat","status":"ok"}`
	g.expect(stalled, heard, stalled, heard)
	goOn()
	b.logWorks()
	g.send(publish, publish)
	g.expect(`{"status":"ok","seq":2}`, `{"status":"ok","seq":2}`)
}

// Who publishes alone delivers, too. A guest that reads nothing does not keep its
// publisher, and misses nothing.
func TestDeafSubscriber(t *testing.T) {
	o := testOptions(t, t.TempDir())
	o.GuestTopics = guestTopics(t, "shared")
	b := start(t, o)
	deaf, pub := connect(t, b.addr, "deaf"), connect(t, b.addr, "pub")
	deaf.send(`{"type":"subscribe","topic":"shared"}`)
	deaf.expect(`{"ack":"subscribe","status":"ok"}`)
	const records = 400 // more than the kernel holds for a connection
	publish := `{"type":"publish","topic":"shared","payload":"` + strings.Repeat("x", 60000) + `"}`
	for range records {
		pub.send(publish, `{"type":"heartbeat"}`)
		pub.expect(`{"ack":"publish","status":"ok"}`, `{"ack":"heartbeat","status":"ok"}`)
	}
	for last, n := uint64(0), 0; n < records; n++ {
		var d struct {
			Topic string
			Seq   uint64
		}
		if err := json.Unmarshal([]byte(deaf.next()), &d); err != nil || d.Topic != "shared" || d.Seq <= last {
			t.Fatalf("%d: %+v behind %d, %v", n, d, last, err)
		}
		last = d.Seq
	}
}
