package e2e

import (
	"bytes"
	"debug/buildinfo"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// makePackages makes those of this machine, once for all tests.
var makePackages = sync.OnceValue(func() error {
	if out, err := exec.Command("make", "--no-print-directory", "-C", "..", "packages-here").CombinedOutput(); err != nil {
		return fmt.Errorf("make packages-here: %w: %s", err, out)
	}
	return nil
})

// built finds the one file in dist/ that matches pattern.
func built(t *testing.T, pattern string) string {
	t.Helper()
	endToEnd(t) // or they are made while make makes them, in the same place
	if err := makePackages(); err != nil {
		t.Fatal(err)
	}
	found, err := filepath.Glob(filepath.Join("../dist", pattern))
	if err != nil || len(found) != 1 {
		t.Fatalf("dist/%s is %q, want one file (%v)", pattern, found, err)
	}
	path, err := filepath.Abs(found[0])
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// debs are the packages of these names.
func debs(t *testing.T, names ...string) []string {
	t.Helper()
	arch, err := exec.Command("dpkg", "--print-architecture").Output()
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, name := range names {
		all = append(all, built(t, name+"_*_"+strings.TrimSpace(string(arch))+".deb"))
	}
	return all
}

func mustRun(t *testing.T, argv ...string) string {
	t.Helper()
	out, err := command(argv...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v: %s", argv, err, out)
	}
	return string(out)
}

// TestPackages looks at the packages from outside: their bytes, what lintian says, and
// what the units in them expose.
func TestPackages(t *testing.T) {
	l := newLab(t)
	packages := debs(t, "castrad", "castra-guestd", "castractl")

	t.Run("lintian", func(t *testing.T) {
		mustRun(t, append([]string{"lintian", "--allow-root", "--fail-on", "error,warning"}, packages...)...)
	})

	t.Run("size", func(t *testing.T) {
		info, err := os.Stat(packages[1])
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() > 4<<20 {
			t.Errorf("castra-guestd's package has %d bytes, more than 4 MiB", info.Size())
		}
	})

	t.Run("sandbox", func(t *testing.T) {
		for unit, most := range map[string]string{"castrad": "5", "castra-guestd": "15"} { // tenths
			mustRun(t, "systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold="+most, "../systemd/"+unit+".service")
		}
	})

	t.Run("copyright", func(t *testing.T) {
		text, err := os.ReadFile("../packaging/copyright")
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"castrad", "castra-guestd", "castractl"} {
			info, err := buildinfo.ReadFile(bin(t, name))
			if err != nil {
				t.Fatal(err)
			}
			for _, dep := range info.Deps {
				if !bytes.Contains(text, []byte(dep.Path)) {
					t.Errorf("%s holds %s, which packaging/copyright does not name", name, dep.Path)
				}
			}
		}
	})

	// The same commit, and what has been changed since, at another path.
	t.Run("reproducible", func(t *testing.T) {
		other := l.path("somewhere/else")
		copyTo := exec.Command("sh", "-euc", `mkdir -p "$0"; cp -a .git "$0"
			git ls-files -z --cached --others --exclude-standard | xargs -0 sh -c 'for f; do [ ! -e "$f" ] || printf "%s\0" "$f"; done' sh |
			tar -c --null -T - | tar -x -C "$0"`, other)
		copyTo.Dir = ".."
		if out, err := copyTo.CombinedOutput(); err != nil {
			t.Fatalf("copying the checkout: %v: %s", err, out)
		}
		mustRun(t, "make", "--no-print-directory", "-C", other, "packages-here")
		for _, pattern := range []string{"*.deb", "*.rpm"} {
			made, err := filepath.Glob(filepath.Join(other, "dist", pattern))
			if err != nil || len(made) != 3 {
				t.Fatalf("dist/%s is %q (%v), want three packages", pattern, made, err)
			}
			for _, file := range made {
				a, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				b, err := os.ReadFile(filepath.Join("../dist", filepath.Base(file)))
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(a, b) {
					t.Errorf("%s, built at two paths, is not the same", filepath.Base(file))
				}
			}
		}
	})

	t.Run("make install", func(t *testing.T) {
		dest := l.path("dest")
		mustRun(t, "../scripts/install", dest)
		edited := filepath.Join(dest, "etc/castra/castrad.toml")
		if err := os.WriteFile(edited, []byte("# edited\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		mustRun(t, "../scripts/install", dest)
		if got, err := os.ReadFile(edited); err != nil || string(got) != "# edited\n" {
			t.Errorf("the edited configuration is %q (%v)", got, err)
		}
		for _, deb := range packages {
			for line := range strings.Lines(mustRun(t, "dpkg-deb", "--contents", deb)) {
				file := strings.Fields(line)[5]
				if _, err := os.Lstat(filepath.Join(dest, file)); err != nil {
					t.Errorf("%s has it, and make install has not: %v", filepath.Base(deb), err)
				}
			}
		}
	})
}

// TestInstall is an administrator's: install, use, edit, upgrade, remove, purge, with
// apt, offline, on a Debian that runs.
func TestInstall(t *testing.T) {
	h := boot(t) // first: where there is none nothing is built, beside make packages
	packages := debs(t, "castrad", "castractl", "castra-guestd")
	mustRun(t, sudo(append(append([]string{"cp"}, packages...), filepath.Join(h.tree, "root"))...)...)
	apt := func(command string) string {
		h.Helper()
		return h.run("sh", "-c", "cd /root && DEBIAN_FRONTEND=noninteractive apt-get -y -o Dpkg::Use-Pty=0 "+command)
	}
	state := func(unit string) string {
		h.Helper()
		return strings.TrimSpace(h.run("systemctl", "show", "--property=ActiveState", "--value", unit))
	}
	wantState := func(unit, want string) {
		h.Helper()
		if got := state(unit); got != want {
			t.Errorf("%s is %s, want %s", unit, got, want)
		}
	}

	told := transcript(t, "../README.md")
	told.run(h, "apt install")
	wantState("castrad.socket", "active")
	wantState("castrad.service", "inactive")
	h.want(h.run("systemctl", "is-enabled", "castrad.socket"), "enabled")
	if out := h.run("systemd-analyze", "verify", "--man=no", "castrad.service", "castrad.socket"); out != "" {
		t.Errorf("systemd-analyze verify says:\n%s", out)
	}
	h.want(h.run("castractl", "status"), "idle")
	wantState("castrad.service", "inactive") // asking did not start it
	newcomer(h, told)
	h.run("systemctl", "stop", "castrad.service")
	wantState("castrad.socket", "active")

	// The first guest does, admitted by a file. The name on the message bus is castrad's.
	h.run("sh", "-c", `echo 'no_key = true' >/etc/castra/vms.d/web1.toml
		printf '[broker]\naddress = "127.0.0.1:7070"\n[identity]\nvm = "web1"\n[bus]\nsocket = "/run/guest.sock"\nsubscribe = ["jobs.nightly"]\n' >/run/guest.toml
		systemd-run --quiet --unit=guest --setenv=DBUS_SYSTEM_BUS_ADDRESS=unix:path=/none /root/castra-guestd --config /run/guest.toml`)
	h.until("the first guest's connection has started castrad", func() error {
		if got := state("castrad.service"); got != "active" {
			return fmt.Errorf("it is %s", got)
		}
		return nil
	})
	h.run("castractl", "wait", "web1", "--timeout", "60s")
	h.until("systemctl status shows how many guests there are", func() error {
		if out := h.run("systemctl", "status", "castrad"); !strings.Contains(out, "1 guests reachable") {
			return fmt.Errorf("it says %s", out)
		}
		return nil
	})
	h.untilJournal("castrad", []string{"--catalog", "CASTRA_VM=web1"}, "web1: guest connected", "web1 is connected", "castractl status web1", "Defined-By: Castra Bus")

	t.Run("completion", func(t *testing.T) { completion(t, h) })
	t.Run("dbus clients", func(t *testing.T) { busClients(h) })
	t.Run("sockets", func(t *testing.T) { pageSockets(h) })

	// A castrad that cannot start leaves a socket that listens.
	h.run("sh", "-c", `mkdir -p /run/systemd/system/castrad.service.d
		printf '[Service]\nExecStart=\nExecStart=/bin/false\n' >/run/systemd/system/castrad.service.d/broken.conf
		systemctl daemon-reload; systemctl restart castrad || true`)
	h.until("castrad has failed a dozen times", func() error {
		var n int
		out := h.run("systemctl", "show", "--property=NRestarts", "--value", "castrad")
		_, err := fmt.Sscan(out, &n)
		if err == nil && n < 12 {
			err = fmt.Errorf("it has %d times", n)
		}
		return err
	})
	wantState("castrad.socket", "active")
	h.run("sh", "-c", "rm -r /run/systemd/system/castrad.service.d; systemctl daemon-reload")
	h.run("castractl", "wait", "web1", "--timeout", "60s") // nobody had to do anything else

	// What was edited stays, and guests come back to the new castrad.
	h.run("sh", "-c", `echo '# edited' >>/etc/castra/castrad.toml
		printf '[broker]\nlisten = ["127.0.0.1:7171"]\n' >/etc/castra/castrad.toml.d/mine.toml
		cd /; dpkg-deb -R root/castrad_*.deb up && sed -i 's/^Version: .*/&+next/' up/DEBIAN/control && dpkg-deb -Znone -b up up.deb`)
	before := h.run("systemctl", "show", "--property=InvocationID", "castrad")
	apt("install /up.deb")
	h.want(h.run("dpkg-query", "--show", "castrad"), "+next")
	if after := h.run("systemctl", "show", "--property=InvocationID", "castrad"); after == before {
		t.Error("an upgrade did not restart castrad")
	}
	h.want(h.run("cat", "/etc/castra/castrad.toml"), "# edited")
	h.run("castractl", "wait", "web1", "--timeout", "60s")
	h.untilJournal("castrad", nil, "systemctl edit castrad.socket") // listen is overridden
	h.run("castractl", "bus", "publish", `"kept"`)

	// A host may be a VM itself: both daemons' packages go together.
	apt("install ./castra-guestd_*.deb")
	wantState("castra-guestd.service", "inactive") // a container is no VM
	if out := h.run("systemd-analyze", "verify", "--man=no", "castra-guestd.service", "castra-guestd.socket"); out != "" {
		t.Errorf("systemd-analyze verify says:\n%s", out)
	}
	apt("purge castra-guestd")
	h.want(h.run("castractl", "status", "web1"), "reachable")

	apt("remove castrad castractl")
	wantState("castrad.socket", "inactive")
	wantState("castrad.service", "inactive")
	h.want(h.run("sh", "-c", "cat /var/log/castra/bus/host/*.jsonl /etc/castra/castrad.toml"), `"kept"`, "# edited")
	h.run("test", "-d", "/var/lib/castra/handshakes")
	h.run("test", "-e", "/etc/castra/vms.d/web1.toml")

	apt("purge castrad castractl")
	h.run("sh", "-c", "systemctl stop guest; rm -r /up /up.deb")
	if left := h.run("find", "/", "-xdev", "(", "-path", "/root", "-o", "-path", "/proc", ")", "-prune", "-o", "-name", "*castra*", "-print"); left != "" {
		t.Errorf("purge left:\n%s", left)
	}
	h.run("getent", "passwd", "castra")
}

// busClients talks to castrad with what others have written.
func busClients(h *host) {
	introspected := h.run("busctl", "introspect", "org.castra.Bus1", "/org/castra/Bus1")
	h.want(introspected, "org.castra.Bus1.Manager", ".Publish", ".Tail", "org.freedesktop.DBus.ObjectManager")
	h.want(h.run("busctl", "tree", "org.castra.Bus1"), "/org/castra/Bus1/vm/web1")
	h.want(h.run("busctl", "get-property", "org.castra.Bus1", "/org/castra/Bus1/vm/web1", "org.castra.Bus1.VM", "Reachable"), "b true")
	h.want(h.run("gdbus", "introspect", "--system", "--dest", "org.castra.Bus1", "--object-path", "/org/castra/Bus1"), "interface org.castra.Bus1.Manager")

	h.run("systemd-run", "--quiet", "--unit=watch", "--property=StandardOutput=file:/run/watch", "busctl", "monitor", "org.castra.Bus1")
	h.run("systemd-run", "--quiet", "--unit=gwatch", "--property=StandardOutput=file:/run/gwatch",
		"gdbus", "monitor", "--system", "--dest", "org.castra.Bus1")
	h.until("both monitors watch", func() error {
		seq := h.run("gdbus", "call", "--system", "--dest", "org.castra.Bus1", "--object-path", "/org/castra/Bus1",
			"--method", "org.castra.Bus1.Manager.Publish", "from.gdbus", `{"n":1}`, "{}")
		h.want(seq, "uint64")
		h.run("castractl", "vm", "add", "seen", "--no-key")
		h.run("castractl", "vm", "remove", "seen")
		if out := h.run("cat", "/run/watch"); !strings.Contains(out, "from.gdbus") {
			return fmt.Errorf("busctl monitor shows %s", out)
		}
		if out := h.run("cat", "/run/gwatch"); !strings.Contains(out, "/org/castra/Bus1") {
			return fmt.Errorf("gdbus monitor shows %s", out)
		}
		return nil
	})
	h.run("systemctl", "stop", "watch", "gwatch")
	h.want(h.run("castractl", "bus", "tail", "--topic", "from.gdbus", "--no-follow"), `{"n":1}`)
}

// pageSockets has castrad serve health, metrics and profiles, whose sockets are units
// of an administrator's.
func pageSockets(h *host) {
	h.run("sh", "-c", `unit() {
			printf '[Socket]\nListenStream=127.0.0.1:%s\nFileDescriptorName=%s\nService=castrad.service\n' $2 $1 \
				>/run/systemd/system/castrad-$1.socket
		}
		unit health 7071; unit metrics 7072
		printf '[Socket]\nListenStream=/run/castrad-pprof.sock\nSocketMode=0666\nFileDescriptorName=pprof\nService=castrad.service\n' \
			>/run/systemd/system/castrad-pprof.socket
		systemctl daemon-reload; systemctl stop castrad
		systemctl start castrad-health.socket castrad-metrics.socket castrad-pprof.socket castrad.service`)
	page := func(port string) string {
		h.Helper()
		return h.run("bash", "-c", `exec 3<>/dev/tcp/127.0.0.1/`+port+`; printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3; cat <&3`)
	}
	h.want(page("7071"), "200 OK", "ok")
	h.run("castractl", "wait", "web1", "--timeout", "60s")
	h.want(page("7072"), "200 OK", "castra_vms_reachable 1")
	profile := `$s = IO::Socket::UNIX->new("/run/castrad-pprof.sock") or die "$!";
		print $s "GET /debug/pprof/goroutine?debug=1 HTTP/1.0\r\n\r\n"; print <$s>`
	h.want(h.run("perl", "-MIO::Socket::UNIX", "-e", profile), "200 OK", "goroutine profile")
	h.want(h.run("setpriv", "--reuid=nobody", "perl", "-MIO::Socket::UNIX", "-e", profile), "403 Forbidden", "root")
	h.run("sh", "-c", `systemctl stop castrad-health.socket castrad-metrics.socket castrad-pprof.socket
		rm /run/systemd/system/castrad-*.socket; systemctl daemon-reload`)
}

// TestRPM installs, verifies and erases the rpms in a tree of their own.
func TestRPM(t *testing.T) {
	l := newLab(t)
	base := strings.TrimSpace(mustRun(t, "../scripts/host-root"))
	root := l.path("root")
	mustRun(t, sudo("cp", "-a", filepath.Join(base, "root"), root)...)
	t.Cleanup(func() { _ = command(sudo("rm", "-rf", root)...).Run() })
	rpm := func(argv ...string) string {
		t.Helper()
		return mustRun(t, sudo(append([]string{"rpm", "--root=" + root}, argv...)...)...)
	}
	files := []string{built(t, "castrad-*.rpm"), built(t, "castra-guestd-*.rpm"), built(t, "castractl-*.rpm")}
	names := []string{"castrad", "castra-guestd", "castractl"}

	// The tree is Debian's, so rpm knows of none of the packages that these need.
	rpm(append([]string{"--install", "--nodeps"}, files...)...)
	if out := rpm(append([]string{"--verify", "--nodeps"}, names...)...); out != "" {
		t.Errorf("rpm --verify says:\n%s", out)
	}
	if out := rpm("--query", "--requires", "castrad"); !strings.Contains(out, "systemd >= 252") {
		t.Errorf("castrad needs:\n%s", out)
	}
	for _, file := range []string{"/usr/bin/castrad", "/usr/lib/systemd/system/castrad.socket", "/etc/castra/vms.d"} {
		mustRun(t, sudo("test", "-e", root+file)...)
	}
	if out := mustRun(t, sudo("chroot", root, "stat", "--format=%U:%G %a", "/etc/castra/vms.d")...); out != "root:castra 750\n" {
		t.Errorf("/etc/castra/vms.d is %s", out)
	}
	mustRun(t, sudo("chroot", root, "castrad", "--check-config")...)
	mustRun(t, sudo("sh", "-c", "echo '# edited' >>"+root+"/etc/castra/castrad.toml")...)
	// Again, as an upgrade does: what was edited stays.
	rpm(append([]string{"--upgrade", "--nodeps", "--force"}, files...)...)
	if out := mustRun(t, "tail", "-n1", root+"/etc/castra/castrad.toml"); out != "# edited\n" {
		t.Errorf("an upgrade overwrote the configuration: %s", out)
	}
	rpm(append([]string{"--erase", "--nodeps"}, names...)...)
	out := mustRun(t, sudo("find", root, "-name", "*castra*", "-not", "-path", root+"/var/lib/rpm/*")...)
	if want := filepath.Join(root, "etc/castra/castrad.toml.rpmsave"); !strings.Contains(out, want) ||
		strings.Count(out, "\n") != 2 { // and the directory it is in
		t.Errorf("erasing left:\n%s", out)
	}
}
