package dbusapi

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/godbus/dbus/v5"
	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"

	"github.com/castrabus/castra/internal/bus"
)

// anybody is a user that is not root, not us, and not in the user database.
const anybody = 4_000_000

// as are quick hooks whose callers are who.
func as(who identity, group string) hooks {
	h := quick()
	h.group = group
	h.identify = func(context.Context, *busConn, string) (identity, error) { return who, nil }
	return h
}

// group is any group there is, and its number.
func group(t *testing.T) (name string, gid uint32) {
	t.Helper()
	g, err := user.LookupGroupId("0")
	if err != nil {
		t.Fatal(err)
	}
	return g.Name, 0
}

// attempts calls every method and gives the errors of those that were refused for
// lack of rights.
func attempts(c *dbus.Conn) map[string]string {
	refused := make(map[string]string)
	for name, args := range map[string][]any{
		"Publish": {"t", "1", vars{}}, "WaitAck": {uint64(1), uint64(0)}, "Tail": {variants(map[string]any{"x": 1})}, "Describe": {[]string{}},
		"AddVM": {"web1", vars{}}, "RemoveVM": {"web1"}, "RekeyVM": {"web1"},
	} {
		err := manager(c).Call(ManagerInterface+"."+name, 0, args...).Err
		if e, ok := errors.AsType[dbus.Error](err); ok && e.Name == ErrorName(bus.CodeAccessDenied) {
			refused[name] = e.Error()
		}
	}
	return refused
}

func authBus() *fakeBus {
	f := newFakeBus()
	f.waitAck = func(context.Context, uint64) (string, error) { return "web1", nil }
	return f
}

func TestAuthorizationWithoutPolkit(t *testing.T) {
	name, gid := group(t)
	for _, tt := range []struct {
		who     identity
		refused int
	}{
		{identity{uid: 0}, 0},
		{identity{uid: uint32(os.Geteuid())}, 0},
		{identity{uid: anybody, gids: []uint32{gid + 1, gid}}, 0},
		{identity{uid: anybody, gids: []uint32{gid + 1}}, 6},
		{identity{uid: anybody}, 6},
	} {
		t.Run(fmt.Sprint(tt.who), func(t *testing.T) {
			b := newBus(t, openPolicy)
			b.serve(Options{Bus: authBus(), Registry: &fakeRegistry{}}, as(tt.who, name))
			refused := attempts(b.client())
			if len(refused) != tt.refused {
				t.Errorf("refused: %q", refused)
			}
			want := fmt.Sprintf("only root and members of the group %s may do this (polkit action org.castra.Bus1.manage-vms), which uid %d is not", name, anybody)
			if got, ok := refused["AddVM"]; ok && got != want {
				t.Errorf("the refusal is %q, want %q", got, want)
			}
			if props, err := getAll(b.client(), RootPath, ManagerInterface); err != nil || len(props) == 0 {
				t.Errorf("reading: %v", err)
			}
		})
	}
}

func TestNobodyKnowsTheCaller(t *testing.T) {
	b, h := newBus(t, openPolicy), quick()
	h.identify = func(context.Context, *busConn, string) (identity, error) { return identity{}, errors.New("gone") }
	b.serve(Options{Bus: authBus()}, h)
	if got := attempts(b.client())["Publish"]; got != "the message bus does not say who is calling (gone)" {
		t.Errorf("%q", got)
	}
}

// polkit stands in for polkitd.
type polkit struct {
	decide func(kind string, sender any, action string, flags uint32) (bool, *dbus.Error)
}

type polkitSubject struct {
	Kind    string
	Details vars
}

type polkitResult struct {
	Authorized, Challenge bool
	Details               map[string]string
}

func (p polkit) CheckAuthorization(s polkitSubject, action string, _ map[string]string, flags uint32, _ string) (polkitResult, *dbus.Error) {
	ok, err := p.decide(s.Kind, s.Details["name"].Value(), action, flags)
	return polkitResult{ok, false, map[string]string{}}, err
}

// serve puts p on the bus.
func (p polkit) serve(t *testing.T, b *testBus) *dbus.Conn {
	t.Helper()
	c := b.client()
	if err := c.Export(p, polkitPath, polkitIface); err != nil {
		t.Fatal(err)
	}
	if _, err := c.RequestName(polkitName, 0); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestAuthorizationWithPolkit(t *testing.T) {
	name, gid := group(t)
	b := newBus(t, openPolicy)
	log, logged := logtest.NewNullLogger()
	// In the group, which is not asked as long as polkit decides.
	b.serve(Options{Bus: authBus(), Registry: &fakeRegistry{}, Log: logrus.NewEntry(log)}, as(identity{uid: anybody, gids: []uint32{gid}}, name))
	c := b.client()
	if refused := attempts(c); len(refused) != 0 {
		t.Errorf("before there is polkit: %v", refused)
	}
	p := polkit{func(kind string, sender any, action string, f uint32) (bool, *dbus.Error) {
		if kind != "system-bus-name" || sender != c.Names()[0] {
			return false, dbus.MakeFailedError(fmt.Errorf("asked about %s %v", kind, sender))
		}
		return action == "org.castra.Bus1.tail" || action == "org.castra.Bus1.publish" && f == 1, nil
	}}.serve(t, b)
	refused := attempts(c)
	if len(refused) != 5 || refused["Tail"] != "" {
		t.Errorf("with polkit: %v", refused)
	}
	want := fmt.Sprintf("polkit does not allow uid %d the action org.castra.Bus1.publish; as installed, it allows it to members of the group %s and to who gives an administrator's password", anybody, name)
	if refused["Publish"] != want {
		t.Errorf("the refusal is %q", refused["Publish"])
	}
	m := methodCall(RootPath, ManagerInterface, "Publish", "t", "1", vars{})
	delete(m.Headers, dbus.FieldSender)
	m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(m.Body...))
	m.Flags = dbus.FlagAllowInteractiveAuthorization
	if err := (<-c.Send(m, make(chan *dbus.Call, 1)).Done).Err; err != nil {
		t.Errorf("with a dialog: %v", err)
	}

	p.Close() // the group decides again
	eventually(t, "polkit has left", func() bool {
		var there bool
		err := c.BusObject().Call("org.freedesktop.DBus.NameHasOwner", 0, polkitName).Store(&there)
		return err == nil && !there
	})
	if refused := attempts(c); len(refused) != 0 {
		t.Errorf("without polkit again: %v", refused)
	}

	// Polkit knows no such action: the group decides, and the log says so once.
	polkit{func(string, any, string, uint32) (bool, *dbus.Error) {
		return false, dbus.NewError("org.freedesktop.PolicyKit1.Error.Failed", []any{"Action is not registered"})
	}}.serve(t, b)
	for range 2 {
		if refused := attempts(c); len(refused) != 0 {
			t.Errorf("without actions: %v", refused)
		}
	}
	if entries := logged.AllEntries(); len(entries) != 1 || !strings.HasPrefix(entries[0].Message, "polkit gives no decision; root and the group "+name) {
		t.Errorf("logged: %v", entries)
	}
}

// TestDialogs has callers wait for passwords that nobody types.
func TestDialogs(t *testing.T) {
	b := newBus(t, openPolicy)
	s := b.serve(Options{Bus: authBus()}, as(identity{uid: anybody}, "no-such-group"))
	release := make(chan struct{})
	polkit{func(_ string, _ any, _ string, flags uint32) (bool, *dbus.Error) {
		if flags == 1 {
			<-release
		}
		return true, nil
	}}.serve(t, b)
	done := make(chan *dbus.Call, maxDialogs+1) // every answer
	for range maxDialogs + 1 {
		c := b.client() // each of its own: a sender's publishes wait for each other
		m := methodCall(RootPath, ManagerInterface, "Publish", "t", "1", vars{})
		delete(m.Headers, dbus.FieldSender)
		m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(m.Body...))
		m.Flags = dbus.FlagAllowInteractiveAuthorization
		c.Send(m, done)
	}
	if got := errorOf(receive(t, done).Err); got != "LimitsExceeded: 16 calls wait for a password to be typed already; try again" {
		t.Errorf("one too many: %q", got)
	}
	if err := manager(b.client()).Call(ManagerInterface+".Publish", 0, "t", "1", vars{}).Err; err != nil {
		t.Errorf("without a dialog: %v", err)
	}
	close(release)
	for range maxDialogs {
		if err := receive(t, done).Err; err != nil {
			t.Error(err)
		}
	}
	s.Close()
}

// TestCredentials asks a real bus who is calling.
func TestCredentials(t *testing.T) {
	b, h := newBus(t, openPolicy), quick()
	found := make(chan identity, 8) // more than there are calls
	h.identify = func(ctx context.Context, c *busConn, sender string) (identity, error) {
		who, err := identify(ctx, c, sender)
		found <- who
		return who, err
	}
	h.group = "no-such-group"
	b.serve(Options{Bus: authBus()}, h)
	if err := manager(b.client()).Call(ManagerInterface+".Publish", 0, "t", "1", vars{}).Err; err != nil {
		t.Error(err)
	}
	if who := receive(t, found); who.uid != uint32(os.Geteuid()) {
		t.Errorf("we are %v", who)
	}
	if os.Geteuid() != 0 {
		return // only root can call as somebody else
	}
	nobody, err := user.Lookup("nobody")
	if err != nil {
		t.Fatal(err)
	}
	uid, _ := strconv.Atoi(nobody.Uid)
	gid, _ := strconv.Atoi(nobody.Gid)
	cmd := exec.Command("busctl", "--address="+b.address, "call", BusName, string(RootPath), ManagerInterface, "Publish", "ssa{sv}", "t", "1", "0")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "which nobody is not; let it in with: usermod -aG no-such-group nobody") {
		t.Errorf("nobody got %v: %s", err, out)
	}
	if who := receive(t, found); who.uid != uint32(uid) || len(who.gids) == 0 {
		t.Errorf("nobody is %v", who)
	}
}
