package cli

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/dbusclient"
)

// listening is a /proc that shows a listener on the port that testStatus has.
func listening(f *Factory) {
	f.Proc = fstest.MapFS{"net/tcp": {Data: []byte(`sl local_address rem_address st
0: 0100007F:1B9E 00000000:0000 0A 0 0 0
`)}}
}

// TestExplainRungs changes one thing of a bus on which all is well, and looks which
// rung it is that breaks, or bears a note.
func TestExplainRungs(t *testing.T) {
	type change func(st *bus.Status, vm *bus.VM)
	for _, tt := range []struct {
		name        string
		first, then change // what the looks show; nil: the same
		broken      string
		noted       string
		code        int
		stderr      string
	}{
		{"well", nil, nil, "", "", ExitDone, ""},
		{"new session", func(_ *bus.Status, vm *bus.VM) { vm.LastHeartbeatAgeMS = nil }, nil, "", "", ExitDone, ""},
		{
			"turned away, and its name taken by nobody", func(st *bus.Status, vm *bus.VM) {
				*vm = bus.VM{VM: "other"}
				st.Refused = []bus.Refused{{VM: "web1", Reason: "unknown-vm", AgeMS: 1000}, {VM: "$(reboot)", Reason: "unknown-vm"}, {VM: "web-1", Reason: "unknown-vm"}}
			}, nil, rungRegistered, "", ExitNoSuchVM, "castractl vm add web1; is it one of these, by another name? Turned away lately: web-1",
		},
		{
			"anybody is let in", func(st *bus.Status, vm *bus.VM) { st.Broker.UnknownVMs, vm.Registered = "accept", false },
			nil, "", "", ExitDone, "",
		},
		{
			"listens nowhere", func(st *bus.Status, _ *bus.VM) { st.Broker.Listen = nil },
			nil, rungListener, "", ExitUnreachable, "systemctl start castrad.socket",
		},
		{
			"listens elsewhere", func(st *bus.Status, _ *bus.VM) { st.Broker.Listen = []string{"127.0.0.1:7071"} },
			nil, rungListener, "", ExitUnreachable, "castrad says that it listens on 127.0.0.1:7071, and nothing does on this host",
		},
		{
			"one listener of two", func(st *bus.Status, _ *bus.VM) { st.Broker.Listen = []string{"127.0.0.1:7071", "127.0.0.1:7070"} },
			nil, "", "", ExitDone, "",
		},
		{
			"an impostor is turned away", func(st *bus.Status, _ *bus.VM) { st.Refused = []bus.Refused{{VM: "web1", Reason: "auth-failed"}} },
			nil, "", rungHandshake, ExitDone, "",
		},
		{
			"paused", func(_ *bus.Status, vm *bus.VM) { vm.Reachable, vm.Reason = false, "silent" },
			nil, rungHeartbeats, "", ExitUnreachable, "heartbeats: they have stopped: the last came 0s ago; is the VM paused",
		},
		{
			"never a heartbeat", func(_ *bus.Status, vm *bus.VM) {
				vm.Reachable, vm.Reason, vm.LastHeartbeatAgeMS = false, "silent", nil
			},
			nil, rungHeartbeats, "", ExitUnreachable, "heartbeats: none has come; is the VM paused",
		},
		{
			"silent for so long that its session has ended", func(_ *bus.Status, vm *bus.VM) {
				vm.Reachable, vm.Reason, vm.Session = false, "silent", ""
			},
			nil, rungHeartbeats, rungSession, ExitUnreachable, "heartbeats: they have stopped: the last came 0s ago; is the VM paused",
		},
		{
			"a key of its own, and the host has none", func(_ *bus.Status, vm *bus.VM) {
				vm.Keyed, vm.Capabilities = false, []string{"bus-v1", "auth-hmac-v1"}
				vm.Reachable, vm.Session = false, ""
			},
			nil, rungHandshake, "", ExitUnreachable, "castractl vm rekey web1",
		},
		{
			"turned away with a key of its own", func(st *bus.Status, vm *bus.VM) {
				*vm = bus.VM{VM: "other"}
				st.Refused = []bus.Refused{{VM: "web1", Reason: "unknown-vm", HasKey: true}}
			}, nil, rungRegistered, "", ExitNoSuchVM, "make it a new key, and start it with that: castractl vm add web1",
		},
		{
			"listens to nothing", func(_ *bus.Status, vm *bus.VM) { vm.BusSubscribed, vm.Subscriptions = false, nil },
			nil, "", rungSubscribed, ExitDone, "",
		},
		{
			"behind and reading", func(_ *bus.Status, vm *bus.VM) { vm.Lag = 900 },
			func(st *bus.Status, vm *bus.VM) { st.Broker.HeadSeq += 10; vm.Lag = 909 }, "", rungLag, ExitDone, "",
		},
		{
			"behind and not reading", func(_ *bus.Status, vm *bus.VM) { vm.Lag = 900 },
			func(st *bus.Status, vm *bus.VM) { st.Broker.HeadSeq += 10; vm.Lag = 910 }, rungLag, "", ExitUnreachable, "910 records behind, and not reading",
		},
		{
			"behind and read in the meantime", func(_ *bus.Status, vm *bus.VM) { vm.Lag = 900 },
			func(_ *bus.Status, vm *bus.VM) { vm.Lag = 0 }, "", "", ExitDone, "",
		},
		{
			"limited", func(_ *bus.Status, vm *bus.VM) { vm.RateLimited, vm.LastLimitedAgeMS = 5, ms(60) },
			nil, rungLimits, "", ExitUnreachable, "5 publishes refused for their rate, the last 1min ago",
		},
		{
			"limited long ago", func(_ *bus.Status, vm *bus.VM) { vm.RateLimited, vm.LastLimitedAgeMS = 5, ms(61) },
			nil, "", "", ExitDone, "",
		},
		{
			"a clone", func(_ *bus.Status, vm *bus.VM) { vm.Contended, vm.Superseded = true, 7 },
			nil, rungSession, "", ExitUnreachable, "keep replacing each other under this name: 7 times; give one of them a name",
		},
		{
			"degraded, and it says why", func(st *bus.Status, _ *bus.VM) {
				st.Broker.State = "degraded: disk full"
				st.Broker.Faults = []bus.Fault{{Part: "event-log", Cause: "disk full", Advice: "make room on /var/log"}, {Part: "cursors", Advice: "look"}}
			},
			nil, rungStorage, "", ExitUnreachable, "castrad is degraded: disk full; make room on /var/log",
		},
		{
			"degraded", func(st *bus.Status, _ *bus.VM) { st.Broker.State = "degraded: disk stalled" },
			nil, rungStorage, "", ExitUnreachable, "castrad is degraded: disk stalled; is the disk full, or does it not answer? df /var/log/castra; castractl logs",
		},
		{
			"in a guest, the host away", func(st *bus.Status, vm *bus.VM) {
				st.Broker.Kind, st.Broker.SpoolCount = kindGuest, 3
				vm.Session, vm.Reachable = "", false
			}, nil, rungSession, "", ExitUnreachable, "it is tried again by itself",
		},
		{
			"in a guest whose disk is full", func(st *bus.Status, _ *bus.VM) {
				st.Broker.Kind, st.Broker.SpoolDurable, st.Broker.SpoolReason = kindGuest, new(true), "disk full"
			},
			nil, rungStorage, rungRegistered, ExitUnreachable, "takes no messages while the host is away: disk full; is it full",
		},
		{
			"in a guest without a disk", func(st *bus.Status, _ *bus.VM) {
				st.Broker.Kind, st.Broker.SpoolReason = kindGuest, "in memory: spool_dir is empty"
			},
			nil, "", rungStorage, ExitDone, "",
		},
		{
			"in a guest, refused", func(st *bus.Status, vm *bus.VM) {
				st.Broker.Kind, st.Refused = kindGuest, []bus.Refused{{VM: "web1", Reason: "auth-required"}}
				vm.Session, vm.Reachable, vm.LastHandshakeAgeMS = "", false, nil
			}, nil, rungHandshake, "", ExitUnreachable, "on the host, start it with its key, as this says: castractl vm args web1; or make it a new one: castractl vm rekey web1",
		},
		{
			"in a guest, no host", func(st *bus.Status, vm *bus.VM) {
				st.Broker.Kind = kindGuest
				vm.Session, vm.Reachable, vm.LastHandshakeAgeMS = "", false, nil
			}, nil, rungConnected, "", ExitUnreachable, "/etc/castra/guestd.toml",
		},
		{
			"in another guest", func(st *bus.Status, vm *bus.VM) { st.Broker.Kind = kindGuest; *vm = bus.VM{VM: "web2"} },
			nil, "-", "", ExitNoSuchVM, "this guest is not web1",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel() // those that lag look twice, a moment apart
			looks := 0
			c := &fakeClient{status: func([]string) (bus.Status, error) {
				st := testStatus()
				st.Refused = nil
				st.Broker.State = "running"
				vm := findVM(&st, "web1")
				vm.Lag = 0
				if looks++; looks > 1 && tt.then != nil {
					tt.then(&st, vm)
				} else if tt.first != nil {
					tt.first(&st, vm)
				}
				return st, nil
			}}
			r := run(t, c, []string{"explain", "web1", "--json"}, listening)
			if r.code != tt.code || !strings.Contains(r.err, tt.stderr) || tt.stderr == "" && r.err != "" {
				t.Fatalf("exit code %d, want %d; stderr %q, want %q; stdout %s", r.code, tt.code, r.err, tt.stderr, r.out)
			}
			if tt.broken == "-" {
				return
			}
			var e explanation
			if err := json.Unmarshal([]byte(r.out), &e); err != nil {
				t.Fatal(err)
			}
			if e.Broken != tt.broken {
				t.Errorf("broken is %q, want %q: %s", e.Broken, tt.broken, r.out)
			}
			for _, rung := range e.Rungs {
				if want := rung.Rung == tt.noted; want && rung.State != rungNote {
					t.Errorf("%s is %s and not a note", rung.Rung, rung.State)
				}
			}
		})
	}
}

// Why castrad does not answer decides what is broken; what is no absence is an error.
func TestExplainWithoutCastrad(t *testing.T) {
	for absence, code := range map[dbusclient.Absence]int{
		dbusclient.Idle: ExitUnreachable, dbusclient.Starting: ExitNoCastrad, dbusclient.Failing: ExitNoCastrad,
		dbusclient.Failed: ExitNoCastrad, dbusclient.Stopped: ExitNoCastrad,
	} {
		c := &fakeClient{absence: absence, status: func([]string) (bus.Status, error) { return bus.Status{}, dbusclient.ErrNotRunning }}
		if r := run(t, c, []string{"explain", "web1"}); r.code != code || !strings.Contains(r.out, "broken") {
			t.Errorf("%s: exit code %d, want %d: %s", absence, r.code, code, r.out)
		}
		if absence == dbusclient.Idle {
			continue
		}
		r := run(t, c, []string{"explain", "web1"}, func(f *Factory) { f.Daemon = dbusclient.GuestDaemon })
		if r.code != code || !strings.Contains(r.out, "listener    broken       castra-guestd ") || strings.Contains(r.out, "castrad.socket") {
			t.Errorf("in a guest, %s: exit code %d, want %d: %s", absence, r.code, code, r.out)
		}
	}
	c := &fakeClient{status: func([]string) (bus.Status, error) { return bus.Status{}, errors.New("out of luck") }}
	run(t, c, []string{"explain", "web1"}).want(t, ExitFailed, "", "out of luck")
}
