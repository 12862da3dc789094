package dbusapi

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/castrabus/castra/internal/bus"
)

// hang is how long a test waits for what must happen. It asserts nothing: it only
// turns a hang into a failure.
const hang = 30 * time.Second

// openPolicy lets everybody do everything on a test's bus.
const openPolicy = `<policy context="default">
<allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/><allow user="*"/>
</policy>`

// testBus is a message bus of a test's own.
type testBus struct {
	t       *testing.T
	dir     string
	address string
	process *exec.Cmd
}

// newBus starts a message bus. rest is what its configuration holds besides an
// address.
func newBus(t *testing.T, rest string) *testBus {
	t.Helper()
	dir, err := os.MkdirTemp("", "castra-bus") // short: a socket's path has 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	b := &testBus{t: t, dir: dir, address: "unix:path=" + filepath.Join(dir, "bus")}
	t.Cleanup(func() {
		b.stop()
		os.RemoveAll(dir)
	})
	if err := os.Chmod(dir, 0o755); err != nil { // other users call too
		t.Fatal(err)
	}
	config := `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><listen>` + b.address + `</listen><auth>EXTERNAL</auth>` + rest + `</busconfig>`
	if err := os.WriteFile(filepath.Join(dir, "config"), []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	b.start()
	return b
}

func (b *testBus) start() {
	b.t.Helper()
	os.Remove(filepath.Join(b.dir, "bus"))
	b.process = exec.Command("dbus-daemon", "--nofork", "--nopidfile", "--print-address", "--config-file="+filepath.Join(b.dir, "config"))
	b.process.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // a test that panics cleans nothing up
	var said bytes.Buffer
	b.process.Stderr = &said
	out, err := b.process.StdoutPipe()
	if err != nil {
		b.t.Fatal(err)
	}
	if err := b.process.Start(); err != nil {
		b.t.Fatalf("starting a message bus: %v (apt-get install dbus-daemon)", err)
	}
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		b.process.Wait()
		b.t.Fatalf("the message bus gave no address: %v: %s", err, said.String())
	}
}

func (b *testBus) stop() {
	b.process.Process.Kill()
	b.process.Wait()
}

// client connects to the bus.
func (b *testBus) client() *dbus.Conn {
	b.t.Helper()
	c, err := dbus.Connect(b.address, dbus.WithSignalHandler(dbus.NewSequentialSignalHandler()))
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { c.Close() })
	return c
}

func manager(c *dbus.Conn) dbus.BusObject { return c.Object(BusName, RootPath) }

// busctl runs busctl on the bus.
func (b *testBus) busctl(args ...string) string {
	b.t.Helper()
	out, err := exec.Command("busctl", append([]string{"--address=" + b.address}, args...)...).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		b.t.Fatalf("%v (apt-get install systemd)", err)
	}
	if err != nil {
		b.t.Fatalf("busctl %q: %v: %s", args, err, out)
	}
	return string(out)
}

// at is a retry schedule of one interval.
type at time.Duration

func (a at) Next() time.Duration { return time.Duration(a) }
func (at) Reset()                {}

// quick are the hooks of a server that tries again at once and whose callers are
// all root.
func quick() hooks {
	return hooks{
		retry: at(10 * time.Millisecond), grace: hang, group: adminGroup,
		identify: func(context.Context, *busConn, string) (identity, error) { return identity{}, nil },
	}
}

// serve starts a server and ends it with the test.
func (b *testBus) serve(opts Options, h hooks) *Server {
	b.t.Helper()
	opts.Address = b.address
	s, err := start(b.t.Context(), opts, h)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(s.Close)
	return s
}

// states makes an OnState and the channel that it reports to.
func states() (func(bool, error), chan string) {
	ch := make(chan string, 64) // more than any test has changes
	return func(owned bool, err error) { ch <- fmt.Sprintf("%t %v", owned, err) }, ch
}

// receive takes the next value, or fails the test.
func receive[T any](t *testing.T, ch <-chan T) T {
	t.Helper()
	select {
	case v, ok := <-ch:
		if !ok {
			t.Fatal("closed")
		}
		return v
	case <-time.After(hang):
		t.Fatal("nothing came")
	}
	panic("not reached")
}

// watch has c receive what the server signals.
func watch(t *testing.T, c *dbus.Conn) <-chan *dbus.Signal {
	t.Helper()
	signals := make(chan *dbus.Signal, 16) // godbus queues what it has no room for
	c.Signal(signals)
	if err := c.AddMatchSignal(dbus.WithMatchSender(BusName)); err != nil {
		t.Fatal(err)
	}
	return signals
}

// signal takes the server's next signal.
func signal(t *testing.T, signals <-chan *dbus.Signal) *dbus.Signal {
	t.Helper()
	for {
		if s := receive(t, signals); s.Sender != driverName {
			return s
		}
	}
}

// eventually waits until cond holds.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(hang); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// fakeBus stands in for a broker.
type fakeBus struct {
	mu       sync.Mutex
	broker   bus.Broker
	vms      map[string]bus.VM
	watchers map[int]func(bus.VM, bool)
	ids      int
	requests []bus.PublishRequest
	statuses int // calls of Status

	publish func(ctx context.Context, req bus.PublishRequest) (uint64, error)
	waitAck func(ctx context.Context, seq uint64) (string, error)
	tail    func(ctx context.Context, req bus.TailRequest, w io.Writer) error
}

func newFakeBus(vms ...bus.VM) *fakeBus {
	f := &fakeBus{
		broker:   bus.Broker{Kind: "host", Version: "1.2.3", State: "running", Sync: "always", LogDir: "/l\xffog", StateDir: "/state", Listen: []string{"127.0.0.1:7070"}, HeadSeq: 42, Sessions: 3, Limited: map[string]uint64{"max_vms": 1}},
		vms:      make(map[string]bus.VM),
		watchers: make(map[int]func(bus.VM, bool)),
	}
	for _, vm := range vms {
		f.vms[vm.VM] = vm
	}
	return f
}

func (f *fakeBus) Publish(ctx context.Context, req bus.PublishRequest) (uint64, error) {
	f.mu.Lock()
	f.requests = append(f.requests, req)
	n, fn := len(f.requests), f.publish
	f.mu.Unlock()
	if fn != nil {
		return fn(ctx, req)
	}
	return uint64(n), nil
}

// asked returns the publishes so far, and forgets them.
func (f *fakeBus) asked() []bus.PublishRequest {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := f.requests
	f.requests = nil
	return r
}

// answer has publishes answered by fn.
func (f *fakeBus) answer(fn func(context.Context, bus.PublishRequest) (uint64, error)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.publish = fn
}

func (f *fakeBus) WaitAck(ctx context.Context, seq uint64) (string, error) {
	return f.waitAck(ctx, seq)
}

func (f *fakeBus) Tail(ctx context.Context, req bus.TailRequest, w io.Writer) error {
	return f.tail(ctx, req, w)
}

func (f *fakeBus) Status(names []string) bus.Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.statuses++
	st := bus.Status{Broker: f.broker}
	if len(names) == 0 {
		names = slices.Sorted(maps.Keys(f.vms))
	}
	for _, name := range names {
		if vm, ok := f.vms[name]; ok {
			st.VMs = append(st.VMs, vm)
		}
	}
	return st
}

func (f *fakeBus) Watch(fn func(bus.VM, bool)) (cancel func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	id := f.ids
	f.ids++
	f.watchers[id] = fn
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.watchers, id)
	}
}

// set changes a VM, or removes it if it has no state, and tells the watchers.
func (f *fakeBus) set(vm bus.VM) {
	f.mu.Lock()
	removed := vm.State == ""
	if removed {
		delete(f.vms, vm.VM)
	} else {
		f.vms[vm.VM] = vm
	}
	watchers := slices.Collect(maps.Values(f.watchers))
	f.mu.Unlock()
	for _, w := range watchers {
		w(vm, removed)
	}
}

// become changes the broker and tells who watches.
func (f *fakeBus) become(state string, faults ...bus.Fault) {
	f.mu.Lock()
	f.broker.State, f.broker.Faults = state, faults
	watchers := slices.Collect(maps.Values(f.watchers))
	f.mu.Unlock()
	for _, w := range watchers {
		w(bus.VM{}, false)
	}
}

// fakeRegistry stands in for castrad's.
type fakeRegistry struct {
	mu    sync.Mutex
	added []bus.AddVMRequest
}

func (r *fakeRegistry) AddVM(_ context.Context, req bus.AddVMRequest) (bool, []byte, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.added = append(r.added, req)
	if req.Name == "there" && !req.IfMissing {
		return false, nil, bus.Errorf(bus.CodeVMExists, "there is registered")
	}
	if req.Name == "there" || req.NoKey {
		return req.Name != "there", nil, nil
	}
	return true, []byte("key of " + req.Name), nil
}

func (r *fakeRegistry) asked() []bus.AddVMRequest {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.added
}

func (r *fakeRegistry) RemoveVM(_ context.Context, name string) error {
	if name == "nobody" {
		return bus.Errorf(bus.CodeNoSuchVM, "no such VM")
	}
	return nil
}

func (r *fakeRegistry) RekeyVM(_ context.Context, name string) ([]byte, error) {
	return []byte("new key of " + name), nil
}

// errorOf gives a call's error as "name: text", the name without its namespace.
func errorOf(err error) string {
	var e dbus.Error
	if !errors.As(err, &e) {
		return fmt.Sprint(err)
	}
	name := e.Name[strings.LastIndexByte(e.Name, '.')+1:]
	return name + ": " + e.Error()
}
