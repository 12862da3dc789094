package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestRestart takes a castrad with 400 guests that publish and 10,000 idle ones
// through what an administrator, a crash and a disk do to it.
func TestRestart(t *testing.T) {
	const publishing, idle = 400, 10_000
	const all = publishing + idle
	h := bootHost(t)
	conf := h.path("root/etc/castra/castrad.toml.d")
	h.root("mkdir", "--parents", conf)
	h.root("install", "--mode=0644", h.write("drop-in.toml", "[broker]\nunknown_vms = \"accept\"\n"), conf)
	h.run("systemctl", "start", "castrad.service")
	began := time.Now()
	fleet := h.fleet(publishing, idle)
	t.Logf("%d guests connected within %v", all, time.Since(began).Round(time.Millisecond))
	fleet.untilAcked(2 * publishing)

	// An operator who watches: castractl goes on by itself.
	h.run("systemd-run", "--quiet", "--unit=tail", "--property=StandardOutput=file:/var/tmp/tail.jsonl", "--property=StandardError=journal", "castractl", "bus", "tail", "-n", "0", "-o", "json")
	const shown = "root/var/tmp/tail.jsonl"
	h.untilFile(shown, `"seq"`)

	// restarted waits until all is as before, and says how long guests waited.
	restarted := func(how string) {
		t.Helper()
		fleet.untilAcked(2 * publishing)
		st := fleet.ask("tell")
		if st.Lost != 0 || st.Connected != all {
			t.Fatalf("%s: %d connections lost, %d left", how, st.Lost, st.Connected)
		}
		t.Logf("%s: 0 of %d connections lost, the longest pause %v", how, all, st.Pause.Round(time.Millisecond))
	}
	fleet.ask("mark")
	fleet.untilAcked(2 * publishing)
	t.Logf("undisturbed, the longest answer takes %v", fleet.ask("tell").Pause.Round(time.Millisecond))
	for range 2 {
		fleet.ask("mark")
		h.run("systemctl", "restart", "castrad")
		restarted("systemctl restart")
	}
	h.upgrade("9.9.9")
	fleet.ask("mark")
	h.run("sh", "-c", "systemctl daemon-reload && systemctl try-restart castrad") // as debhelper's maintainer scripts do
	restarted("upgrade")
	h.want(h.run("castractl", "status", "i0", "--json"), `"version":"9.9.9"`, `"state":"reachable"`)
	if out := h.run("castractl", "bus", "tail", "--topic", "castra.presence", "--no-follow", "-n", "all", "-o", "cat"); strings.Contains(out, "unreachable") {
		t.Errorf("guests were announced as gone:\n%.500s", out)
	}
	h.checkTail(shown, h.head())
	h.run("systemctl", "stop", "tail")

	if out := h.run("systemctl", "show", "--property=NRestarts", "castrad"); !strings.Contains(out, "NRestarts=0") {
		t.Errorf("before anything was killed: %s", out)
	}
	fleet.ask("mark")
	h.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "castrad")
	h.until("the guests notice", func() error {
		if fleet.ask("tell").Lost == 0 {
			return errors.New("they do not")
		}
		return nil
	})
	fleet.untilConnected(all)
	fleet.untilAcked(2 * publishing)
	st := fleet.ask("tell")
	if st.Lost != all {
		t.Errorf("kill -9: %d connections were lost by %d guests: some came twice", st.Lost, all)
	}
	t.Logf("kill -9: %d guests back by themselves within %v", all, st.Back.Round(time.Millisecond))

	t.Run("disk", func(t *testing.T) { h.blockDisk(t, fleet, all) })

	st = fleet.ask("finish " + h.path("root/var/log/castra/bus/host"))
	h.run("castractl", "bus", "verify")
	t.Logf("%d records, %d acknowledged: none lost, none doubled", st.Records, st.Acked)
	if st.Acked == 0 || st.Records < int(st.Acked) {
		t.Errorf("%d records in the log", st.Records)
	}

	// Who stops the service means it.
	began = time.Now()
	h.run("systemctl", "stop", "castrad.socket", "castrad.service")
	h.until("nobody is connected", func() error {
		if n := fleet.ask("tell").Connected; n > 0 {
			return fmt.Errorf("%d guests are", n)
		}
		return nil
	})
	t.Logf("systemctl stop: all connections closed within %v", time.Since(began).Round(time.Millisecond))
}

// head is the number of the newest record.
func (h *host) head() int64 {
	h.Helper()
	var st struct {
		Broker struct {
			Head int64 `json:"head_seq"`
		}
	}
	if err := json.Unmarshal([]byte(h.run("castractl", "status", "p0", "--json")), &st); err != nil {
		h.Fatal(err)
	}
	return st.Broker.Head
}

// upgrade puts a castrad of another version where the old one is.
func (h *host) upgrade(version string) {
	h.Helper()
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -X main.version="+version, "-o", h.path("castrad-new"), "../castrad")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		h.Fatalf("%v: %s", err, out)
	}
	h.root("install", h.path("castrad-new"), filepath.Join(h.path("root"), "usr/bin/castrad"))
}

// checkTail waits until a tail has shown the record seq, and checks that it shows
// every record from its first on, each once.
func (h *host) checkTail(file string, seq int64) {
	h.Helper()
	var first, last int64
	h.until(fmt.Sprintf("the tail shows record %d", seq), func() error {
		b, err := os.ReadFile(h.path(file))
		if err != nil {
			return err
		}
		first, last = 0, 0
		lines := bufio.NewScanner(bytes.NewReader(b))
		for lines.Scan() {
			var r struct{ Seq int64 }
			if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
				return err // of a line that is still being written
			}
			if last != 0 && r.Seq != last+1 {
				h.Fatalf("the tail shows record %d behind %d", r.Seq, last)
			}
			if last = r.Seq; first == 0 {
				first = last
			}
		}
		if last < seq {
			return fmt.Errorf("it shows %d to %d", first, last)
		}
		return nil
	})
	h.Logf("castractl bus tail: records %d to %d, each once", first, last)
}

// blockDisk lets no sync end for a minute, twice what the watchdog waits for.
func (h *host) blockDisk(t *testing.T, fleet *fleetRun, all int) {
	pid := strings.TrimSpace(h.run("systemctl", "show", "--property=MainPID", "--value", "castrad"))
	out, err := exec.Command("pgrep", "--ns", h.leader, "--nslist", "pid", "--exact", "castrad").Output()
	if err != nil {
		t.Fatal(err)
	}
	before := fleet.ask("mark")
	end := h.injectInto(strings.TrimSpace(string(out)), "fdatasync", "delay_enter=120s")
	began := time.Now()
	h.until("castrad is degraded", func() error {
		if out := h.run("castractl", "status", "p0", "--json"); !strings.Contains(out, "degraded: disk stalled") {
			return errors.New(out)
		}
		return nil
	})
	time.Sleep(time.Until(began.Add(time.Minute))) // the fault's length
	h.want(h.run("castractl", "status", "p0", "--json"), "degraded: disk stalled", `"state":"reachable"`)
	during := fleet.ask("tell")
	end()
	fleet.untilAcked(800)
	after := fleet.ask("tell")
	if after.Lost != before.Lost || after.Connected != all {
		t.Errorf("%d connections were lost, %d are left", after.Lost-before.Lost, after.Connected)
	}
	if during.Refused == before.Refused {
		t.Error("no publish was refused")
	}
	if now := strings.TrimSpace(h.run("systemctl", "show", "--property=MainPID", "--value", "castrad")); now != pid {
		t.Errorf("castrad was killed: process %s became %s", pid, now)
	}
	h.want(h.run("castractl", "status", "p0", "--json"), `"state":"running"`)
	t.Logf("a disk that blocks for a minute: degraded, %d publishes refused and sent again, 0 of %d connections lost", after.Refused-before.Refused, all)
}
