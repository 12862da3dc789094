package dbusapi

import (
	"context"
	"slices"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/castrabus/castra/internal/bus"
)

// method is one that may be called.
type method struct {
	name    string
	in      string // the signature of its arguments
	action  action // what the caller must be allowed to do; "": anybody may call
	ordered bool   // changes something: one at a time and sender, in order
	heavy   bool   // may list every VM
	run     func(ctx context.Context, c *call, args []any) ([]any, error)
}

// methods holds every interface that has methods. It is never changed.
var methods = map[string][]method{
	ManagerInterface: managerMethods,
	ifacePeer:        peerMethods,
	ifaceIntrospect:  introspectMethods,
	ifaceProperties:  propertiesMethods,
	ifaceObjects:     objectsMethods,
}

// interfacesAt names the interfaces of the object at path, whether or not there is
// such a VM just now; none for a path that never is an object.
func interfacesAt(path dbus.ObjectPath) []string {
	switch path {
	case RootPath:
		return []string{ifacePeer, ifaceIntrospect, ifaceProperties, ifaceObjects, ManagerInterface}
	case "/", "/org", "/org/castra", vmParent:
		return []string{ifacePeer, ifaceIntrospect}
	}
	if _, ok := vmOfPath(path); ok {
		return []string{ifacePeer, ifaceIntrospect, ifaceProperties, VMInterface}
	}
	return nil
}

// lookup finds the method that a call is for.
func lookup(h *header) (*method, error) {
	ifaces := interfacesAt(h.path)
	if h.iface == ifacePeer {
		ifaces = []string{ifacePeer} // every path has it
	}
	if ifaces == nil {
		return nil, dbusError(errNameObject, "there is no object %s", h.path)
	}
	found := h.iface == ""
	for _, i := range ifaces {
		if h.iface != "" && h.iface != i {
			continue
		}
		found = true
		if n := slices.IndexFunc(methods[i], func(m method) bool { return m.name == h.member }); n >= 0 {
			return &methods[i][n], nil
		}
	}
	if !found {
		return nil, dbusError(errNameInterface, "%s has no interface %s", h.path, h.iface)
	}
	return nil, dbusError(errNameMethod, "%s has no method %s", h.path, h.member)
}

// call is one method call under way.
type call struct {
	*message
	link   *link
	method *method // nil: err says why
	err    error
	who    *caller // nil: it was not admitted
	size   int
	wait   time.Duration // before it is carried out: its sender calls too much
	after  func()        // what is left to do once the answer is out; may be nil

	uncounted bool // it counts as done
}

// run carries the call out and answers it.
func (c *call) run() {
	if c.flags&dbus.FlagNoReplyExpected != 0 && (c.method == nil || !c.method.ordered && c.method.action == "") {
		return // nothing would come of it
	}
	if !c.rest() {
		_ = c.sendError(bus.Errorf(bus.CodeShuttingDown, "%s is stopping; try again", c.link.srv.daemon))
		return
	}
	if c.method != nil && c.method.heavy {
		select {
		case c.link.heavy <- struct{}{}:
			defer func() { <-c.link.heavy }()
		case <-c.link.soft.Done():
			_ = c.sendError(c.link.soft.Err())
			return
		}
	}
	args, err := c.perform()
	if err == nil && c.flags&dbus.FlagNoReplyExpected == 0 {
		// An answer that cannot be sent as it is still leaves room for an error.
		err = c.link.conn.reply(&c.header, c.uncount, args...)
	}
	if err != nil {
		// If the connection is lost, its reader knows and ends the link.
		_ = c.sendError(err)
	}
	if c.after != nil {
		c.after()
	}
}

// rest waits for the sender's share, and tells whether that came.
func (c *call) rest() bool {
	if c.wait <= 0 {
		return true
	}
	t := time.NewTimer(c.wait)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-c.link.soft.Done():
		return false
	}
}

func (c *call) perform() ([]any, error) {
	if c.err != nil {
		return nil, c.err
	}
	// Before the body is decoded: see message.body.
	if c.signature != c.method.in {
		return nil, c.wrongArgs("%s takes arguments of the types %q, not %q", c.member, c.method.in, c.signature)
	}
	ctx := c.link.soft
	if c.method.ordered {
		ctx = c.link.hard
	}
	if c.method.action != "" {
		if err := c.link.auth.allow(ctx, &c.header, c.method.action); err != nil {
			return nil, err
		}
	}
	args, err := c.body()
	if err != nil {
		return nil, c.wrongArgs("the arguments cannot be read: %s", err)
	}
	c.frame = nil // the arguments are copies; a wait should not keep it
	return c.method.run(ctx, c, args)
}

// wrongArgs is the error for arguments that are not what a method takes.
func (c *call) wrongArgs(format string, args ...any) error {
	if c.method.action != "" || c.iface == ManagerInterface {
		return bus.Errorf(bus.CodeInvalidArg, format, args...)
	}
	return dbusError(errNameArgs, format, args...)
}

// sendError answers with an error, if an answer is awaited. What it returns is
// the connection's end.
func (c *call) sendError(err error) error {
	if c.flags&dbus.FlagNoReplyExpected != 0 {
		return nil
	}
	return c.link.conn.refuse(&c.header, c.uncount, asDBus(err))
}
