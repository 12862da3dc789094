package dbusapi

import (
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/godbus/dbus/v5/introspect"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

type vars = map[string]dbus.Variant

// variants wraps the values of m.
func variants(m map[string]any) vars {
	out := make(vars)
	for k, v := range m {
		out[k] = dbus.MakeVariant(v)
	}
	return out
}

func TestErrorName(t *testing.T) {
	for code, want := range map[bus.Code]string{
		bus.CodeRateLimited: "RateLimited", bus.CodeTooManySubscriptions: "TooManySubscriptions",
		bus.CodeNoSuchVM: "NoSuchVM", bus.CodeVMExists: "VMExists", bus.CodeInternal: "Internal",
		bus.CodeInvalidArg: "InvalidArgument",
	} {
		if got := ErrorName(code); got != "org.castra.Bus1.Error."+want {
			t.Errorf("%s is %s", code, got)
		}
	}
}

func TestPublish(t *testing.T) {
	b, f := newBus(t, openPolicy), newFakeBus()
	b.serve(Options{Bus: f}, quick())
	m := manager(b.client())
	big := `"` + strings.Repeat("x", wire.MaxPayload-2) + `"`
	for _, tt := range []struct {
		name, topic, payload string
		options              map[string]any
		want                 bus.PublishRequest
		err                  string
	}{
		{name: "plain", topic: "a.b", payload: ` { "n" : 1.50 } `, want: bus.PublishRequest{Topic: "a.b", Payload: []byte(`{"n":1.50}`)}},
		{
			name: "options", topic: "vm:web1/x", payload: "null", options: map[string]any{"id": "i", "reply": "r"},
			want: bus.PublishRequest{Topic: "vm:web1/x", Payload: []byte("null"), ID: "i", Reply: "r"},
		},
		{name: "largest", topic: "t", payload: "  " + big, want: bus.PublishRequest{Topic: "t", Payload: []byte(big)}},
		{name: "too large", topic: "t", payload: big + " 1", err: "InvalidArgument: the payload is no JSON value"},
		{name: "one byte too large", topic: "t", payload: `"x` + big[1:], err: "TooLarge: the payload has 61441 bytes without white space"},
		{name: "far too large", topic: "t", payload: strings.Repeat(" ", maxRawPayload) + "1", err: "TooLarge: the payload has 1048577 bytes; "},
		{name: "no topic", payload: "1", err: `BadTopic: topic "" is none`},
		{name: "bad topic", topic: "a b", payload: "1", err: `BadTopic: topic "a b" is none`},
		{name: "bad reply", topic: "a", payload: "1", options: map[string]any{"reply": "vm:"}, err: `BadTopic: reply "vm:" is none`},
		{name: "no JSON", topic: "a", payload: "hello", err: "InvalidArgument: the payload is no JSON value"},
		{name: "empty", topic: "a", payload: "", err: "InvalidArgument: the payload is no JSON value"},
		{name: "empty id", topic: "a", payload: "1", options: map[string]any{"id": ""}, err: "InvalidArgument: id must have 1 to 128 bytes, not 0"},
		{name: "long id", topic: "a", payload: "1", options: map[string]any{"id": strings.Repeat("i", 129)}, err: "InvalidArgument: id must have 1 to 128 bytes, not 129"},
		{name: "unknown option", topic: "a", payload: "1", options: map[string]any{"id": "x", "ID": "y", "zz": 1}, err: `InvalidArgument: unknown options ["ID" "zz"]`},
		{name: "wrong type", topic: "a", payload: "1", options: map[string]any{"id": 7}, err: `InvalidArgument: option "id" must be of the type s, not i`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var seq uint64
			err := m.Call(ManagerInterface+".Publish", 0, tt.topic, tt.payload, variants(tt.options)).Store(&seq)
			asked := f.asked()
			if tt.err != "" {
				if err == nil || !strings.HasPrefix(errorOf(err), tt.err) || len(asked) != 0 {
					t.Errorf("error %q with %d requests, want %q", errorOf(err), len(asked), tt.err)
				}
				return
			}
			if err != nil || seq != 1 || !reflect.DeepEqual(asked, []bus.PublishRequest{tt.want}) {
				t.Errorf("seq %d, error %v, requests %q", seq, err, asked)
			}
		})
	}

	f.answer(func(context.Context, bus.PublishRequest) (uint64, error) {
		return 0, bus.Errorf(bus.CodeStorageFull, "the disk is full")
	})
	err := m.Call(ManagerInterface+".Publish", 0, "a", "1", vars{}).Err
	if errorOf(err) != "StorageFull: the disk is full" {
		t.Errorf("a refusal is %q", errorOf(err))
	}
	f.answer(func(context.Context, bus.PublishRequest) (uint64, error) {
		return 0, errors.New("bad \xff\x00 thing")
	})
	err = m.Call(ManagerInterface+".Publish", 0, "a", "1", vars{}).Err
	if errorOf(err) != "Internal: bad \uFFFD\uFFFD thing" {
		t.Errorf("an internal error is %q", errorOf(err))
	}
}

func TestWaitAck(t *testing.T) {
	b, f := newBus(t, openPolicy), newFakeBus()
	f.waitAck = func(ctx context.Context, seq uint64) (string, error) {
		if seq == 1 {
			return "web1", nil
		}
		<-ctx.Done()
		return "", ctx.Err()
	}
	b.serve(Options{Bus: f}, quick())
	m := manager(b.client())
	var vm string
	if err := m.Call(ManagerInterface+".WaitAck", 0, uint64(1), ^uint64(0)).Store(&vm); err != nil || vm != "web1" {
		t.Errorf("%q, %v", vm, err)
	}
	err := m.Call(ManagerInterface+".WaitAck", 0, uint64(2), uint64(1000)).Err
	if errorOf(err) != "NoAck: no guest acknowledged record 2 within 1ms" {
		t.Errorf("error %q", errorOf(err))
	}
}

func TestRegistry(t *testing.T) {
	b, r := newBus(t, openPolicy), &fakeRegistry{}
	b.serve(Options{Bus: newFakeBus(), Registry: r}, quick())
	m := manager(b.client())
	var created bool
	var key []byte
	if err := m.Call(ManagerInterface+".AddVM", 0, "web1", variants(map[string]any{"forwards": []string{"tcp:1:2"}})).Store(&created, &key); err != nil || !created || string(key) != "key of web1" {
		t.Errorf("add: %t %q %v", created, key, err)
	}
	if err := m.Call(ManagerInterface+".AddVM", 0, "there", variants(map[string]any{"no-key": true, "if-missing": true})).Store(&created, &key); err != nil || created || len(key) != 0 {
		t.Errorf("add if missing: %t %q %v", created, key, err)
	}
	want := []bus.AddVMRequest{{Name: "web1", Forwards: []string{"tcp:1:2"}}, {Name: "there", NoKey: true, IfMissing: true}}
	if got := r.asked(); !reflect.DeepEqual(got, want) {
		t.Errorf("the registry was asked %+v", got)
	}
	if err := m.Call(ManagerInterface+".RemoveVM", 0, "web1").Err; err != nil {
		t.Error(err)
	}
	if err := m.Call(ManagerInterface+".RekeyVM", 0, "web1").Store(&key); err != nil || string(key) != "new key of web1" {
		t.Errorf("rekey: %q %v", key, err)
	}
	for want, call := range map[string]*dbus.Call{
		"VMExists: there is registered":                          m.Call(ManagerInterface+".AddVM", 0, "there", vars{}),
		"NoSuchVM: no such VM":                                   m.Call(ManagerInterface+".RemoveVM", 0, "nobody"),
		"InvalidName: the name \"HOST\" is the host's own":       m.Call(ManagerInterface+".AddVM", 0, "HOST", vars{}),
		"InvalidName: \"../x\" is no VM's name":                  m.Call(ManagerInterface+".RekeyVM", 0, "../x"),
		"InvalidArgument: unknown options [\"nokey\"]":           m.Call(ManagerInterface+".AddVM", 0, "w", variants(map[string]any{"nokey": true})),
		"InvalidArgument: RemoveVM takes arguments of the types": m.Call(ManagerInterface+".RemoveVM", 0, "w", "x"),
	} {
		if got := errorOf(call.Err); call.Err == nil || !strings.HasPrefix(got, want) {
			t.Errorf("error %q, want %q", got, want)
		}
	}
}

func TestNoRegistry(t *testing.T) {
	b, f := newBus(t, openPolicy), newFakeBus()
	f.broker.Kind = "guest"
	b.serve(Options{Bus: f}, quick())
	err := manager(b.client()).Call(ManagerInterface+".AddVM", 0, "web1", vars{}).Err
	if errorOf(err) != "NotSupported: castra-guestd admits no VMs; ask castrad, on the host; where that is this machine too: systemctl start castrad" {
		t.Errorf("error %q", errorOf(err))
	}
}

func TestDescribe(t *testing.T) {
	b := newBus(t, openPolicy)
	b.serve(Options{Bus: newFakeBus(bus.VM{VM: "web1", State: "reachable", Reachable: true}, bus.VM{VM: "web2"})}, quick())
	m := manager(b.client())
	var text string
	if err := m.Call(ManagerInterface+".Describe", 0, []string{"web1", "nobody"}).Store(&text); err != nil {
		t.Fatal(err)
	}
	var st bus.Status
	if err := json.Unmarshal([]byte(text), &st); err != nil || len(st.VMs) != 1 || st.VMs[0].VM != "web1" || st.Broker.HeadSeq != 42 {
		t.Errorf("%v: %s", err, text)
	}
	for _, want := range []string{`"refused":[]`, `"subscriptions":[]`, `"capabilities":[]`, `"last_publish_age_ms":null`} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in %s", want, text)
		}
	}
	if err := m.Call(ManagerInterface+".Describe", 0, []string{}).Store(&text); err != nil || !strings.Contains(text, "web2") {
		t.Errorf("all: %v %s", err, text)
	}
}

func TestProperties(t *testing.T) {
	age := int64(1500)
	b := newBus(t, openPolicy)
	b.serve(Options{Bus: newFakeBus(bus.VM{
		VM: "web-1", State: "reachable", Reachable: true, Session: "sess-1", RemoteAddr: "127.0.0.1:9", Keyed: true,
		Subscriptions: []string{"a", "b"}, LastHandshakeAgeMS: &age, Lag: 3, Published: 4, RateLimited: 5, Superseded: 6, Contended: true,
	})}, quick())
	c := b.client()
	get := func(path dbus.ObjectPath, name string) any {
		v, err := c.Object(BusName, path).GetProperty(name)
		if err != nil {
			return errorOf(err)
		}
		return v.Value()
	}
	vm := VMPath("web-1")
	for name, want := range map[string]any{
		"Name": "web-1", "Reachable": true, "State": "reachable", "Session": "sess-1", "RemoteAddress": "127.0.0.1:9",
		"Subscriptions": []string{"a", "b"}, "Registered": false, "Keyed": true, "LastPublishTimestamp": uint64(0),
		"Lag": uint64(3), "Published": uint64(4), "RateLimited": uint64(5), "Superseded": uint64(6), "Contended": true,
		"Nothing": "UnknownProperty: " + string(vm) + " has no property org.castra.Bus1.VM.Nothing",
	} {
		if got := get(vm, VMInterface+"."+name); !reflect.DeepEqual(got, want) {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
	at := time.UnixMicro(int64(get(vm, VMInterface+".LastHandshakeTimestamp").(uint64)))
	if since := time.Since(at); since < 1500*time.Millisecond || since > hang {
		t.Errorf("the handshake was %s ago", since)
	}
	for name, want := range map[string]any{
		"Version": "1.2.3", "State": "running", "LogDir": "/l\uFFFDog", "StateDir": "/state", "Listen": []string{"127.0.0.1:7070"},
		"Sessions": uint32(3), "HeadSeq": uint64(42), "Sync": "always", "Faults": [][]any{}, "Limited": map[string]uint64{"max_vms": 1},
	} {
		if got := get(RootPath, ManagerInterface+"."+name); !reflect.DeepEqual(got, want) {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
	const properties = "org.freedesktop.DBus.Properties"
	root := manager(c)
	for want, call := range map[string]*dbus.Call{
		"UnknownObject: there is no VM \"nobody\"":                      c.Object(BusName, VMPath("nobody")).Call(properties+".GetAll", 0, VMInterface),
		"UnknownObject: there is no VM \"\"":                            c.Object(BusName, VMPath("")).Call(properties+".GetAll", 0, VMInterface),
		"PropertyReadOnly: org.castra.Bus1.VM.State cannot be set":      c.Object(BusName, vm).Call(properties+".Set", 0, VMInterface, "State", dbus.MakeVariant("x")),
		"UnknownProperty: /org/castra/Bus1 has no property ":            root.Call(properties+".Set", 0, ManagerInterface, "X", dbus.MakeVariant("x")),
		"InvalidArgs: Get takes arguments of the types \"ss\"":          root.Call(properties+".Get", 0, "x"),
		"UnknownInterface: /org/castra/Bus1 has no interface a.b":       root.Call(properties+".GetAll", 0, "a.b"),
		"UnknownInterface: /org has no interface " + ManagerInterface:   c.Object(BusName, "/org").Call(ManagerInterface+".Describe", 0, []string{}),
		"UnknownObject: there is no object /nowhere":                    c.Object(BusName, "/nowhere").Call(properties+".GetAll", 0, ""),
		"UnknownMethod: /org/castra/Bus1 has no method Nothing":         root.Call(ManagerInterface+".Nothing", 0),
		"UnknownInterface: " + string(vm) + " has no interface":         c.Object(BusName, vm).Call(ManagerInterface+".Describe", 0, []string{}),
		"UnknownMethod: /org/castra/Bus1/vm has no method Nothing":      c.Object(BusName, "/org/castra/Bus1/vm").Call("Nothing", 0),
		"InvalidArgument: Describe takes arguments of the types \"as\"": root.Call(ManagerInterface+".Describe", 0),
	} {
		if got := errorOf(call.Err); call.Err == nil || !strings.HasPrefix(got, want) {
			t.Errorf("error %q, want %q", got, want)
		}
	}
	if err := root.Call("Describe", 0, []string{}).Err; err != nil {
		t.Errorf("a call without an interface: %v", err)
	}
	var id string
	if err := c.Object(BusName, "/any/path").Call("org.freedesktop.DBus.Peer.GetMachineId", 0).Store(&id); err == nil {
		if want, _ := os.ReadFile("/etc/machine-id"); id != strings.TrimSpace(string(want)) {
			t.Errorf("machine id %q, want %q", id, want)
		}
	} else if !strings.HasPrefix(errorOf(err), "FileNotFound") {
		t.Error(err)
	}
	if err := c.Object(BusName, "/any/path").Call("org.freedesktop.DBus.Peer.Ping", 0).Err; err != nil {
		t.Error(err)
	}
}

// introspectAt reads an object's description off the bus.
func introspectAt(t *testing.T, c *dbus.Conn, path dbus.ObjectPath) introspect.Node {
	t.Helper()
	var text string
	if err := c.Object(BusName, path).Call("org.freedesktop.DBus.Introspectable.Introspect", 0).Store(&text); err != nil {
		t.Fatal(err)
	}
	var node introspect.Node
	if err := xml.Unmarshal([]byte(text), &node); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	return node
}

// TestIntrospection compares what objects say of themselves with the tables of
// methods, with the values of their properties, and with docs/dbus.
func TestIntrospection(t *testing.T) {
	b := newBus(t, openPolicy)
	b.serve(Options{Bus: newFakeBus(bus.VM{VM: "web1"}, bus.VM{VM: "web-2"})}, quick())
	c := b.client()

	path := dbus.ObjectPath("/")
	for _, want := range []string{"org", "castra", "Bus1", "vm"} {
		if node := introspectAt(t, c, path); len(node.Children) != 1 || node.Children[0].Name != want {
			t.Errorf("%s has the children %v, want %s", path, node.Children, want)
		}
		path = dbus.ObjectPath(strings.TrimSuffix(string(path), "/") + "/" + want)
	}
	if node := introspectAt(t, c, path); len(node.Children) != 2 || node.Children[0].Name != "web1" || node.Children[1].Name != "web_2d2" {
		t.Errorf("the VMs are %v", node.Children)
	}
	if err := c.Object(BusName, VMPath("nobody")).Call("org.freedesktop.DBus.Introspectable.Introspect", 0).Err; err == nil {
		t.Error("a VM that is not there describes itself")
	}

	raw, err := os.ReadFile("../../docs/dbus/org.castra.Bus1.xml")
	if err != nil {
		t.Fatal(err)
	}
	var doc introspect.Node
	if err := xml.Unmarshal(raw, &doc); err != nil || len(doc.Children) != 1 {
		t.Fatalf("docs/dbus: %v, %d children", err, len(doc.Children))
	}
	for path, documented := range map[dbus.ObjectPath]introspect.Node{RootPath: doc, VMPath("web1"): doc.Children[0]} {
		live := introspectAt(t, c, path)
		if !reflect.DeepEqual(live.Interfaces, documented.Interfaces) {
			t.Errorf("docs/dbus/org.castra.Bus1.xml does not describe %s as it is:\n%s", path, descriptions)
		}
		for _, i := range live.Interfaces {
			compareMethods(t, i)
			props, _ := getAll(c, path, i.Name)
			if len(props) != len(i.Properties) {
				t.Errorf("%s has %d properties, and describes %d", i.Name, len(props), len(i.Properties))
			}
			for _, p := range i.Properties {
				if got := props[p.Name].Signature().String(); got != p.Type {
					t.Errorf("%s.%s is a %q, and described as %q", i.Name, p.Name, got, p.Type)
				}
				described := len(p.Annotations) == 0
				if n := slices.IndexFunc(vmProperties, func(v property[bus.VM]) bool { return v.name == p.Name }); i.Name == VMInterface && vmProperties[n].emitted != described {
					t.Errorf("%s is emitted: %t, and described so: %t", p.Name, !described, described)
				}
			}
		}
	}
}

func compareMethods(t *testing.T, i introspect.Interface) {
	t.Helper()
	described := make(map[string]string)
	for _, m := range i.Methods {
		in := ""
		for _, a := range m.Args {
			if a.Direction == "in" {
				in += a.Type
			}
		}
		described[m.Name] = in
	}
	served := make(map[string]string)
	for _, m := range methods[i.Name] {
		served[m.name] = m.in
	}
	if !reflect.DeepEqual(described, served) {
		t.Errorf("%s describes %v and has %v", i.Name, described, served)
	}
}

func getAll(c *dbus.Conn, path dbus.ObjectPath, iface string) (vars, error) {
	call := c.Object(BusName, path).Call("org.freedesktop.DBus.Properties.GetAll", 0, iface)
	if call.Err != nil {
		return nil, call.Err
	}
	return call.Body[0].(map[string]dbus.Variant), nil // Store would make a(sssss) aav
}

func TestBusctl(t *testing.T) {
	b := newBus(t, openPolicy)
	b.serve(Options{Bus: newFakeBus(bus.VM{VM: "web-1", State: "reachable"})}, quick())
	b.client()
	if out := b.busctl("tree", BusName); !strings.Contains(out, "/org/castra/Bus1/vm/web_2d1") {
		t.Errorf("tree: %s", out)
	}
	out := b.busctl("introspect", BusName, string(RootPath))
	for _, want := range []string{".Publish ", "ssa{sv}", ".HeadSeq ", "42", "const"} {
		if !strings.Contains(out, want) {
			t.Errorf("introspect: no %q in %s", want, out)
		}
	}
	if out := b.busctl("introspect", BusName, string(VMPath("web-1"))); !strings.Contains(out, `"reachable"`) {
		t.Errorf("introspect: %s", out)
	}
	if out := b.busctl("call", BusName, string(RootPath), ManagerInterface, "Publish", "ssa{sv}", "t", "1", "1", "id", "s", "x"); out != "t 1\n" {
		t.Errorf("call: %s", out)
	}
	if out := b.busctl("get-property", BusName, string(VMPath("web-1")), VMInterface, "State"); out != "s \"reachable\"\n" {
		t.Errorf("get-property: %s", out)
	}
}
