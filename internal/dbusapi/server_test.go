package dbusapi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/castrabus/castra/internal/bus"
)

func owner(c *dbus.Conn) string {
	var name string
	_ = c.BusObject().Call("org.freedesktop.DBus.GetNameOwner", 0, BusName).Store(&name)
	return name
}

func TestNameTaken(t *testing.T) {
	b := newBus(t, openPolicy)
	other := b.client()
	if _, err := other.RequestName(BusName, 0); err != nil {
		t.Fatal(err)
	}
	f := newFakeBus()
	_, err := start(t.Context(), Options{Address: b.address, Bus: f, OnState: func(bool, error) { t.Error("OnState was called") }}, quick())
	if !errors.Is(err, ErrNameTaken) {
		t.Fatalf("error %v", err)
	}
	if len(f.watchers) != 0 {
		t.Error("the bus is still watched")
	}
	// Nor does the server queue for it: the name is nobody's once it is given up.
	if _, err := other.ReleaseName(BusName); err != nil {
		t.Fatal(err)
	}
	if got := owner(other); got != "" {
		t.Errorf("%s owns the name", got)
	}
}

// On a host that is itself a VM castrad takes the name from castra-guestd, whichever
// began first, and castra-guestd never takes it back.
func TestNameYielded(t *testing.T) {
	b := newBus(t, openPolicy)
	onState, told := states()
	h := quick()
	again := make(chan time.Duration) // unbuffered: the server waits for the test
	h.retry = held{t, again}
	b.serve(Options{Bus: newFakeBus(), Yield: true, OnState: onState}, h)
	if got := receive(t, told); got != "true <nil>" {
		t.Fatalf("the guest's daemon was told %q", got)
	}
	b.serve(Options{Bus: newFakeBus()}, quick()) // fails the test if it does not get the name
	until(t, told, "false the message bus went away")
	again <- 0
	if got := receive(t, told); got != "false "+ErrNameTaken.Error() {
		t.Fatalf("the guest's daemon was told %q", got)
	}
	if _, err := start(t.Context(), Options{Address: b.address, Bus: newFakeBus()}, quick()); !errors.Is(err, ErrNameTaken) {
		t.Fatalf("a second castrad: %v", err)
	}
}

func TestCloseGivesTheNameUp(t *testing.T) {
	b, f := newBus(t, openPolicy), newFakeBus()
	s := b.serve(Options{Bus: f}, quick())
	c := b.client()
	if owner(c) == "" {
		t.Fatal("the name is not owned once Start returned")
	}
	s.Close()
	s.Close()
	eventually(t, "the name is given up", func() bool { return owner(c) == "" })
	if len(f.watchers) != 0 {
		t.Error("the bus is still watched")
	}
}

// until waits until OnState is told something that begins with want. How often a
// bus was found missing before that is a matter of luck.
func until(t *testing.T, told <-chan string, want string) {
	t.Helper()
	for got := ""; !strings.HasPrefix(got, want); {
		got = receive(t, told)
	}
}

// TestBusRestart starts with no bus, and loses the one that comes.
func TestBusRestart(t *testing.T) {
	b := newBus(t, openPolicy)
	b.stop()
	onState, told := states()
	f := newFakeBus()
	b.serve(Options{Bus: f, OnState: onState}, quick())
	if first := <-told; !strings.HasPrefix(first, "false connecting to the message bus at "+b.address) {
		t.Fatalf("told %q", first)
	}
	for range 2 {
		b.start()
		until(t, told, "true <nil>")
		c := b.client()
		if err := manager(c).Call(ManagerInterface+".Publish", 0, "t", "1", vars{}).Err; err != nil {
			t.Error(err)
		}
		signals := watch(t, c)
		f.set(bus.VM{VM: "web1", State: "reachable", Reachable: true})
		if got := signal(t, signals); got.Name != ifaceObjects+".InterfacesAdded" {
			t.Errorf("signal %v", got)
		}
		f.set(bus.VM{VM: "web1"})
		b.stop()
		until(t, told, "false the message bus went away")
		until(t, told, "false connecting")
	}
}

func TestNameTakenWhileTheBusWasAway(t *testing.T) {
	b := newBus(t, openPolicy)
	onState, told := states()
	h := quick()
	again := make(chan time.Duration) // unbuffered: the server waits for the test
	h.retry = held{t, again}
	b.serve(Options{Bus: newFakeBus(), OnState: onState}, h)
	receive(t, told)
	b.stop()
	until(t, told, "false the message bus went away")
	b.start()
	other := b.client()
	if _, err := other.RequestName(BusName, 0); err != nil {
		t.Fatal(err)
	}
	again <- 0
	if got := receive(t, told); got != "false "+ErrNameTaken.Error() {
		t.Fatalf("told %q", got)
	}
	other.Close()
	eventually(t, "the name is owned", func() bool {
		select {
		case again <- 0:
		case got := <-told:
			return got == "true <nil>"
		default:
		}
		return false
	})
}

// held is a retry schedule that a test gives out.
type held struct {
	t     *testing.T
	again chan time.Duration
}

// Next gives up where the test has ended: its bus may go before its server does, which
// would then wait for ever.
func (h held) Next() time.Duration {
	select {
	case d := <-h.again:
		return d
	case <-h.t.Context().Done():
		return time.Hour
	}
}

func (held) Reset() {}

// TestPolicy loads the packaged policy into a bus that forbids all else, as the
// system bus does.
func TestPolicy(t *testing.T) {
	file, err := filepath.Abs("../../packaging/dbus/org.castra.Bus1.conf")
	if err != nil {
		t.Fatal(err)
	}
	const closed = `<policy context="default"><allow user="*"/><deny own="*"/><deny send_type="method_call"/>
<allow send_type="signal"/><allow send_requested_reply="true" send_type="method_return"/><allow send_requested_reply="true" send_type="error"/>
<allow receive_type="method_call"/><allow receive_type="method_return"/><allow receive_type="error"/><allow receive_type="signal"/>
<allow send_destination="org.freedesktop.DBus"/></policy>`
	if os.Geteuid() == 0 {
		b := newBus(t, closed+"<include>"+file+"</include>")
		b.serve(Options{Bus: newFakeBus(bus.VM{VM: "web1"})}, quick())
		c := b.client()
		for path, calls := range map[dbus.ObjectPath][]string{
			RootPath: {
				ManagerInterface + ".Nothing", VMInterface + ".Nothing", ifaceProperties + ".Nothing",
				ifaceObjects + ".Nothing", ifaceIntrospect + ".Nothing", ifacePeer + ".Nothing",
			},
		} {
			for _, call := range calls {
				if err := c.Object(BusName, path).Call(call, 0).Err; !strings.HasPrefix(errorOf(err), "Unknown") {
					t.Errorf("%s does not reach the server: %v", call, err)
				}
			}
		}
		if err := manager(c).Call("a.b.c", 0).Err; !strings.HasPrefix(errorOf(err), "AccessDenied") {
			t.Errorf("another interface: %v", err)
		}
	}
	b := newBus(t, closed)
	onState, told := states()
	b.serve(Options{Bus: newFakeBus(), OnState: onState}, quick())
	if got := receive(t, told); !strings.HasPrefix(got, "false the message bus does not let this user own org.castra.Bus1 (its policy file, org.castra.Bus1.conf, belongs into") {
		t.Errorf("without the policy: %q", got)
	}
}

func TestAddresses(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "a b"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	abstract, err := net.Listen("unix", "@"+filepath.Join(dir, "abstract"))
	if err != nil {
		t.Fatal(err)
	}
	defer abstract.Close()
	for address, want := range map[string]string{
		"unix:path=" + dir + "/a%20b":                      "",
		"unix:guid=0123,path=" + dir + "/a%20b,runtime=no": "",
		"tcp:host=x;unix:path=" + dir + "/a%20b":           "",
		"unix:abstract=" + dir + "/abstract":               "",
		"tcp:host=localhost,port=1":                        "nothing else passes file descriptors",
		"unix:tmpdir=/tmp":                                 "has neither path= nor abstract=",
		"unix:path=%zz":                                    "invalid URL escape",
		"unix:path=" + dir + "/none":                       "no such file",
		"":                                                 "not of the form",
	} {
		c, err := dialAddress(t.Context(), address)
		if err == nil {
			c.Close()
		}
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v, want %q", address, err, want)
		}
	}
}

// TestStuckBus has the bus stop reading: nothing of the broker's may wait for it,
// and the server can be closed.
func TestStuckBus(t *testing.T) {
	b, f := newBus(t, openPolicy), newFakeBus(bus.VM{VM: "web1", State: "unreachable"})
	h := quick()
	h.grace = 10 * time.Millisecond
	s := b.serve(Options{Bus: f}, h)
	signals := watch(t, b.client())
	// stick stops the bus while it is being sent more than the sockets hold.
	stick := func() {
		t.Helper()
		if err := b.process.Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		f.mu.Lock()
		before := f.statuses
		f.mu.Unlock()
		f.set(bus.VM{VM: "web1", State: "reachable", Session: strings.Repeat("x", 8<<20)})
		eventually(t, "the change is being signalled", func() bool {
			f.mu.Lock()
			defer f.mu.Unlock()
			return f.statuses > before
		})
	}
	stick()
	for n := range 10_000 {
		f.set(bus.VM{VM: "web1", State: "reachable", Session: fmt.Sprint(n)})
	}
	if err := b.process.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	count := 0
	for session := any(nil); session != "9999"; count++ {
		if v, ok := signal(t, signals).Body[1].(vars)["Session"]; ok {
			session = v.Value()
		}
	}
	if count != 2 {
		t.Errorf("%d signals, and not only the one that stuck and the last state", count)
	}
	stick()
	s.Close()
}

// TestOneWordAChange tries a bus that is not there again and again.
func TestOneWordAChange(t *testing.T) {
	b, h := newBus(t, openPolicy), quick()
	b.stop()
	onState, told := states()
	again := make(chan time.Duration) // unbuffered: the server waits for the test
	h.retry = held{t, again}
	s := b.serve(Options{Bus: newFakeBus(), OnState: onState}, h)
	for range 5 {
		again <- 0
	}
	if len(told) != 1 {
		t.Errorf("told %d times", len(told))
	}
	close(again)
	s.Close()
}

// TestCloseAnswers closes the server while a publish is being carried out.
func TestCloseAnswers(t *testing.T) {
	b, f := newBus(t, openPolicy), newFakeBus()
	begun, finish := make(chan struct{}, 1), make(chan struct{}) // one publish begins
	f.answer(func(ctx context.Context, _ bus.PublishRequest) (uint64, error) {
		begun <- struct{}{}
		<-finish
		return 7, ctx.Err()
	})
	s := b.serve(Options{Bus: f}, quick())
	m := manager(b.client())
	call := m.Go(ManagerInterface+".Publish", 0, make(chan *dbus.Call, 1), "t", "1", vars{})
	receive(t, begun)
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		s.Close()
	}()
	eventually(t, "new calls are refused", func() bool {
		err := m.Call(ManagerInterface+".Describe", 0, []string{}).Err
		return err != nil && errorOf(err) == "ShuttingDown: castrad is stopping; try again"
	})
	close(finish)
	var seq uint64
	if err := receive(t, call.Done).Store(&seq); err != nil || seq != 7 {
		t.Errorf("seq %d, %v", seq, err)
	}
	select {
	case <-closed:
	case <-time.After(hang):
		t.Error("Close hangs")
	}
}
