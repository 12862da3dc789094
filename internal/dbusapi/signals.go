package dbusapi

import (
	"reflect"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/token"
)

// statusChunk is how many VMs are looked up at a time for signals.
const statusChunk = 256

// dirtySet holds the names of VMs that changed since they were signalled last. It
// keeps names and no states, so what is signalled is always how things are: a bus
// that is slow sees fewer signals, never old ones, and the broker never waits.
type dirtySet struct {
	mu     sync.Mutex
	names  map[string]struct{} // nil: nobody is told, and nothing kept
	wakeUp chan struct{}       // capacity 1: somebody marked since the last take
}

func newDirtySet() *dirtySet { return &dirtySet{wakeUp: make(chan struct{}, 1)} }

// mark notes a change of a VM. It never waits.
func (d *dirtySet) mark(name string) {
	d.mu.Lock()
	wanted := d.names != nil
	if wanted {
		d.names[name] = struct{}{}
	}
	d.mu.Unlock()
	if wanted {
		token.Leave(d.wakeUp)
	}
}

// theBus is what the bus itself is known by among its VMs: no VM has this name.
const theBus = ""

// start begins to note changes and returns what is known without any.
func (d *dirtySet) start(b Bus) map[string]emitted {
	d.mu.Lock()
	d.names = make(map[string]struct{})
	d.mu.Unlock()
	known := make(map[string]emitted)
	st := b.Status(nil)
	for _, vm := range st.VMs {
		known[vm.VM] = emittedOf(vmProperties, &vm)
	}
	known[theBus] = emittedOf(managerProperties, &st.Broker)
	return known
}

// stop notes changes no more.
func (d *dirtySet) stop() {
	d.mu.Lock()
	d.names = nil
	d.mu.Unlock()
}

// take returns up to n names, which then are clean.
func (d *dirtySet) take(n int) []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []string
	for name := range d.names {
		if len(out) == n {
			break
		}
		out = append(out, name)
		delete(d.names, name)
	}
	return out
}

// emitted is what PropertiesChanged has told of an object: the values of the
// emitted properties, in their order.
type emitted []any

func emittedOf[T any](props []property[T], of *T) emitted {
	var out emitted
	for _, p := range props {
		if p.emitted {
			out = append(out, p.get(of, time.Time{})) // none of them is a time
		}
	}
	return out
}

// changed gives the properties in which now differs from was.
func changed[T any](props []property[T], was, now emitted) map[string]dbus.Variant {
	out := make(map[string]dbus.Variant)
	i := 0
	for _, p := range props {
		if !p.emitted {
			continue
		}
		if !reflect.DeepEqual(was[i], now[i]) {
			out[p.name] = dbus.MakeVariant(now[i])
		}
		i++
	}
	return out
}

// signalChanges emits the signals of all VMs, from known on, until the link ends.
func (l *link) signalChanges(known map[string]emitted) {
	for {
		select {
		case <-l.srv.dirty.wakeUp:
		case <-l.soft.Done():
			return
		}
		for names := l.srv.dirty.take(statusChunk); len(names) > 0 && l.soft.Err() == nil; names = l.srv.dirty.take(statusChunk) {
			there := make(map[string]*bus.VM, len(names))
			st := l.srv.opts.Bus.Status(names)
			for i := range st.VMs {
				there[st.VMs[i].VM] = &st.VMs[i]
			}
			err := l.signalBus(known, &st.Broker)
			for _, name := range names {
				if err == nil && name != theBus {
					err = l.signalChange(known, name, there[name])
				}
			}
			if err != nil {
				// Watchers would be left with old states; with the name they see
				// that they must look again.
				l.conn.sock.Close()
				return
			}
		}
	}
}

// signalBus emits what differs between known and b. A guest's daemon tells of its
// VM alone, whose changes are most of its own: so it is called at each change.
func (l *link) signalBus(known map[string]emitted, b *bus.Broker) error {
	was, now := known[theBus], emittedOf(managerProperties, b)
	known[theBus] = now
	return l.signalProperties(RootPath, ManagerInterface, changed(managerProperties, was, now))
}

func (l *link) signalProperties(path dbus.ObjectPath, iface string, changed map[string]dbus.Variant) error {
	if len(changed) == 0 {
		return nil
	}
	return l.conn.emit(path, ifaceProperties, "PropertiesChanged", iface, changed, []string{})
}

// signalChange emits what differs between known and vm, which is nil if there is
// no such VM.
func (l *link) signalChange(known map[string]emitted, name string, vm *bus.VM) error {
	was, had := known[name]
	path := VMPath(name)
	if vm == nil {
		if !had {
			return nil
		}
		delete(known, name)
		if err := l.conn.emit(RootPath, ifaceObjects, "InterfacesRemoved", path, []string{VMInterface}); err != nil {
			return err
		}
		return l.conn.emit(RootPath, ManagerInterface, "VMRemoved", text(name), path)
	}
	now := emittedOf(vmProperties, vm)
	known[name] = now
	if !had {
		if err := l.conn.emit(RootPath, ifaceObjects, "InterfacesAdded", path, interfacesOf(vm)); err != nil {
			return err
		}
		return l.conn.emit(RootPath, ManagerInterface, "VMNew", text(name), path)
	}
	return l.signalProperties(path, VMInterface, changed(vmProperties, was, now))
}
