package dbusapi

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/logging"
)

// action is what polkit is asked about.
type action string

const (
	actionPublish action = BusName + ".publish"
	actionTail    action = BusName + ".tail"
	actionManage  action = BusName + ".manage-vms"
)

// adminGroup is the group whose members may do everything where polkit does not
// decide.
const adminGroup = "castra"

const (
	polkitName  = "org.freedesktop.PolicyKit1"
	polkitPath  = dbus.ObjectPath("/org/freedesktop/PolicyKit1/Authority")
	polkitIface = "org.freedesktop.PolicyKit1.Authority"
)

const (
	// maxDialogs bounds the calls that wait for somebody to type a password, or
	// they could take up every call there may be.
	maxDialogs    = 16
	dialogTimeout = 2 * time.Minute
	// checkTimeout is for an answer without a dialog, and for one from the bus.
	checkTimeout = 10 * time.Second
)

// identity is who a caller is.
type identity struct {
	uid  uint32
	gids []uint32
}

// authorizer decides what callers may do. It keeps nothing of what it learns
// about them. What it keeps is whether polkit is there, until that changes.
type authorizer struct {
	srv     *Server
	conn    *busConn
	self    uint32
	dialogs chan struct{} // capacity maxDialogs: one token a dialog that may be open

	mu      sync.Mutex
	polkit  polkitState
	changes uint   // of polkit's owner, so that an answer from before one is not kept
	checks  uint64 // numbers the checks that may be cancelled
	failing bool   // polkit is there and does not answer: it was logged
}

type polkitState int

const (
	polkitUnknown polkitState = iota
	polkitThere
	polkitAbsent
)

func newAuthorizer(s *Server, conn *busConn) *authorizer {
	return &authorizer{srv: s, conn: conn, self: uint32(os.Geteuid()), dialogs: make(chan struct{}, maxDialogs)}
}

// watch has the bus tell when polkit comes and goes.
func (a *authorizer) watch(ctx context.Context) error {
	if _, err := a.conn.driver(ctx, "AddMatch", ownerRule(polkitName)); err != nil {
		return fmt.Errorf("watching for polkit: %w", err)
	}
	return nil
}

// ownerChanged is called by the reader for every change of an owner it sees.
func (a *authorizer) ownerChanged(name string) {
	if name == polkitName {
		a.mu.Lock()
		a.polkit = polkitUnknown
		a.changes++
		a.mu.Unlock()
	}
}

// allow returns nil if the sender of h may do what, and else an error that says
// what would let it.
func (a *authorizer) allow(ctx context.Context, h *header, what action) error {
	who, err := a.identity(ctx, h.sender)
	if err != nil {
		return bus.Errorf(bus.CodeAccessDenied, "the message bus does not say who is calling (%s)", err)
	}
	if who.uid == 0 || who.uid == a.self {
		return nil // polkit, too, always lets them
	}
	if a.polkitPresent(ctx) {
		interactive := h.flags&dbus.FlagAllowInteractiveAuthorization != 0
		allowed, err := a.ask(ctx, h.sender, what, interactive)
		a.logFailing(err)
		switch {
		case err == nil && allowed:
			return nil
		case err == nil:
			return bus.Errorf(bus.CodeAccessDenied, "polkit does not allow %s the action %s; as installed, it allows it to members of the group %s and to who gives an administrator's password", nameOf(who.uid), what, a.srv.hooks.group)
		case ctx.Err() != nil, errors.Is(err, errDialogs):
			return err
		}
		// It is there and does not decide, as where its policy file is not
		// installed: the group does, as where it is not there.
	}
	if a.isAdmin(who) {
		return nil
	}
	hint := "" // a user without a name cannot be added
	if name := nameOf(who.uid); !strings.Contains(name, " ") {
		hint = "; let it in with: usermod -aG " + a.srv.hooks.group + " " + name
	}
	return bus.Errorf(bus.CodeAccessDenied, "only root and members of the group %s may do this (polkit action %s), which %s is not%s",
		a.srv.hooks.group, what, nameOf(who.uid), hint)
}

// identity asks the bus, whose answer cannot be forged.
func (a *authorizer) identity(ctx context.Context, sender string) (identity, error) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	return a.srv.hooks.identify(ctx, a.conn, sender)
}

func identify(ctx context.Context, c *busConn, sender string) (identity, error) {
	reply, err := c.driver(ctx, "GetConnectionCredentials", sender)
	if err != nil {
		return identity{}, err
	}
	var creds map[string]dbus.Variant
	if err := dbus.Store(reply, &creds); err != nil {
		return identity{}, err
	}
	uid, ok := creds["UnixUserID"].Value().(uint32)
	if !ok {
		return identity{}, errors.New("it has no user")
	}
	who := identity{uid: uid}
	if gids, ok := creds["UnixGroupIDs"].Value().([]uint32); ok {
		who.gids = gids
		return who, nil
	}
	// A bus that knows no groups: what the user database says.
	if u, err := user.LookupId(strconv.FormatUint(uint64(uid), 10)); err == nil {
		ids, _ := u.GroupIds()
		for _, id := range ids {
			if gid, err := strconv.ParseUint(id, 10, 32); err == nil {
				who.gids = append(who.gids, uint32(gid))
			}
		}
	}
	return who, nil
}

// isAdmin tells whether who is in the administrators' group.
func (a *authorizer) isAdmin(who identity) bool {
	g, err := user.LookupGroup(a.srv.hooks.group)
	if err != nil {
		return false // no such group: nobody is in it
	}
	gid, err := strconv.ParseUint(g.Gid, 10, 32)
	return err == nil && slices.Contains(who.gids, uint32(gid))
}

func nameOf(uid uint32) string {
	if u, err := user.LookupId(strconv.FormatUint(uint64(uid), 10)); err == nil {
		return u.Username
	}
	return fmt.Sprintf("uid %d", uid)
}

// polkitPresent tells whether polkit runs or would be started when asked.
func (a *authorizer) polkitPresent(ctx context.Context) bool {
	a.mu.Lock()
	state, changes := a.polkit, a.changes
	a.mu.Unlock()
	if state != polkitUnknown {
		return state == polkitThere
	}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	reply, err := a.conn.driver(ctx, "NameHasOwner", polkitName)
	if err == nil && reply[0] != true {
		if reply, err = a.conn.driver(ctx, "ListActivatableNames"); err == nil {
			names, _ := reply[0].([]string)
			reply = []any{slices.Contains(names, polkitName)}
		}
	}
	if err != nil {
		return false
	}
	there := reply[0] == true
	a.mu.Lock()
	if a.changes == changes {
		a.polkit = polkitAbsent
		if there {
			a.polkit = polkitThere
		}
	}
	a.mu.Unlock()
	return there
}

// errDialogs is a dialog too many.
var errDialogs = fmt.Errorf("%d calls wait for a password to be typed already; try again", maxDialogs)

// ask has polkit decide (polkit Reference Manual, the Authority interface).
func (a *authorizer) ask(ctx context.Context, sender string, what action, interactive bool) (bool, error) {
	const allowInteraction = 1
	timeout, flags, cancelID := checkTimeout, uint32(0), ""
	if interactive {
		select {
		case a.dialogs <- struct{}{}:
			defer func() { <-a.dialogs }()
		default:
			return false, errDialogs
		}
		timeout, flags = dialogTimeout, allowInteraction
		a.mu.Lock()
		a.checks++
		cancelID = "castra-" + strconv.FormatUint(a.checks, 10)
		a.mu.Unlock()
	}
	asking, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	type subject struct {
		Kind    string
		Details map[string]dbus.Variant
	}
	reply, err := a.conn.call(asking, polkitName, polkitPath, polkitIface, "CheckAuthorization",
		subject{"system-bus-name", map[string]dbus.Variant{"name": dbus.MakeVariant(sender)}},
		string(what), map[string]string{}, flags, cancelID)
	if err != nil {
		if interactive && asking.Err() != nil {
			// Or the dialog would stay open, for a call that has ended.
			_, _ = a.conn.call(ctx, polkitName, polkitPath, polkitIface, "CancelCheckAuthorization", cancelID)
		}
		return false, err
	}
	var result struct {
		Authorized, Challenge bool
		Details               map[string]string
	}
	if err := dbus.Store(reply, &result); err != nil {
		return false, fmt.Errorf("reading polkit's answer: %w", err)
	}
	return result.Authorized, nil
}

// logFailing logs once that polkit does not answer, and once that it does again.
func (a *authorizer) logFailing(err error) {
	if errors.Is(err, errDialogs) || errors.Is(err, context.Canceled) {
		return
	}
	a.mu.Lock()
	changed := a.failing != (err != nil)
	a.failing = err != nil
	a.mu.Unlock()
	switch {
	case !changed:
	case err != nil:
		logging.PolkitUnavailable.On(a.srv.opts.Log).WithError(err).Warnf("polkit gives no decision; root and the group %s decide", a.srv.hooks.group)
	default:
		logging.PolkitBack.On(a.srv.opts.Log).Info("polkit gives decisions again")
	}
}
