package dbusclient_test

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/dbusapi"
	"github.com/castrabus/castra/internal/dbusclient"
)

// hang is how long a test waits for what must happen. It asserts nothing: it only
// turns a hang into a failure.
const hang = 30 * time.Second

const openPolicy = `<policy context="default">
<allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/><allow user="*"/>
</policy>`

// startBus starts a message bus of the test's own and returns its address and what
// ends it early. rest is what its configuration holds besides an address.
func startBus(t *testing.T, rest string) (address string, stop func()) {
	t.Helper()
	dir, err := os.MkdirTemp("", "castra-bus") // short: a socket's path has 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	address = "unix:path=" + filepath.Join(dir, "bus")
	config := `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><listen>` + address + `</listen><auth>EXTERNAL</auth>` + rest + `</busconfig>`
	if err := os.WriteFile(filepath.Join(dir, "config"), []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("dbus-daemon", "--nofork", "--nopidfile", "--print-address", "--config-file="+filepath.Join(dir, "config"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // a test that panics cleans nothing up
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("starting a message bus: %v (apt-get install dbus-daemon)", err)
	}
	stop = sync.OnceFunc(func() {
		cmd.Process.Kill()
		cmd.Wait()
		os.RemoveAll(dir)
	})
	t.Cleanup(stop)
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		stop()
		t.Fatalf("the message bus gave no address: %v: %s", err, said.String())
	}
	return address, stop
}

// fake is a daemon whose answers are the test's. What is nil answers with nothing.
type fake struct {
	publish func(bus.PublishRequest) (uint64, error)
	waitAck func(ctx context.Context, seq uint64) (string, error)
	tail    func(ctx context.Context, req bus.TailRequest, w io.Writer) error

	mu      sync.Mutex
	vms     []bus.VM
	watcher func(bus.VM, bool)
	request any // of the last call
}

func (f *fake) note(request any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.request = request
}

func (f *fake) noted() any {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.request
}

func (f *fake) Publish(_ context.Context, req bus.PublishRequest) (uint64, error) {
	f.note(req)
	if f.publish == nil {
		return 0, nil
	}
	return f.publish(req)
}

func (f *fake) WaitAck(ctx context.Context, seq uint64) (string, error) { return f.waitAck(ctx, seq) }

func (f *fake) Tail(ctx context.Context, req bus.TailRequest, w io.Writer) error {
	f.note(req)
	return f.tail(ctx, req, w)
}

func (f *fake) Status(names []string) bus.Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	st := bus.Status{Broker: bus.Broker{Kind: "host", LogDir: "/log"}}
	for _, vm := range f.vms {
		if len(names) == 0 || strings.Contains(strings.Join(names, " "), vm.VM) {
			st.VMs = append(st.VMs, vm)
		}
	}
	return st
}

func (f *fake) Watch(fn func(bus.VM, bool)) func() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.watcher = fn
	return func() {}
}

func (f *fake) AddVM(_ context.Context, req bus.AddVMRequest) (bool, []byte, error) {
	f.note(req)
	return true, []byte("key"), nil
}

func (f *fake) RemoveVM(_ context.Context, name string) error {
	return bus.Errorf(bus.CodeNoSuchVM, "there is no %s", name)
}

func (f *fake) RekeyVM(context.Context, string) ([]byte, error) { return []byte("new"), nil }

// serve puts f on the bus.
func (f *fake) serve(t *testing.T, address string) *dbusapi.Server {
	t.Helper()
	s, err := dbusapi.Start(t.Context(), dbusapi.Options{Address: address, Bus: f, Registry: f, OnState: func(owned bool, err error) {
		if err != nil {
			t.Logf("owned %t: %v", owned, err)
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func dial(t *testing.T, opts dbusclient.Options) *dbusclient.Client {
	t.Helper()
	c, err := dbusclient.Dial(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// receive takes the next value, or fails the test.
func receive[T any](t *testing.T, ch <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-ch:
	case <-time.After(hang):
		t.Fatal("nothing came")
	}
	return v
}
