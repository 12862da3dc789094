package cli

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/dbusclient"
)

func terminal(f *Factory) { f.IO.Width = 80 }

func colour(f *Factory) { f.IO.Terminal, f.IO.Colour, f.IO.Width = true, true, 80 }

func TestStatusTables(t *testing.T) {
	for name, c := range map[string]struct {
		args   []string
		change func(*Factory)
	}{
		"status.txt":           {[]string{"status"}, terminal},
		"status-pipe.txt":      {[]string{"status"}, func(*Factory) {}},
		"status-colour.txt":    {[]string{"status"}, colour},
		"status-no-legend.txt": {[]string{"status", "--no-legend", "-q"}, terminal},
		"vm-list.txt":          {[]string{"vm", "list"}, terminal},
		"vm-show.txt":          {[]string{"vm", "show", "web1"}, terminal},
		"status.json":          {[]string{"status", "--json"}, func(*Factory) {}},
		"status-terminal.json": {[]string{"status", "--json"}, func(f *Factory) { f.IO.Terminal = true }},
	} {
		t.Run(name, func(t *testing.T) {
			r := run(t, withStatus(), c.args, c.change)
			if r.code != 0 || r.err != "" {
				t.Fatalf("exit code %d, stderr %q", r.code, r.err)
			}
			golden(t, name, r.out)
			if strings.HasSuffix(name, ".json") {
				return
			}
			for line := range strings.Lines(r.out) {
				line = strings.TrimSuffix(line, "\n")
				if strings.ContainsAny(line, "\x1b\u009b") && name != "status-colour.txt" {
					t.Errorf("a control character reaches the terminal: %q", line)
				}
				if name == "status.txt" && utf8.RuneCountInString(line) > 80 {
					t.Errorf("wider than 80 columns: %q", line)
				}
			}
		})
	}
}

func TestStatusGuest(t *testing.T) {
	guest := func(b bus.Broker) *fakeClient {
		b.Kind, b.Version, b.Listen, b.UptimeMS = "guest", "0.1.0", []string{"10.0.2.2:7070"}, 5_000
		return &fakeClient{status: func([]string) (bus.Status, error) { return bus.Status{Broker: b}, nil }}
	}
	durable := true
	r := run(t, guest(bus.Broker{State: "running", ConnectedTo: "10.0.2.2:7070"}), []string{"status"})
	r.want(t, 0, "castra-guestd 0.1.0: running, up 5s\nconnected to 10.0.2.2:7070\nspool: empty, not durable\n", "")
	r = run(t, guest(bus.Broker{State: "refused: unknown-vm", SpoolCount: 3, SpoolBytes: 300, SpoolDurable: &durable}), []string{"status"})
	r.want(t, 0, "not connected; the host is looked for at 10.0.2.2:7070\nspool: 3 messages (300 bytes) kept until the host has them, on disk\n", "")
	r = run(t, guest(bus.Broker{State: "connecting", SpoolDurable: &durable, SpoolReason: "disk full"}), []string{"status"})
	r.want(t, 0, "spool: empty, on disk, which takes no more: disk full\n", "")
	r = run(t, guest(bus.Broker{State: "connecting", SpoolReason: "in memory: spool_dir is empty"}), []string{"status"})
	r.want(t, 0, "spool: empty, not durable, in memory: spool_dir is empty\n", "")
}

func TestStatusDegraded(t *testing.T) {
	broken := &fakeClient{status: func([]string) (bus.Status, error) {
		return bus.Status{Broker: bus.Broker{Kind: "host", Version: "0.1.0", State: "degraded: disk full", Faults: []bus.Fault{
			{Part: "event-log", Cause: "disk full", Effect: "publishes are refused", Detail: "write /log/1: no \x1b space", Advice: "make room on /log", AgeMS: 61_000},
			{Part: "vm-streams", Cause: "disk error", Effect: "they wait", Detail: "EIO", Advice: "look at dmesg"},
		}}}, nil
	}}
	run(t, broken, []string{"status"}).want(t, 0, "castrad 0.1.0: degraded: disk full, up 0s\n", "")
	run(t, broken, []string{"status"}).want(t, 0, `event-log: disk full, since 1min
      error:  write /log/1: no \u001b space
      effect: publishes are refused
      mend:   make room on /log
vm-streams: disk error, since 0s
      error:  EIO
      effect: they wait
      mend:   look at dmesg

`, "")
	run(t, broken, []string{"status", "--json"}).want(t, 0, `"faults":[{"part":"event-log","cause":"disk full","effect":"publishes are refused",`, "")
}

func TestStatusExitCodes(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		err  string
	}{
		{[]string{"status", "web1"}, ExitDone, ""},
		{[]string{"status", "web1", "db1"}, ExitDone, ""},
		{[]string{"status", "web1", "new1"}, ExitUnreachable, "not reachable: new1; see why: castractl explain new1"},
		{[]string{"status", "web1", "--json", "new1"}, ExitUnreachable, "new1"},
		{[]string{"status", "nobody", "new1"}, ExitNoSuchVM, "no VM is named nobody"},
		{[]string{"status", "x y"}, ExitUsage, "no VM name"},
		{[]string{"status", "--nonsense"}, ExitUsage, "unknown flag"},
	} {
		r := run(t, withStatus(), c.args)
		if r.code != c.code || !strings.Contains(r.err, c.err) || c.err == "" && r.err != "" {
			t.Errorf("%q: exit code %d, stderr %q; want %d, %q", c.args, r.code, r.err, c.code, c.err)
		}
		if c.code != ExitUsage && !strings.Contains(r.out, "web1") && !strings.Contains(r.out, "new1") {
			t.Errorf("%q: the state is not shown: %q", c.args, r.out)
		}
	}
}

func TestStatusWithoutCastrad(t *testing.T) {
	gone := func(absence dbusclient.Absence) *fakeClient {
		return &fakeClient{absence: absence, status: func([]string) (bus.Status, error) { return bus.Status{}, dbusclient.ErrNotRunning }}
	}
	run(t, gone(dbusclient.Idle), []string{"status"}).want(t, ExitDone, "\nRegister a VM: castractl vm add NAME\n", "")
	run(t, gone(dbusclient.Idle), []string{"status", "-q"}).want(t, ExitDone, "castrad is idle: its socket listens, and the first guest to connect starts it\n", "")
	run(t, gone(dbusclient.Idle), []string{"status", "web1"}).want(t, ExitUnreachable, "castrad is idle", "not reachable: web1")
	run(t, gone(dbusclient.Stopped), []string{"status"}).want(t, ExitNoCastrad, "", "daemon not running")
	run(t, gone(dbusclient.Stopped), []string{"status", "--json"}).want(t, ExitNoCastrad, "", "daemon not running")
	run(t, gone(dbusclient.Failing), []string{"status"}).want(t, ExitNoCastrad, "", "castrad has failed, and is started again; see why: castractl logs -n 20")
	guest := func(f *Factory) { f.Daemon = dbusclient.GuestDaemon }
	run(t, gone(dbusclient.Failing), []string{"status"}, guest).want(t, ExitNoCastrad, "", "castra-guestd has failed, and is started again")
	run(t, gone(dbusclient.Starting), []string{"status"}, guest).want(t, ExitNoCastrad, "", "castra-guestd is starting")
	run(t, gone(dbusclient.Failed), []string{"status"}, guest).want(t, ExitNoCastrad, "", "systemctl start castra-guestd")
	run(t, gone(dbusclient.Idle), []string{"vm", "list"}).want(t, ExitNoCastrad, "", "castrad is idle")
	run(t, gone(dbusclient.Idle), []string{"ports"}).want(t, ExitNoCastrad, "", "castrad is idle")

	r := run(t, gone(dbusclient.Idle), []string{"status", "--json"})
	var got struct {
		Broker  struct{ State string }
		VMs     []any
		Refused []any
	}
	if err := json.Unmarshal([]byte(r.out), &got); err != nil || r.code != 0 {
		t.Fatalf("exit code %d, %v: %q", r.code, err, r.out)
	}
	if got.Broker.State != "idle" || got.VMs == nil || got.Refused == nil {
		t.Errorf("idle as JSON: %q", r.out)
	}
}

func TestRemedies(t *testing.T) {
	for _, c := range []struct{ vm, reason, want string }{
		{"web9", "unknown-vm", "let it in as it is: castractl vm add web9 --no-key; or make it a key, and start it with that: castractl vm add web9"},
		{"web9", "host-unproven", "castractl vm rekey web9"},
		{"web9", "auth-required", "castractl vm rekey web9"},
		{"web9", "auth-failed", "castractl vm rekey web9"},
		{"a b", "invalid-name", "valid name"},
		{"HOST", "reserved-identity", "valid name"},
		{"web9", "forbidden", "host-bus"},
		{"web9", "too-many-vms", "castractl vm add web9"},
		{"web9", "too-many-sessions", "limits.max_sessions"},
		{"web9", "rate-limited", "too often"},
		{"web9", "read-timeout", "castractl logs web9"},
		{"$(reboot)", "unknown-vm", "valid name"},
		{"127.0.0.1:4711", "protocol-error", "valid name"},
	} {
		got := remedy(&bus.Status{}, &bus.Refused{VM: c.vm, Reason: c.reason})
		if !strings.Contains(got, c.want) {
			t.Errorf("%s for %s: %q, want %q in it", c.reason, c.vm, got, c.want)
		}
	}
}

// A hundred VMs with the longest of names and sixteen subscriptions each still fit 80
// columns, a line each, and no two look alike.
func TestStatusOfAHundred(t *testing.T) {
	c := &fakeClient{status: func([]string) (bus.Status, error) {
		st := testStatus()
		vm := st.VMs[0]
		vm.Subscriptions = slices.Repeat([]string{"a.long.topic.of.some.kind"}, 16)
		vm.Forwards = slices.Repeat([]string{"tcp:10000:22"}, 16)
		vm.LastHandshakeAgeMS, vm.LastPublishAgeMS = ms(99*86400), ms(47*3600+59*60)
		st.VMs, st.Refused = nil, nil
		for i := range 100 {
			vm.VM = strings.Repeat("frontend-", 13) + fmt.Sprintf("%03d", i)
			st.VMs = append(st.VMs, vm)
		}
		return st, nil
	}}
	for _, args := range [][]string{{"status"}, {"vm", "list"}, {"ports"}} {
		r := run(t, c, append(args, "--no-legend", "--no-pager"), func(f *Factory) { f.IO.Terminal, f.IO.Width = true, 80 })
		rows := make(map[string]bool)
		for line := range strings.Lines(r.out) {
			if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > 80 {
				t.Errorf("%v: %d columns: %s", args, n, line)
			}
			if name, _, _ := strings.Cut(line, " "); strings.HasPrefix(line, "front") {
				rows[name] = true
			}
		}
		if len(rows) != 100 {
			t.Errorf("%v: %d VMs can be told apart, of 100", args, len(rows))
		}
	}
}
