package dbusclient_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/dbusclient"
)

func TestCalls(t *testing.T) {
	address, _ := startBus(t, openPolicy)
	age := int64(7)
	f := &fake{
		vms:     []bus.VM{{VM: "web1", Reachable: true, LastPublishAgeMS: &age}, {VM: "web2"}},
		publish: func(bus.PublishRequest) (uint64, error) { return 42, nil },
		waitAck: func(ctx context.Context, seq uint64) (string, error) {
			if seq == 42 {
				return "web1", nil
			}
			<-ctx.Done()
			return "", ctx.Err()
		},
	}
	f.serve(t, address)
	c, ctx := dial(t, dbusclient.Options{Address: address}), t.Context()

	for _, req := range []bus.PublishRequest{
		{Topic: "a", Payload: []byte("1")},
		{Topic: "a", Payload: []byte(`{"x":"é"}`), ID: "i", Reply: "r"},
	} {
		if seq, err := c.Publish(ctx, req); seq != 42 || err != nil || !reflect.DeepEqual(f.noted(), req) {
			t.Errorf("publish: %d, %v, asked %+v", seq, err, f.noted())
		}
	}
	if vm, err := c.WaitAck(ctx, 42, time.Second); vm != "web1" || err != nil {
		t.Errorf("wait: %q, %v", vm, err)
	}
	_, err := c.WaitAck(ctx, 1, time.Millisecond)
	if e, ok := errors.AsType[*bus.Error](err); !ok || e.Code != bus.CodeNoAck {
		t.Errorf("wait for none: %v", err)
	}
	if st, err := c.Describe(ctx); err != nil || len(st.VMs) != 2 || *st.VMs[0].LastPublishAgeMS != 7 || st.Broker.LogDir != "/log" {
		t.Errorf("describe: %+v, %v", st, err)
	}
	if st, err := c.Describe(ctx, "web2"); err != nil || len(st.VMs) != 1 || st.VMs[0].VM != "web2" {
		t.Errorf("describe one: %+v, %v", st, err)
	}
	for _, req := range []bus.AddVMRequest{{Name: "x"}, {Name: "x", NoKey: true, IfMissing: true, Forwards: []string{"tcp:1:2"}}} {
		if created, key, err := c.AddVM(ctx, req); !created || string(key) != "key" || err != nil || !reflect.DeepEqual(f.noted(), req) {
			t.Errorf("add: %t, %q, %v, asked %+v", created, key, err, f.noted())
		}
	}
	if key, err := c.RekeyVM(ctx, "x"); string(key) != "new" || err != nil {
		t.Errorf("rekey: %q, %v", key, err)
	}
	err = c.RemoveVM(ctx, "x")
	if e, ok := errors.AsType[*bus.Error](err); !ok || *e != (bus.Error{Code: bus.CodeNoSuchVM, Reason: "there is no x"}) {
		t.Errorf("remove: %v", err)
	}
}

func TestCodesComeBack(t *testing.T) {
	address, _ := startBus(t, openPolicy)
	f := &fake{publish: func(req bus.PublishRequest) (uint64, error) {
		return 0, bus.Errorf(bus.Code(req.Topic), "because")
	}}
	f.serve(t, address)
	c := dial(t, dbusclient.Options{Address: address})
	for _, code := range []bus.Code{
		bus.CodeBadTopic, bus.CodeForbidden, bus.CodeTooManySubscriptions, bus.CodeRateLimited, bus.CodeStorageFull, bus.CodeUnsupportedType,
		bus.CodeTooLarge, bus.CodeStorageStalled, bus.CodeBadFrame, bus.CodeNoSuchVM, bus.CodeVMExists, bus.CodePortTaken, bus.CodeInvalidName, bus.CodeInvalidArg,
		bus.CodeAccessDenied, bus.CodeNoAck, bus.CodeShuttingDown, bus.CodeNotHere, bus.CodeInternal,
	} {
		_, err := c.Publish(t.Context(), bus.PublishRequest{Topic: string(code), Payload: []byte("1")})
		if e, ok := errors.AsType[*bus.Error](err); !ok || *e != (bus.Error{Code: code, Reason: "because"}) {
			t.Errorf("%s came back as %v", code, err)
		}
	}
}

func TestNobodyAnswers(t *testing.T) {
	address, stop := startBus(t, openPolicy)
	for _, start := range []bool{false, true} {
		_, err := dial(t, dbusclient.Options{Address: address, Start: start}).Describe(t.Context())
		if !errors.Is(err, dbusclient.ErrNotRunning) || err.Error() != "castrad is not running; start it with: systemctl start castrad" {
			t.Errorf("start %t: %v", start, err)
		}
	}
	c := dial(t, dbusclient.Options{Address: address, Daemon: "castra-guestd"})
	if _, err := c.Describe(t.Context()); !strings.HasPrefix(err.Error(), "castra-guestd is not running") {
		t.Error(err)
	}
	stop()
	for end := time.Now().Add(hang); ; time.Sleep(time.Millisecond) { // the client hears of it a little later
		_, err := c.Describe(t.Context())
		if errors.Is(err, dbusclient.ErrNoBus) && strings.Contains(err.Error(), "went away") {
			break
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	if _, err := dbusclient.Dial(t.Context(), dbusclient.Options{Address: address}); !errors.Is(err, dbusclient.ErrNoBus) || !strings.Contains(err.Error(), "systemctl start dbus") {
		t.Error(err)
	}
}

// TestHungBus dials what accepts and never answers.
func TestHungBus(t *testing.T) {
	path := filepath.Join(t.TempDir(), "bus")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := dbusclient.Dial(ctx, dbusclient.Options{Address: "unix:path=" + path}); !errors.Is(err, dbusclient.ErrNoBus) {
		t.Errorf("error %v", err)
	}
}

// TestStart has a bus that can start the service, with a program that leaves a trace
// and fails.
func TestStart(t *testing.T) {
	dir := t.TempDir()
	trace := filepath.Join(dir, "trace")
	service := "[D-BUS Service]\nName=org.castra.Bus1\nExec=/bin/sh -c \"touch " + trace + "; exit 3\"\n"
	if err := os.WriteFile(filepath.Join(dir, "x.service"), []byte(service), 0o644); err != nil {
		t.Fatal(err)
	}
	address, _ := startBus(t, openPolicy+"<servicedir>"+dir+"</servicedir>")
	_, err := dial(t, dbusclient.Options{Address: address}).Describe(t.Context())
	if !errors.Is(err, dbusclient.ErrNotRunning) || !strings.Contains(err.Error(), "is not running") {
		t.Errorf("looking: %v", err)
	}
	if _, err := os.Stat(trace); err == nil {
		t.Error("looking started the service")
	}
	_, err = dial(t, dbusclient.Options{Address: address, Start: true}).Describe(t.Context())
	if !errors.Is(err, dbusclient.ErrNotRunning) || !strings.HasPrefix(err.Error(), "castrad could not be started (") || !strings.HasSuffix(err.Error(), "journalctl -u castrad") {
		t.Errorf("starting: %v", err)
	}
	if _, err := os.Stat(trace); err != nil {
		t.Error("the service was not started")
	}
}

func TestPolicyRefuses(t *testing.T) {
	address, _ := startBus(t, openPolicy+`<policy context="mandatory"><deny send_destination="org.castra.Bus1"/></policy>`)
	(&fake{}).serve(t, address)
	_, err := dial(t, dbusclient.Options{Address: address}).Describe(t.Context())
	e, ok := errors.AsType[*bus.Error](err)
	if !ok || e.Code != bus.CodeAccessDenied || !strings.Contains(e.Reason, "org.castra.Bus1.conf, belongs into") {
		t.Errorf("error %v", err)
	}
}

// other is a daemon that has none of our methods.
type other struct{}

func TestAnotherVersion(t *testing.T) {
	address, _ := startBus(t, openPolicy)
	conn, err := dbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.Export(other{}, "/org/castra/Bus1", "org.castra.Bus1.Manager"); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.RequestName("org.castra.Bus1", 0); err != nil {
		t.Fatal(err)
	}
	_, err = dial(t, dbusclient.Options{Address: address}).Describe(t.Context())
	if err == nil || !strings.HasSuffix(err.Error(), "restart it with: systemctl restart castrad") {
		t.Errorf("error %v", err)
	}
}

func TestTail(t *testing.T) {
	address, _ := startBus(t, openPolicy)
	f := &fake{tail: func(ctx context.Context, req bus.TailRequest, w io.Writer) error {
		for n := range 3000 {
			if _, err := fmt.Fprintf(w, "%100d\n", n); err != nil {
				return err
			}
		}
		if req.Follow {
			<-ctx.Done()
		}
		return nil
	}}
	s := f.serve(t, address)
	c := dial(t, dbusclient.Options{Address: address})
	for _, req := range []bus.TailRequest{
		{},
		{Topics: []string{"a", "b.>"}, VM: "web1", Lines: 7, Until: time.UnixMicro(5)},
		{All: true},
		{From: 9},
		{Since: time.UnixMicro(1_234_567)},
	} {
		r, err := c.Tail(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err != nil || len(got) != 3000*101 || !reflect.DeepEqual(f.noted(), req) {
			t.Errorf("%d bytes, %v; asked %+v, want %+v", len(got), err, f.noted(), req)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}

	// follow reads a tail that does not end by itself, until end ends it.
	follow := func(end func(cancel func(), r io.Closer)) error {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		r, err := c.Tail(ctx, bus.TailRequest{Follow: true})
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		done := make(chan error, 1) // one result
		go func() {
			_, err := io.Copy(io.Discard, r)
			done <- err
		}()
		end(cancel, r)
		return receive(t, done)
	}
	if err := follow(func(cancel func(), _ io.Closer) { cancel() }); !errors.Is(err, os.ErrClosed) {
		t.Errorf("the context ends: %v", err)
	}
	if err := follow(func(_ func(), r io.Closer) { r.Close() }); !errors.Is(err, os.ErrClosed) {
		t.Errorf("the reader is closed: %v", err)
	}
	if err := follow(func(func(), io.Closer) { s.Close() }); err != nil {
		t.Errorf("the daemon ends: %v", err)
	}
	if _, err := c.Tail(t.Context(), bus.TailRequest{}); !errors.Is(err, dbusclient.ErrNotRunning) {
		t.Errorf("without a daemon: %v", err)
	}
}

func TestWatchVMs(t *testing.T) {
	address, stop := startBus(t, openPolicy)
	f := &fake{}
	c := dial(t, dbusclient.Options{Address: address})
	ctx, cancel := context.WithCancel(t.Context())
	changes, err := c.WatchVMs(ctx)
	if err != nil {
		t.Fatal(err)
	}
	s := f.serve(t, address)
	receive(t, changes) // the daemon came
	f.mu.Lock()
	f.vms = []bus.VM{{VM: "web1", State: "reachable"}}
	f.mu.Unlock()
	f.watcher(f.vms[0], false)
	receive(t, changes) // a VM
	s.Close()
	receive(t, changes) // the daemon left
	cancel()
	stop()
}

// unit stands in for systemd's units.
type unit struct{ states map[string]string }

func (u unit) LoadUnit(name string) (dbus.ObjectPath, *dbus.Error) {
	if _, ok := u.states[name]; !ok {
		return "", dbus.NewError("org.freedesktop.systemd1.NoSuchUnit", nil)
	}
	return dbus.ObjectPath("/unit/" + strings.NewReplacer(".", "_2e", "-", "_2d").Replace(name)), nil
}

// unitState is an ActiveState, of a service with "again" behind it that of one that systemd has started again.
type unitState string

func (s unitState) Get(_, name string) (dbus.Variant, *dbus.Error) {
	state, again := strings.CutSuffix(string(s), " again")
	if name == "NRestarts" {
		if again {
			return dbus.MakeVariant(uint32(3)), nil
		}
		return dbus.MakeVariant(uint32(0)), nil
	}
	return dbus.MakeVariant(state), nil
}

func TestAbsence(t *testing.T) {
	for _, tt := range []struct {
		socket, service string
		want            dbusclient.Absence
	}{
		{"active", "inactive", dbusclient.Idle},
		{"active", "active", dbusclient.Stopped},
		{"active", "activating", dbusclient.Starting},
		{"active", "activating again", dbusclient.Failing},
		{"inactive", "inactive", dbusclient.Stopped},
		{"failed", "inactive", dbusclient.Stopped},
		{"failed", "failed", dbusclient.Failed},
	} {
		address, _ := startBus(t, openPolicy)
		conn, err := dbus.Connect(address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		u := unit{map[string]string{"castrad.socket": tt.socket, "castrad.service": tt.service, "castra-guestd.socket": tt.socket, "castra-guestd.service": tt.service}}
		if err := conn.Export(u, "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"); err != nil {
			t.Fatal(err)
		}
		for name, state := range u.states {
			path, _ := u.LoadUnit(name)
			if err := conn.Export(unitState(state), path, "org.freedesktop.DBus.Properties"); err != nil {
				t.Fatal(err)
			}
		}
		c := dial(t, dbusclient.Options{Address: address})
		if got := c.Absence(t.Context()); got != dbusclient.Stopped {
			t.Errorf("%s without systemd", got)
		}
		if _, err := conn.RequestName("org.freedesktop.systemd1", 0); err != nil {
			t.Fatal(err)
		}
		if got := c.Absence(t.Context()); got != tt.want {
			t.Errorf("%+v: %s", tt, got)
		}
		if tt.want == dbusclient.Idle {
			tt.want = dbusclient.Stopped // a guest's is never idle
		}
		if got := dial(t, dbusclient.Options{Address: address, Daemon: dbusclient.GuestDaemon}).Absence(t.Context()); got != tt.want {
			t.Errorf("in a guest, %+v: %s", tt, got)
		}
		if got := dial(t, dbusclient.Options{Address: address, Daemon: "other"}).Absence(t.Context()); got != dbusclient.Stopped {
			t.Errorf("a daemon without units is %s", got)
		}
	}
}
