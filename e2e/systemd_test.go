package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bus"
)

// A host is a Debian booted in a container.
type host struct {
	*lab
	tree   string // its directory, seen from outside
	leader string // the process that is PID 1 inside
}

func sudo(argv ...string) []string {
	if os.Geteuid() == 0 {
		return argv
	}
	return append([]string{"sudo"}, argv...)
}

func command(argv ...string) *exec.Cmd { return exec.Command(argv[0], argv[1:]...) }

// bootHost boots one in which the packages of the host are installed.
func bootHost(t *testing.T) *host {
	t.Helper()
	return boot(t, debs(t, "castrad", "castractl")...)
}

// boot boots a host with packages, files, installed in it. castra-guestd, for a guest
// that is a process, and what else the test needs, is in its /root.
func boot(t *testing.T, packages ...string) *host {
	t.Helper()
	l := newLab(t)
	base, err := exec.Command("../scripts/host-root").Output()
	if err != nil {
		t.Fatal(err)
	}
	root := l.path("root")
	install := sudo("true")
	if len(packages) > 0 {
		install = sudo(append([]string{"dpkg", "--root=" + root, "--install"}, packages...)...)
	}
	for _, argv := range [][]string{
		sudo("cp", "-a", filepath.Join(strings.TrimSpace(string(base)), "root"), root),
		sudo("install", bin(t, "castra-guestd"), filepath.Join(root, "root")),
		install,
		sudo("systemctl", "--root="+root, "mask", "--quiet", "systemd-networkd.service", "systemd-udevd.service"),
	} {
		if out, err := command(argv...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", argv, err, out)
		}
	}
	t.Cleanup(func() { _ = command(sudo("rm", "-rf", root)...).Run() })
	boot, err := filepath.Abs("../scripts/host-boot")
	if err != nil {
		t.Fatal(err)
	}
	l.start("boot", nil, boot, root)
	h := &host{lab: l, tree: root}
	l.until("the host has booted", func() error {
		out, err := exec.Command("pgrep", "--full", "--exact", "--newest", ".*systemd-nspawn .*--directory="+root).Output()
		if err != nil {
			return err
		}
		if out, err = exec.Command("pgrep", "--parent", strings.TrimSpace(string(out))).Output(); err != nil {
			return err
		}
		h.leader = strings.TrimSpace(string(out))
		_, err = h.try("systemctl", "is-active", "--quiet", "multi-user.target")
		return err
	})
	// Ended from inside, so that nothing of it stays.
	t.Cleanup(func() {
		if t.Failed() {
			out, err := h.try("journalctl", "--no-pager", "--lines=100")
			t.Logf("the host's journal (%v):\n%s", err, out)
		}
		_, _ = h.try("systemctl", "poweroff", "--force", "--force")
	})
	return h
}

// try runs a command on the host and gives what it wrote.
func (h *host) try(argv ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*hang)
	defer cancel()
	argv = sudo(append([]string{"nsenter", "--target", h.leader, "--all"}, argv...)...)
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%v: %w: %s", argv, err, &out)
	}
	return out.String(), nil
}

func (h *host) run(argv ...string) string {
	h.Helper()
	out, err := h.try(argv...)
	if err != nil {
		h.Fatal(err)
	}
	return out
}

// session is the token of a VM's session, "" if it has none.
func (h *host) session(vm string) string {
	h.Helper()
	var st bus.Status
	if err := json.Unmarshal([]byte(h.run("castractl", "status", "--json")), &st); err != nil {
		h.Fatal(err)
	}
	for _, v := range st.VMs {
		if v.VM == vm {
			return v.Session
		}
	}
	return ""
}

// want fails unless text has all the words.
func (h *host) want(text string, words ...string) {
	h.Helper()
	for _, w := range words {
		if !strings.Contains(text, w) {
			h.Errorf("%q is not in:\n%s", w, text)
		}
	}
}

// untilJournal waits until the journal has the words of a unit: what was said is a moment
// on its way. more is what else journalctl is asked for.
func (h *host) untilJournal(unit string, more []string, words ...string) {
	h.Helper()
	h.until("the journal tells of "+unit, func() error {
		out := h.run(append([]string{"journalctl", "--no-pager", "--unit=" + unit}, more...)...)
		for _, w := range words {
			if !strings.Contains(out, w) {
				return fmt.Errorf("%q is not in:\n%s", w, out)
			}
		}
		return nil
	})
}

// TestSystemd takes castrad through what a service manager does with it: a
// socket that starts it, D-Bus that starts it, reload, restart, a hang, a stop.
func TestSystemd(t *testing.T) {
	h := bootHost(t)
	h.want(h.run("castractl", "status"), "idle")
	if out, err := h.try("systemctl", "is-active", "castrad.service"); err == nil {
		t.Errorf("castrad runs though nobody asked for it: %s", out)
	}
	h.run("castractl", "vm", "add", "web1", "--no-key") // starts it
	h.run("systemctl", "is-active", "castrad.service")

	// A guest's daemon, as a process: the bus name is taken, so it serves its socket alone.
	h.run("systemd-run", "--quiet", "--unit=guest", "sh", "-c",
		`printf '[broker]\naddress = "127.0.0.1:7070"\n[identity]\nvm = "web1"\n[bus]\nsubscribe = ["vm:self"]\n' >/run/guest.toml
		 exec /root/castra-guestd --config /run/guest.toml`)
	h.run("castractl", "wait", "web1", "--for", "subscribed", "--timeout", "60s")
	h.run("castractl", "bus", "publish", "--vm", "web1", "--wait-ack", "30s", `"hello"`)
	// castrad itself cannot read the boot's ID there, and keeps no journal without it.
	h.want(h.run("head", "-n1", "/var/log/castra/bus/journal"), "castra journal 1 boot ")
	h.until("systemctl status counts the guests", func() error {
		if out := h.run("systemctl", "show", "--property=StatusText", "castrad"); !strings.Contains(out, "1 guests reachable") {
			return fmt.Errorf("it says %s", out)
		}
		return nil
	})
	h.untilJournal("castrad", []string{"CASTRA_VM=web1"}, "web1: VM registered", "web1: guest connected")
	h.untilJournal("guest", nil, "org.castra.Bus1")

	h.run("systemctl", "reload", "castrad")
	h.want(h.run("castractl", "status", "web1"), "reachable")
	session := h.session("web1")
	h.run("systemctl", "restart", "castrad")
	if now := h.session("web1"); now != session {
		t.Errorf("a restart made session %s %s", session, now)
	}

	t.Run("rights", func(t *testing.T) {
		h.run("useradd", "reader")
		h.run("useradd", "--groups", "castra", "writer")
		as := func(user string, argv ...string) (string, error) {
			return h.try(append([]string{"setpriv", "--reuid=" + user, "--regid=" + user, "--init-groups"}, argv...)...)
		}
		if out, err := as("reader", "castractl", "status"); err != nil || !strings.Contains(out, "web1") {
			t.Errorf("anybody may look: %v", err)
		}
		if out, err := as("reader", "castractl", "bus", "publish", "1"); err == nil || !strings.Contains(out, "castra") {
			t.Errorf("a stranger published: %s", out)
		}
		if _, err := as("writer", "castractl", "bus", "publish", "1"); err != nil {
			t.Errorf("a member of castra did not publish: %v", err)
		}
		// The policy of docs/SECURITY.md, as it stands there.
		security, err := os.ReadFile("../docs/SECURITY.md")
		if err != nil {
			t.Fatal(err)
		}
		_, policy, _ := strings.Cut(string(security), "```xml\n")
		policy, _, _ = strings.Cut(policy, "```")
		const reload = "; busctl call org.freedesktop.DBus /org/freedesktop/DBus org.freedesktop.DBus ReloadConfig"
		const file = "/etc/dbus-1/system.d/org.castra.Bus1.private.conf"
		h.want(policy, file)
		h.run("sh", "-c", `printf %s "$1" >`+file+reload, "sh", policy)
		if out, err := as("reader", "castractl", "status"); err == nil || strings.Contains(out, "web1") || !strings.Contains(out, "castra") {
			t.Errorf("a stranger may look, or is not told why not: %s", out)
		}
		if out, err := as("writer", "castractl", "status"); err != nil || !strings.Contains(out, "web1") {
			t.Errorf("a member of castra may not look: %v", err)
		}
		h.want(h.run("castractl", "status"), "web1")
		h.run("sh", "-c", "rm "+file+reload)
		if out, err := as("reader", "castractl", "status"); err != nil || !strings.Contains(out, "web1") {
			t.Errorf("without the policy anybody may look again: %v", err)
		}
	})

	// A castrad that hangs is killed by the watchdog, and started again.
	h.run("sh", "-c", `mkdir -p /run/systemd/system/castrad.service.d
		printf '[Service]\nWatchdogSec=2s\nFileDescriptorStoreMax=0\n' >/run/systemd/system/castrad.service.d/quick.conf
		systemctl daemon-reload && systemctl restart castrad`)
	// Nor does systemd keep its sessions: the guest is back by itself.
	h.until("the guest has another session", func() error {
		if now := h.session("web1"); now == "" || now == session {
			return fmt.Errorf("it is %q", now)
		}
		return nil
	})
	time.Sleep(5 * time.Second) // twice the watchdog's patience: fed, it must not bite
	before := h.run("systemctl", "show", "--property=MainPID,NRestarts", "castrad")
	h.want(before, "NRestarts=0")
	h.run("systemctl", "kill", "--kill-whom=main", "--signal=STOP", "castrad")
	h.until("systemd has started castrad again", func() error {
		if out := h.run("systemctl", "show", "--property=NRestarts", "castrad"); !strings.Contains(out, "NRestarts=1") {
			return fmt.Errorf("it says %s", out)
		}
		return nil
	})
	h.run("castractl", "wait", "web1", "--timeout", "60s")
	h.untilJournal("castrad", nil, "Watchdog timeout")

	// While castrad starts, what only looks says so, and waits for nothing.
	h.run("sh", "-c", `printf '[Service]\nExecStartPre=/bin/sleep infinity\n' >/run/systemd/system/castrad.service.d/slow.conf
		systemctl daemon-reload && systemctl stop castrad && systemctl start --no-block castrad`)
	h.until("castrad is starting", func() error {
		out, err := h.try("castractl", "status")
		if err == nil || !strings.Contains(out, "castrad is starting") {
			return fmt.Errorf("status says %s", out)
		}
		return nil
	})
	for _, args := range [][]string{{"vm", "list"}, {"ports"}, {"explain", "web1"}} {
		out, err := h.try(append([]string{"castractl"}, args...)...)
		if err == nil {
			t.Errorf("castractl %v succeeds while castrad starts: %s", args, out)
		}
		h.want(out, "castrad is starting")
	}
	const looks = 20
	for _, command := range []string{"status", "status web1", "vm list", "ports"} {
		took := h.run("bash", "-c", fmt.Sprintf("TIMEFORMAT=%%R; time for i in {1..%d}; do castractl %s 2>/dev/null || true; done", looks, command))
		t.Logf("while castrad starts, %d times castractl %s take %s s", looks, command, strings.TrimSpace(took))
	}
	h.run("sh", "-c", `rm /run/systemd/system/castrad.service.d/slow.conf
		systemctl daemon-reload && systemctl stop castrad && systemctl start castrad`)
	h.run("castractl", "wait", "web1", "--timeout", "60s")

	h.run("systemctl", "stop", "castrad.socket", "castrad.service")
	out, err := h.try("castractl", "status")
	if err == nil {
		t.Errorf("status of a stopped bus succeeds: %s", out)
	}
	h.want(out, "systemctl start castrad")
	out, err = h.try("castractl", "explain", "web1")
	if err == nil {
		t.Errorf("explain finds nothing wrong with a stopped socket: %s", out)
	}
	h.want(out, "web1: listener: castrad is not running, and its socket does not listen; systemctl start castrad.socket")
}
