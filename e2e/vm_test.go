package e2e

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/identity"
	"github.com/castrabus/castra/internal/reserve"
)

// vmDisk makes the file disk, with castra-guestd installed on it, and gives the kernel
// that boots it.
func (l *lab) vmDisk(t *testing.T) (kernel string) {
	l.Helper()
	debs(t, "castra-guestd", "castractl") // of which vm-image makes the disk
	image := exec.Command("../scripts/vm-image", l.path("disk"))
	image.Stderr = os.Stderr
	out, err := image.Output()
	if err != nil {
		l.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// bootVM boots a VM from a copy of the disk; its castra-guestd looks for castrad at the
// lab's port.
func (l *lab) bootVM(name, kernel string, handover ...string) *console {
	l.Helper()
	vm, _ := l.bootVMBy(nil, name, kernel, fmt.Sprintf("10.0.2.2:%d", l.port), handover...)
	return vm
}

// bootVMBy is bootVM by a command that runs QEMU; castra-guestd looks for castrad at
// broker.
func (l *lab) bootVMBy(runner []string, name, kernel, broker string, handover ...string) (*console, *exec.Cmd) {
	l.Helper()
	qemu, err := filepath.Abs("../scripts/vm-qemu")
	if err != nil {
		l.Fatal(err)
	}
	if out, err := exec.Command("cp", "--sparse=always", l.path("disk"), l.path(name+".disk")).CombinedOutput(); err != nil {
		l.Fatalf("copying the disk: %v: %s", err, out)
	}
	argv := slices.Concat(runner, []string{qemu, kernel, name + ".disk", name + ".console", broker}, handover)
	cmd := l.start(name, nil, argv...)
	return l.dialConsole(l.path(name + ".console")), cmd
}

// TestVMAlone boots a VM that has no castrad to talk to: nothing of its boot waits for
// castra-guestd, which is there for its programs all the same.
func TestVMAlone(t *testing.T) {
	l := newLab(t)
	l.port = reserve.Port(t)
	vm := l.bootVM("alone", l.vmDisk(t))
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
// that castractl prints, and talks with it both ways. The same image boots beside it
// with its name and a key of its own, and is refused. No key shows in a process list.
func TestVM(t *testing.T) {
	l := newLab(t)
	l.castrad()
	handover := strings.Fields(l.castractl("vm", "add", "web1"))
	thief := strings.Fields(l.castractl("vm", "add", "web2"))
	for i, arg := range thief {
		thief[i] = strings.ReplaceAll(arg, "castra.vm=web2", "castra.vm=web1")
	}

	kernel := l.vmDisk(t)
	vm := l.bootVM("web1", kernel, handover...)
	other := l.bootVM("thief", kernel, thief...)

	l.castractl("wait", "web1", "--timeout", slowHang.String())
	state := func() (st bus.Status) {
		if err := json.Unmarshal([]byte(l.castractl("status", "--json")), &st); err != nil {
			t.Fatal(err)
		}
		return st
	}
	st := state()
	if len(st.VMs) != 2 || st.VMs[0].VM != "web1" || !st.VMs[0].Reachable || !st.VMs[0].Keyed || st.VMs[1].Reachable {
		t.Fatalf("status shows %+v, want web1 reachable and keyed, and web2 not", st.VMs)
	}
	session := st.VMs[0].Session

	// The words that are looked for are never typed on the console, which echoes.
	vm.booted()
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

	l.within(slowHang, "the other VM is refused", func() error {
		for _, r := range state().Refused {
			if r.VM == "web1" && r.Reason == "auth-failed" {
				return nil
			}
		}
		return fmt.Errorf("those turned away are %+v", state().Refused)
	})
	other.booted()
	mark := other.expect(0, "# ")
	other.run("castractl status; echo status=$?")
	other.expect(mark, "auth-failed")
	if st := state(); len(st.VMs) != 2 || st.VMs[0].Session != session || !st.VMs[0].Reachable || st.VMs[1].Reachable {
		t.Errorf("status shows %+v; web1's session was %s", st.VMs, session)
	}
	l.keysHidden("web1.castra-key", "web2.castra-key")
}

// keysHidden looks for keys in the arguments of every process.
func (l *lab) keysHidden(files ...string) {
	l.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		l.Fatal(err)
	}
	qemus := 0
	for _, path := range lines {
		args, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		for _, file := range files {
			data, err := os.ReadFile(l.path(file))
			if err != nil {
				l.Fatal(err)
			}
			key, err := identity.ParseKey(data)
			if err != nil {
				l.Fatal(err)
			}
			for _, text := range []string{base64.StdEncoding.EncodeToString(key), hex.EncodeToString(key), string(key)} {
				if bytes.Contains(args, []byte(text)) {
					l.Errorf("%s shows the key in %s", path, file)
				}
			}
			if bytes.Contains(args, []byte("path="+file)) {
				qemus++
			}
		}
	}
	if qemus < 2 {
		l.Errorf("%d processes were given a key's path, and two VMs are running", qemus)
	}
}
