package dbusapi

import (
	"reflect"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/castrabus/castra/internal/bus"
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
		select {
		case d.wakeUp <- struct{}{}:
		default:
		}
	}
}

// start begins to note changes and returns what is known without any.
func (d *dirtySet) start(b Bus) map[string]emitted {
	d.mu.Lock()
	d.names = make(map[string]struct{})
	d.mu.Unlock()
	known := make(map[string]emitted)
	for _, vm := range b.Status(nil).VMs {
		known[vm.VM] = emittedOf(&vm)
	}
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

// emitted is what PropertiesChanged has told of a VM: the values of the emitted
// properties, in the order of vmProperties.
type emitted []any

func emittedOf(vm *bus.VM) emitted {
	var out emitted
	for _, p := range vmProperties {
		if p.emitted {
			out = append(out, p.get(vm, time.Time{})) // none of them is a time
		}
	}
	return out
}

// changed gives the properties in which now differs from e.
func (e emitted) changed(now emitted) map[string]dbus.Variant {
	out := make(map[string]dbus.Variant)
	i := 0
	for _, p := range vmProperties {
		if !p.emitted {
			continue
		}
		if !reflect.DeepEqual(e[i], now[i]) {
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
			vms := l.srv.opts.Bus.Status(names).VMs
			for i := range vms {
				there[vms[i].VM] = &vms[i]
			}
			for _, name := range names {
				if err := l.signalChange(known, name, there[name]); err != nil {
					// Watchers would be left with old states; with the name they
					// see that they must look again.
					l.conn.sock.Close()
					return
				}
			}
		}
	}
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
	now := emittedOf(vm)
	known[name] = now
	if !had {
		if err := l.conn.emit(RootPath, ifaceObjects, "InterfacesAdded", path, interfacesOf(vm)); err != nil {
			return err
		}
		return l.conn.emit(RootPath, ManagerInterface, "VMNew", text(name), path)
	}
	if changed := was.changed(now); len(changed) > 0 {
		return l.conn.emit(path, ifaceProperties, "PropertiesChanged", VMInterface, changed, []string{})
	}
	return nil
}
