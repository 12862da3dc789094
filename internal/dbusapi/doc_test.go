package dbusapi

import (
	"testing"

	"github.com/godbus/dbus/v5"
)

func TestVMPath(t *testing.T) {
	for name, want := range map[string]dbus.ObjectPath{
		"web1":    "/org/castra/Bus1/vm/web1",
		"Web-1.a": "/org/castra/Bus1/vm/Web_2d1_2ea",
		"1a":      "/org/castra/Bus1/vm/_31a",
		"a_b":     "/org/castra/Bus1/vm/a_5fb",
		"":        "/org/castra/Bus1/vm/_",
	} {
		got := VMPath(name)
		if got != want || !got.IsValid() {
			t.Errorf("VMPath(%q) = %s, want %s", name, got, want)
		}
		if back, ok := vmOfPath(got); back != name || !ok {
			t.Errorf("vmOfPath(%s) = %q, %t", got, back, ok)
		}
	}
	for _, path := range []dbus.ObjectPath{
		"/", "/org/castra/Bus1", "/org/castra/Bus1/vm", "/org/castra/Bus1/vm/", "/org/castra/Bus1/vm/a/b",
		"/org/castra/Bus1/vm/a_", "/org/castra/Bus1/vm/a_2", "/org/castra/Bus1/vm/a_2D", "/org/castra/Bus1/vm/_61", "/org/castra/Bus1/vm/1a",
	} {
		if name, ok := vmOfPath(path); ok {
			t.Errorf("vmOfPath(%s) = %q", path, name)
		}
	}
}

func FuzzVMOfPath(f *testing.F) {
	f.Add("web_2d1")
	f.Add("_")
	f.Fuzz(func(t *testing.T, label string) {
		path := vmParent + "/" + dbus.ObjectPath(label)
		if name, ok := vmOfPath(path); ok && VMPath(name) != path {
			t.Errorf("%s is %q, whose path is %s", path, name, VMPath(name))
		}
	})
}
