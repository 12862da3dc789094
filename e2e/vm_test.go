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
	"strings"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/identity"
)

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
	broker := fmt.Sprintf("10.0.2.2:%d", l.port)
	l.start("qemu", nil, append([]string{
		filepath.Join(scripts, "vm-qemu"), strings.TrimSpace(string(kernel)), "disk", "console", broker,
	}, handover...)...)
	if out, err := exec.Command("cp", "--sparse=always", l.path("disk"), l.path("disk2")).CombinedOutput(); err != nil {
		t.Fatalf("copying the image: %v: %s", err, out)
	}
	l.start("qemu2", nil, append([]string{
		filepath.Join(scripts, "vm-qemu"), strings.TrimSpace(string(kernel)), "disk2", "console2", broker,
	}, thief...)...)
	vm := l.dialConsole(l.path("console"))
	other := l.dialConsole(l.path("console2"))

	// A boot takes ten seconds without KVM, and longer beside other work.
	l.castractl("wait", "web1", "--timeout", "300s")
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

	l.untilFor(5*time.Minute, "the other VM is refused", func() error {
		for _, r := range state().Refused {
			if r.VM == "web1" && r.Reason == "auth-failed" {
				return nil
			}
		}
		return fmt.Errorf("those turned away are %+v", state().Refused)
	})
	other.run("")
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
