package broker

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
)

// filesOf lists what is on disk of VMs, by name.
func filesOf(t *testing.T, o Options) map[string][]string {
	t.Helper()
	all := make(map[string][]string)
	for dir, suffix := range map[string]string{
		o.LogDir + "/bus/vm": "", o.StateDir + "/ids": ".ids", o.StateDir + "/cursors": ".json", o.StateDir + "/handshakes": ".json",
	} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if vm, ok := strings.CutSuffix(e.Name(), suffix); ok && !strings.HasPrefix(vm, ".") {
				all[vm] = append(all[vm], filepath.Base(dir))
			}
		}
	}
	return all
}

// leave has a guest leave everything behind that one can.
func (r *running) leave(vm string) {
	r.t.Helper()
	g := connect(r.t, r.addr, vm)
	g.send(`{"type":"publish","topic":"t","id":"i","payload":1}`, `{"type":"subscribe","topic":"t","cursor":"c"}`)
	g.expect(`{"ack":"publish","status":"ok"}`, `{"ack":"subscribe","status":"ok"}`)
	_ = g.conn.Close()
	eventually(r.t, vm+" has left", func() bool { return r.table.SessionOf(vm) == nil })
}

// written waits until everything that is to be on disk is.
func (r *running) written(o Options, names ...string) {
	r.t.Helper()
	eventually(r.t, fmt.Sprint("the files of ", names), func() bool {
		files := filesOf(r.t.(*testing.T), o)
		for _, vm := range names {
			if len(files[vm]) < 4 {
				return false
			}
		}
		return true
	})
}

// Names that nobody registered leave no more behind than as many as may be
// remembered, also over restarts; those with a session, those remembered and those
// registered keep what they have.
func TestStrangersAreForgotten(t *testing.T) {
	dir := t.TempDir()
	options := func() Options {
		o := testOptions(t, dir)
		o.MaxVMs = 3
		return o
	}
	o := options()
	b := start(t, o)
	if _, _, err := b.AddVM(t.Context(), bus.AddVMRequest{Name: "registered", NoKey: true}); err != nil {
		t.Fatal(err)
	}
	b.leave("registered")
	for i := range 6 {
		b.leave(fmt.Sprint("stranger", i))
	}
	live := connect(t, b.addr, "live")
	live.send(`{"type":"publish","topic":"t","payload":1}`)
	live.expect(`{"ack":"publish","status":"ok"}`)
	b.written(o, "registered", "stranger5")
	if n := b.Status(nil).Broker.Limited["max_vms"]; n != 4 {
		t.Errorf("status counts %d names that had to make room, not 4", n)
	}
	eventually(t, "bus-events.jsonl tells of them", func() bool {
		data, _ := os.ReadFile(filepath.Join(o.StateDir, "handshakes", "bus-events.jsonl"))
		return strings.Contains(string(data), `"vm":"stranger0","session":"","reason":"queue_full","action":"reject","detail":"max_vms: `)
	})
	if err := b.forgetStrangers(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	want := []string{"live", "registered", "stranger4", "stranger5"}
	if got := vmsOf(t, o); !slices.Equal(got, want) {
		t.Errorf("what is left is %v, want %v", got, want)
	}
	// A retry of a name that is still there is stored once.
	for _, vm := range []string{"stranger5", "registered"} {
		head := b.events.Committed()
		b.leave(vm)
		if b.published(t, vm, head) {
			t.Errorf("what %s says again is stored again", vm)
		}
	}
	// Fewer may be remembered now than have a session: those keep what they have.
	few := o.Settings
	few.MaxVMs = 1
	b.configure(few)
	if err := b.forgetStrangers(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	if got := filesOf(t, o)["live"]; !slices.Contains(got, "vm") {
		t.Errorf("what is left of who has a session is %v", got)
	}
	for i := range 3 {
		b.leave(fmt.Sprint("later", i))
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	// The next castrad has heard of no stranger. What is not too old stays.
	o = options()
	o.RetentionAge = time.Hour
	b = start(t, o)
	if err := b.forgetStrangers(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	if got := vmsOf(t, o); len(got) < 3 || len(got) > 4 || !slices.Contains(got, "registered") {
		t.Errorf("a restart leaves %v", got)
	}
	if err := b.forgetStrangers(t.Context(), time.Now().Add(2*time.Hour)); err != nil {
		t.Fatal(err)
	}
	if got := vmsOf(t, o); !slices.Equal(got, []string{"registered"}) {
		t.Errorf("when all is old, what is left is %v", got)
	}
}

// vmsOf gives the names that anything on disk is of.
func vmsOf(t *testing.T, o Options) []string {
	var names []string
	for vm, dirs := range filesOf(t, o) {
		if !slices.Equal(dirs, []string{"handshakes"}) || vm == "live" { // the files about handshakes are removed a little later
			names = append(names, vm)
		}
	}
	slices.Sort(names)
	return names
}

// published tells whether vm has a record behind head.
func (r *running) published(t *testing.T, vm string, head uint64) bool {
	reader := r.events.NewReader(head + 1)
	defer reader.Close()
	for {
		var rec eventlog.Record
		ok, err := reader.Next(&rec)
		if err != nil {
			t.Fatal(err)
		}
		if !ok || string(rec.VM) == vm {
			return ok
		}
	}
}

// All strangers together have what the host stream has.
func TestStrangersShare(t *testing.T) {
	o := testOptions(t, t.TempDir())
	o.HostRetention, o.VMRetention = 2<<20, 1<<20
	b := start(t, o)
	if _, _, err := b.AddVM(t.Context(), bus.AddVMRequest{Name: "registered", NoKey: true}); err != nil {
		t.Fatal(err)
	}
	if b.share("registered") != 0 || b.share("first") != 2<<20 {
		t.Errorf("the shares are %d and %d", b.share("registered"), b.share("first"))
	}
	var guests []*guest
	for i := range 4 {
		guests = append(guests, connect(t, b.addr, fmt.Sprint("stranger", i)))
	}
	if n := b.share("stranger0"); n != 512<<10 {
		t.Errorf("a fourth is %d", n)
	}
	large := `{"type":"publish","topic":"t","payload":"` + strings.Repeat("x", 50_000) + `"}`
	for range 40 {
		for _, g := range guests {
			g.send(large)
			g.expect(`{"ack":"publish","status":"ok"}`)
		}
	}
	eventually(t, "they keep within it", func() bool {
		total := int64(0)
		err := filepath.WalkDir(o.LogDir+"/bus/vm", func(_ string, e fs.DirEntry, err error) error {
			if err == nil && !e.IsDir() {
				info, ierr := e.Info()
				if err = ierr; err == nil {
					total += info.Size()
				}
			}
			if errors.Is(err, fs.ErrNotExist) {
				err = nil
			}
			return err
		})
		return err == nil && total > 1<<20 && total < 2<<20+4*64<<10
	})
}

// slowRemoveFS holds the first removal of a VM's segment.
type slowRemoveFS struct {
	eventlog.FS
	once sync.Once
	at   chan string // the VM; has room for one
	goOn chan struct{}
}

func (s *slowRemoveFS) Remove(name string) error {
	if strings.Contains(name, "/bus/vm/") {
		s.once.Do(func() { s.at <- filepath.Base(filepath.Dir(name)); <-s.goOn })
	}
	return s.FS.Remove(name)
}

// Who comes back while his files are removed keeps what he is promised then.
func TestStrangerComesWhileForgotten(t *testing.T) {
	o := testOptions(t, t.TempDir())
	disk := &slowRemoveFS{FS: eventlog.OS, at: make(chan string, 1), goOn: make(chan struct{})}
	o.FS = disk
	b := start(t, o)
	b.leave("a")
	b.leave("b")
	b.written(o, "a", "b")
	few := o.Settings
	few.MaxVMs = 1
	b.configure(few)
	forgotten := make(chan error, 1)
	go func() { forgotten <- b.forgetStrangers(t.Context(), time.Now()) }()
	vm := <-disk.at
	others := connect(t, b.addr, "other") // nobody else waits
	g := dial(t, b.addr)
	g.say("hello vm:%s capabilities=bus-v1\n", vm)
	promised := make(chan struct{})
	go func() {
		defer close(promised)
		if got := g.line(); !strings.HasPrefix(got, "ok session=") {
			t.Errorf("it is answered %q", got)
			return
		}
		g.send(`{"type":"subscribe","topic":"t","cursor":"new"}`)
		g.expect(`{"ack":"subscribe","status":"ok"}`)
	}()
	select { // it must not come so far; should it, that is to be seen
	case <-promised:
	case <-time.After(50 * time.Millisecond):
	}
	close(disk.goOn)
	if err := <-forgotten; err != nil {
		t.Fatal(err)
	}
	<-promised
	if data, err := os.ReadFile(filepath.Join(o.StateDir, "cursors", vm+".json")); err != nil || !strings.Contains(string(data), `"new"`) {
		t.Errorf("its cursors are %s, %v", data, err)
	}
	others.send(`{"type":"heartbeat"}`)
	others.expect(`{"ack":"heartbeat","status":"ok"}`)
}

// A VM's segments are an eighth of what it keeps, also where that is little.
func TestVMSegments(t *testing.T) {
	o := testOptions(t, t.TempDir())
	o.VMRetention = 64 << 10
	b := start(t, o)
	if _, _, err := b.AddVM(t.Context(), bus.AddVMRequest{Name: "web1", NoKey: true}); err != nil {
		t.Fatal(err)
	}
	g := connect(t, b.addr, "web1")
	for range 200 {
		g.send(`{"type":"publish","topic":"t","payload":"` + strings.Repeat("x", 1000) + `"}`)
		g.expect(`{"ack":"publish","status":"ok"}`)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(o.LogDir + "/bus/vm/web1/*.jsonl")
	if err != nil || len(files) < 8 {
		t.Fatal(files, err)
	}
	total := int64(0)
	for _, f := range files {
		st, err := os.Stat(f)
		if err != nil || st.Size() > 8<<10 {
			t.Errorf("%s has %d bytes, %v", f, st.Size(), err)
		}
		total += st.Size()
	}
	if total > 72<<10 {
		t.Errorf("%d bytes are kept", total)
	}
}
