package dbusapi

import (
	"context"
	"slices"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/castrabus/castra/internal/bus"
)

// property is one of T's properties.
type property[T any] struct {
	name    string
	emitted bool // PropertiesChanged carries it
	get     func(of *T, now time.Time) any
}

var managerProperties = []property[bus.Broker]{
	{"Version", false, func(b *bus.Broker, _ time.Time) any { return text(b.Version) }},
	{"State", true, func(b *bus.Broker, _ time.Time) any { return text(b.State) }},
	{"Faults", true, func(b *bus.Broker, _ time.Time) any { return faults(b.Faults) }},
	{"Sync", false, func(b *bus.Broker, _ time.Time) any { return text(b.Sync) }},
	{"LogDir", false, func(b *bus.Broker, _ time.Time) any { return text(b.LogDir) }},
	{"StateDir", false, func(b *bus.Broker, _ time.Time) any { return text(b.StateDir) }},
	{"Listen", false, func(b *bus.Broker, _ time.Time) any { return texts(b.Listen) }},
	{"Sessions", false, func(b *bus.Broker, _ time.Time) any { return uint32(b.Sessions) }},
	{"HeadSeq", false, func(b *bus.Broker, _ time.Time) any { return b.HeadSeq }},
	{"Limited", false, func(b *bus.Broker, _ time.Time) any { return counts(b.Limited) }},
}

var vmProperties = []property[bus.VM]{
	{"Name", false, func(vm *bus.VM, _ time.Time) any { return text(vm.VM) }},
	{"Reachable", true, func(vm *bus.VM, _ time.Time) any { return vm.Reachable }},
	{"State", true, func(vm *bus.VM, _ time.Time) any { return text(vm.State) }},
	{"Session", true, func(vm *bus.VM, _ time.Time) any { return text(vm.Session) }},
	{"RemoteAddress", false, func(vm *bus.VM, _ time.Time) any { return text(vm.RemoteAddr) }},
	{"Subscriptions", true, func(vm *bus.VM, _ time.Time) any { return texts(vm.Subscriptions) }},
	{"Registered", true, func(vm *bus.VM, _ time.Time) any { return vm.Registered }},
	{"Keyed", true, func(vm *bus.VM, _ time.Time) any { return vm.Keyed }},
	{"LastHandshakeTimestamp", false, func(vm *bus.VM, now time.Time) any { return timestamp(vm.LastHandshakeAgeMS, now) }},
	{"LastPublishTimestamp", false, func(vm *bus.VM, now time.Time) any { return timestamp(vm.LastPublishAgeMS, now) }},
	{"LastHeartbeatTimestamp", false, func(vm *bus.VM, now time.Time) any { return timestamp(vm.LastHeartbeatAgeMS, now) }},
	{"Lag", false, func(vm *bus.VM, _ time.Time) any { return vm.Lag }},
	{"Published", false, func(vm *bus.VM, _ time.Time) any { return vm.Published }},
	{"RateLimited", false, func(vm *bus.VM, _ time.Time) any { return vm.RateLimited }},
	{"Superseded", false, func(vm *bus.VM, _ time.Time) any { return vm.Superseded }},
	{"Contended", true, func(vm *bus.VM, _ time.Time) any { return vm.Contended }},
}

// timestamp is when something of that age was, in microseconds since 1970; 0 for
// never.
func timestamp(ageMS *int64, now time.Time) uint64 {
	if ageMS == nil {
		return 0
	}
	return uint64(max(0, now.UnixMicro()-*ageMS*1000))
}

// aFault is a fault on D-Bus, all of it but its age.
type aFault struct{ Part, Cause, Effect, Detail, Advice string }

func faults(in []bus.Fault) []aFault {
	out := make([]aFault, len(in))
	for i, f := range in {
		out[i] = aFault{text(f.Part), text(f.Cause), text(f.Effect), text(f.Detail), text(f.Advice)}
	}
	return out
}

func texts(in []string) []string {
	out := make([]string, len(in))
	for i, s := range in {
		out[i] = text(s)
	}
	return out
}

// counts gives in, also where it is nil.
func counts(in map[string]uint64) map[string]uint64 {
	if in == nil {
		return map[string]uint64{}
	}
	return in
}

// all gives the properties of one object.
func all[T any](props []property[T], of *T) map[string]dbus.Variant {
	now := time.Now()
	out := make(map[string]dbus.Variant, len(props))
	for _, p := range props {
		out[p.name] = dbus.MakeVariant(p.get(of, now))
	}
	return out
}

// interfacesOf gives what ObjectManager says of a VM.
func interfacesOf(vm *bus.VM) map[string]map[string]dbus.Variant {
	return map[string]map[string]dbus.Variant{VMInterface: all(vmProperties, vm)}
}

// propertiesAt gives all properties of the object at path, under the interface
// that has them.
func propertiesAt(b Bus, path dbus.ObjectPath) (iface string, props map[string]dbus.Variant, err error) {
	name, ok := vmOfPath(path)
	if !ok {
		broker := brokerOf(b)
		return ManagerInterface, all(managerProperties, &broker), nil
	}
	vms := b.Status([]string{name}).VMs
	if len(vms) != 1 || name == "" {
		return "", nil, dbusError(errNameObject, "there is no VM %q", name)
	}
	return VMInterface, all(vmProperties, &vms[0]), nil
}

var propertiesMethods = []method{
	{name: "Get", in: "ss", run: getProperty},
	{name: "GetAll", in: "s", run: getAllProperties},
	{name: "Set", in: "ssv", run: setProperty},
}

func getProperty(_ context.Context, c *call, args []any) ([]any, error) {
	v, err := c.property(args[0].(string), args[1].(string))
	return []any{v}, err
}

func (c *call) property(iface, name string) (dbus.Variant, error) {
	has, props, err := propertiesAt(c.link.srv.opts.Bus, c.path)
	if err != nil {
		return dbus.Variant{}, err
	}
	if v, ok := props[name]; ok && (iface == "" || iface == has) {
		return v, nil
	}
	return dbus.Variant{}, dbusError(errNameProperty, "%s has no property %s.%s", c.path, iface, name)
}

func getAllProperties(_ context.Context, c *call, args []any) ([]any, error) {
	has, props, err := propertiesAt(c.link.srv.opts.Bus, c.path)
	if err != nil {
		return nil, err
	}
	if iface := args[0].(string); iface != "" && iface != has {
		if slices.Contains(interfacesAt(c.path), iface) {
			return []any{map[string]dbus.Variant{}}, nil
		}
		return nil, dbusError(errNameInterface, "%s has no interface %s", c.path, iface)
	}
	return []any{props}, nil
}

func setProperty(_ context.Context, c *call, args []any) ([]any, error) {
	if _, err := c.property(args[0].(string), args[1].(string)); err != nil {
		return nil, err
	}
	return nil, dbusError(errNameReadOnly, "%s.%s cannot be set", args[0], args[1])
}

var objectsMethods = []method{
	{name: "GetManagedObjects", in: "", heavy: true, run: getManagedObjects},
}

func getManagedObjects(_ context.Context, c *call, _ []any) ([]any, error) {
	vms := c.link.srv.opts.Bus.Status(nil).VMs
	out := make(map[dbus.ObjectPath]map[string]map[string]dbus.Variant, len(vms))
	for i := range vms {
		out[VMPath(vms[i].VM)] = interfacesOf(&vms[i])
	}
	return []any{out}, nil
}
