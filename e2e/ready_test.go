package e2e

import (
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/castrabus/castra/internal/reserve"
)

// Whoever waits for the port, as start-up scripts do, must find castractl served.
func TestPortOpensLast(t *testing.T) {
	l := newLab(t)
	l.hostBus = l.bus("host")
	l.port = reserve.Port(t)
	l.write("castrad.toml", "[broker]\nlisten = [\"127.0.0.1:%d\"]\nvms_dir = %q\n[store]\nstate_dir = %q\nlog_dir = %q\n",
		l.port, l.path("vms.d"), l.path("state"), l.path("log"))
	conn, err := dbus.Connect(l.hostBus)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	l.startCastrad("castrad")
	for end := time.Now().Add(hang); ; { // without a pause: the moment is what matters
		guest, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", l.port))
		if err == nil {
			guest.Close()
			break
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	var owned bool
	if err := conn.BusObject().Call("org.freedesktop.DBus.NameHasOwner", 0, "org.castra.Bus1").Store(&owned); err != nil || !owned {
		t.Errorf("the port is open, and org.castra.Bus1 has no owner: %v", err)
	}
}
