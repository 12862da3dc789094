package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/castrabus/castra/internal/reserve"
)

// TestExplain stages the faults that keep a VM off the bus, with real processes, and
// wants the right rung named for each, and what mends it.
func TestExplain(t *testing.T) {
	l := newLab(t)
	l.hostBus, l.port = l.bus("host"), reserve.Port(t)
	// A guest's heartbeat comes every 15 s: 20 s is as soon as silence can be told.
	l.write("castrad.toml", `[broker]
listen = ["127.0.0.1:%d"]
vms_dir = %q
reachable_within = "20s"
[store]
state_dir = %q
log_dir = %q
[limits]
publish_rate = 1
publish_burst = 5
`, l.port, l.path("vms.d"), l.path("state"), l.path("log"))
	castrad := l.startCastrad("castrad")
	l.answers()
	names := []string{"well", "silent", "keyed", "keyless", "old", "stopped", "limited", "lagging", "absent"}
	l.castractl("vm", "add", "keyed", "keyless")
	for _, name := range names {
		l.castractl("vm", "add", "--if-missing", "--no-key", name)
	}

	// The silent one first: it takes longest to be told.
	silent := l.guestIn("silent", "")
	l.castractl("wait", "silent", "--timeout", "60s")
	freeze(t, silent.Process)

	l.guestIn("well", "")
	l.guestIn("stranger", "")
	if err := os.Rename(l.path("keyless.castra-key"), l.path("other-key")); err != nil {
		t.Fatal(err)
	}
	l.guestIn("keyed", fmt.Sprintf("key_file = %q", l.path("other-key"))) // another VM's
	l.guestIn("keyless", "")
	l.oldGuest("old")
	stopped := l.guestIn("stopped", "")
	l.guestIn("limited", "")
	lagging := l.guestIn("lagging", "")
	l.castractl("wait", "well", "stopped", "limited", "lagging", "--timeout", "60s")
	l.stop("stopped", stopped)
	l.tailInGuest("well", "vm:well")

	l.until("castra-guestd answers", func() error { return l.inGuest("limited", "status").Run() }) // a session is no name on the bus
	flood := l.inGuest("limited", "bus", "publish", "--lines", "-")
	flood.Stdin = strings.NewReader(strings.Repeat("1\n", 100))
	if err := flood.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = flood.Process.Kill(); _ = flood.Wait() }) // at one a second it would take minutes

	l.tailInGuest("lagging", "vm:lagging")
	freeze(t, lagging.Process)
	l.write("big", "%s", strings.Repeat(`"`+strings.Repeat("x", 60_000)+`"`+"\n", 200)) // more than the sockets hold
	l.castractl("bus", "publish", "--vm", "lagging", "--lines", "@big")

	for _, tt := range []struct {
		vm, rung string
		code     int
		mend     string
	}{
		{"lagging", "lag", 3, "systemctl restart castra-guestd"}, // before its silence is noticed
		{"well", "", 0, ""},
		{"stranger", "registered", 4, "castractl vm add stranger"},
		{"absent", "connected", 3, "castractl vm args absent"},
		{"keyed", "handshake", 3, "castractl vm rekey keyed"},
		{"keyless", "handshake", 3, "castractl vm rekey keyless"},
		{"old", "session", 3, "install castra-guestd"},
		{"stopped", "session", 3, "systemctl start castra-guestd"},
		{"limited", "limits", 3, "publish_rate"},
		{"silent", "heartbeats", 3, "is the VM paused"},
	} {
		l.wantBroken(tt.vm, tt.rung, tt.code, tt.mend)
	}

	l.stop("castrad", castrad)
	l.wantBroken("well", "listener", 5, "systemctl start castrad.socket")
}

// wantBroken waits until explain names the rung, with the exit code and the remedy.
func (l *lab) wantBroken(vm, rung string, code int, mend string) {
	l.Helper()
	l.until(vm+" is explained", func() error {
		out, errs, got := l.exitCode("explain", vm, "--json")
		var e struct {
			VM, Broken string
			Rungs      []struct{ Rung, State, What, Mend string }
		}
		if err := json.Unmarshal([]byte(out), &e); err != nil {
			return fmt.Errorf("%w in %q (%s)", err, out, errs)
		}
		if e.VM != vm || e.Broken != rung || got != code || !strings.Contains(errs, mend) {
			return fmt.Errorf("exit code %d, want %d; broken is %q, want %q: %s%s", got, code, e.Broken, rung, out, errs)
		}
		for _, r := range e.Rungs {
			if r.State == "broken" && r.Mend == "" {
				return fmt.Errorf("the rung %s is broken, and nothing mends it", r.Rung)
			}
		}
		return nil
	})
}

// freeze stops a process where it stands, until the test ends.
func freeze(t *testing.T, p *os.Process) {
	t.Helper()
	if err := p.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Signal(syscall.SIGCONT) }) // or SIGTERM would not be heard
}

// oldGuest says hello as guests did before there was a bus, and is let in.
func (l *lab) oldGuest(vm string) {
	l.Helper()
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", l.port))
	if err != nil {
		l.Fatal(err)
	}
	defer conn.Close()
	buf := make([]byte, 512)
	n, err := conn.Read(buf) // the greeting
	if err == nil {
		_, err = fmt.Fprintf(conn, "hello vm:%s capabilities=shell\n", vm)
	}
	if err == nil {
		n, err = conn.Read(buf)
	}
	if err != nil || string(buf[:n]) != "ok\n" {
		l.Fatalf("an old guest is answered %q, %v", buf[:n], err)
	}
}
