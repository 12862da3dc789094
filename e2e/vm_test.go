package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// bootVM boots a VM whose castra-guestd looks for castrad at the lab's port.
func (l *lab) bootVM(t *testing.T, handover ...string) *console {
	l.Helper()
	debs(t, "castra-guestd", "castractl") // of which vm-image makes the disk
	scripts, err := filepath.Abs("../scripts")
	if err != nil {
		t.Fatal(err)
	}
	image := exec.Command(filepath.Join(scripts, "vm-image"), l.path("disk"))
	image.Stderr = os.Stderr
	kernel, err := image.Output()
	if err != nil {
		t.Fatal(err)
	}
	l.start("qemu", nil, append([]string{
		filepath.Join(scripts, "vm-qemu"), strings.TrimSpace(string(kernel)), "disk", "console", fmt.Sprintf("10.0.2.2:%d", l.port),
	}, handover...)...)
	return l.dialConsole(l.path("console"))
}

// TestVMAlone boots a VM that has no castrad to talk to: nothing of its boot waits for
// castra-guestd, which is there for its programs all the same.
func TestVMAlone(t *testing.T) {
	l := newLab(t)
	l.port = freePort(t)
	vm := l.bootVM(t)
	vm.booted()
	// The words that are looked for are never typed on the console, which echoes.
	vm.run(`systemctl is-system-running --wait; dpkg-query --show --showformat='${db:Status-Status} ${Package}\n' 'castra*'; echo boot""ed=$?`)
	at := vm.expect(0, "booted=0")
	vm.run(`systemctl is-active castra-guestd.service castra-guestd.socket; stat --format='%a %G' /run/castra-guestd/bus.sock; echo servi""ng`)
	at = vm.expect(at, "serving")
	vm.run(`systemd-analyze blame --no-pager | grep -n castra; systemd-analyze critical-chain --no-pager multi-user.target | cat; echo analy""sed`)
	end := vm.expect(at, "analysed")
	shown := string(vm.said())
	for _, want := range []string{"running", "installed castra-guestd", "installed castractl", "active\r\nactive", "660 castra"} {
		if !strings.Contains(shown, want) {
			t.Errorf("%q is not on the console", want)
		}
	}
	_, chain, found := strings.Cut(shown[at:end], "multi-user.target @")
	if !found || strings.Contains(chain, "castra-guestd") {
		t.Errorf("the boot waits for castra-guestd, or the chain is not shown:\n%s", shown[at:end])
	}
	t.Logf("%s", shown[at:end])
}

// TestVM boots Debian with castra-guestd in it under QEMU, registered by the arguments
// that castractl prints, and talks with it both ways.
func TestVM(t *testing.T) {
	l := newLab(t)
	l.castrad()
	handover := strings.Fields(l.castractl("vm", "add", "web1"))

	vm := l.bootVM(t, handover...)

	// A boot takes ten seconds without KVM, and longer beside other work.
	l.castractl("wait", "web1", "--timeout", "300s")
	var status struct {
		VMs []struct {
			VM        string
			Reachable bool
			Keyed     bool
		}
	}
	if err := json.Unmarshal([]byte(l.castractl("status", "--json")), &status); err != nil {
		t.Fatal(err)
	}
	if len(status.VMs) != 1 || status.VMs[0].VM != "web1" || !status.VMs[0].Reachable || !status.VMs[0].Keyed {
		t.Fatalf("status shows %+v, want web1 alone, reachable and keyed", status.VMs)
	}

	// The words that are looked for are never typed on the console, which echoes.
	vm.run("")
	at := vm.expect(0, "# ")

	l.start("tail", []string{"DBUS_SYSTEM_BUS_ADDRESS=" + l.hostBus},
		bin(t, "castractl"), "bus", "tail", "--topic", "app.hello", "-o", "json")
	vm.run(`castractl bus publish --topic app.hello --payload '{"from":"inside"}'; echo publish=$?`)
	vm.expect(at, "publish=0")
	l.untilFile("tail.log", `"from":"inside"`)
	var record struct{ VM, Topic string }
	line, err := os.ReadFile(l.path("tail.log"))
	if err == nil {
		err = json.Unmarshal(line, &record)
	}
	if err != nil || record.VM != "web1" || record.Topic != "app.hello" {
		t.Errorf("the host's tail shows %s (%v), want one record of web1 on app.hello", line, err)
	}

	vm.run("castractl bus tail --topic vm:web1 -o json")
	l.castractl("wait", "web1", "--for", "subscribed", "--timeout", "60s")
	l.castractl("bus", "publish", "--vm", "web1", "--payload", `{"from":"outside"}`)
	vm.expect(at, `"from":"outside"`)
}
