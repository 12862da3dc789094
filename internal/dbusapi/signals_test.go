package dbusapi

import (
	"fmt"
	"reflect"
	"testing"

	"github.com/godbus/dbus/v5"

	"github.com/castrabus/castra/internal/bus"
)

func TestSignals(t *testing.T) {
	b := newBus(t, openPolicy)
	f := newFakeBus(bus.VM{VM: "old", State: "unreachable"})
	b.serve(Options{Bus: f}, quick())
	signals := watch(t, b.client())
	expect := func(path dbus.ObjectPath, name string, body ...any) {
		t.Helper()
		s := signal(t, signals)
		if s.Path != path || s.Name != name || !reflect.DeepEqual(s.Body, body) {
			t.Errorf("signal %s of %s: %v\nwant   %s of %s: %v", s.Name, s.Path, s.Body, name, path, body)
		}
	}
	path := VMPath("web-1")
	f.set(bus.VM{VM: "web-1", State: "unreachable", Registered: true})
	expect(RootPath, ifaceObjects+".InterfacesAdded", path, map[string]vars{VMInterface: variants(map[string]any{
		"Name": "web-1", "Reachable": false, "State": "unreachable", "Session": "", "RemoteAddress": "", "Subscriptions": []string{},
		"Registered": true, "Keyed": false, "LastHandshakeTimestamp": uint64(0), "LastPublishTimestamp": uint64(0),
		"LastHeartbeatTimestamp": uint64(0), "Lag": uint64(0), "Published": uint64(0), "RateLimited": uint64(0),
		"Superseded": uint64(0), "Contended": false,
	})})
	expect(RootPath, ManagerInterface+".VMNew", "web-1", path)

	f.set(bus.VM{VM: "web-1", State: "reachable", Reachable: true, Session: "sess-1", Registered: true, Lag: 7})
	changed := func(values map[string]any) {
		t.Helper()
		expect(path, ifaceProperties+".PropertiesChanged", VMInterface, variants(values), []string{})
	}
	changed(map[string]any{"State": "reachable", "Reachable": true, "Session": "sess-1"})

	f.set(bus.VM{VM: "web-1", State: "reachable", Reachable: true, Session: "sess-1", Registered: true, Lag: 9}) // nothing to tell
	f.set(bus.VM{VM: "web-1", State: "reachable", Reachable: true, Session: "sess-1", Subscriptions: []string{"a"}, Keyed: true})
	changed(map[string]any{"Subscriptions": []string{"a"}, "Keyed": true, "Registered": false})

	f.set(bus.VM{VM: "web-1"})
	expect(RootPath, ifaceObjects+".InterfacesRemoved", path, []string{VMInterface})
	expect(RootPath, ManagerInterface+".VMRemoved", "web-1", path)

	fault := bus.Fault{Part: "event-log", Cause: "disk full", Effect: "refuses", Detail: "no space", Advice: "make room", AgeMS: 5}
	bus1 := func(state string, all ...aFault) {
		t.Helper()
		expect(RootPath, ifaceProperties+".PropertiesChanged", ManagerInterface, map[string]dbus.Variant{
			"State": dbus.MakeVariant(state), "Faults": dbus.MakeVariantWithSignature(tuples(all), dbus.ParseSignatureMust("a(sssss)")),
		}, []string{})
	}
	f.become("degraded: disk full", fault)
	bus1("degraded: disk full", aFault{"event-log", "disk full", "refuses", "no space", "make room"})
	fault.AgeMS = 1000
	f.become("degraded: disk full", fault) // older is not other
	f.become("running")
	bus1("running")

	f.set(bus.VM{VM: "never"}) // removed, and never there
	f.set(bus.VM{VM: "old", State: "reachable"})
	expect(VMPath("old"), ifaceProperties+".PropertiesChanged", VMInterface, variants(map[string]any{"State": "reachable"}), []string{})
}

// tuples are structs as godbus decodes them.
func tuples(in []aFault) [][]any {
	out := [][]any{}
	for _, f := range in {
		out = append(out, []any{f.Part, f.Cause, f.Effect, f.Detail, f.Advice})
	}
	return out
}

func TestManagedObjects(t *testing.T) {
	b, f := newBus(t, openPolicy), newFakeBus()
	const count = 10_000
	for n := range count {
		name := fmt.Sprintf("vm-%d", n)
		f.vms[name] = bus.VM{VM: name, State: "reachable", Reachable: true, Subscriptions: []string{"broadcast", "vm:" + name}, Published: uint64(n)}
	}
	b.serve(Options{Bus: f}, quick())
	c := b.client()
	var objects map[dbus.ObjectPath]map[string]vars
	if err := manager(c).Call(ifaceObjects+".GetManagedObjects", 0).Store(&objects); err != nil {
		t.Fatal(err)
	}
	if len(objects) != count {
		t.Errorf("%d objects", len(objects))
	}
	for n := range count {
		name := fmt.Sprintf("vm-%d", n)
		props := objects[VMPath(name)][VMInterface]
		if props["Name"].Value() != name || props["Published"].Value() != uint64(n) || len(props) != len(vmProperties) {
			t.Fatalf("%s is %v", name, props)
		}
	}
	var text string
	if err := manager(c).Call(ManagerInterface+".Describe", 0, []string{}).Store(&text); err != nil {
		t.Error(err)
	}
}

func TestDirtySet(t *testing.T) {
	d := newDirtySet()
	d.mark("before")
	if known := d.start(newFakeBus(bus.VM{VM: "web1"})); len(known) != 2 { // and the bus

		t.Errorf("known: %v", known)
	}
	for n := range 300 {
		d.mark(fmt.Sprint(n % 3))
	}
	if got := len(d.take(2)) + len(d.take(2)) + len(d.take(2)); got != 3 {
		t.Errorf("%d names are dirty", got)
	}
	d.mark("web1")
	d.stop()
	d.mark("after") // with no bus to tell, nothing piles up
	if got := d.take(10); got != nil {
		t.Errorf("kept for nobody: %v", got)
	}
}
