package dbusapi

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/castrabus/castra/internal/bus"
)

// What callers may have under way at once. A sender is a connection to the bus.
const (
	// maxCallsPerSender is how many answers dbus-daemon lets one connection wait
	// for (max_replies_per_connection).
	maxCallsPerSender = 128
	maxCalls          = 1024
	// Bytes of arguments, so that payloads in flight have a bound of their own.
	maxBytesPerSender = 4 << 20
	maxBytes          = 64 << 20
	// Calls that last: a Tail, and a WaitAck. A Tail costs a socket pair.
	maxHeldPerSender = 32
	maxHeld          = 256
	// maxHeavy is how many answers that may list all VMs are made at a time; the
	// rest wait. With 10,000 VMs one is 4 MB long and takes up to 110 MB of
	// allocations.
	maxHeavy = 2
	// One sender's calls a second, for as long as it likes and at once; what is
	// beyond waits. A heavy one counts as heavyCost.
	callRate  = 200
	callBurst = 400
	heavyCost = 20
	// maxIdleCallers is how many senders that have nothing under way are remembered
	// for the sake of that.
	maxIdleCallers = 1024
)

// link is the service on one connection, from its start to its loss.
type link struct {
	srv  *Server
	conn *busConn
	auth *authorizer
	done chan struct{} // closed when the connection is read no more
	err  error         // why; set before done is closed

	// soft ends with the link: tails and waits. hard ends a little later, so that
	// a publish still gets its answer.
	soft, hard       context.Context
	endSoft, endHard context.CancelFunc

	calls sync.WaitGroup // every goroutine but the reader
	heavy chan struct{}  // capacity maxHeavy: one token a heavy answer being made

	mu      sync.Mutex
	closing bool
	callers map[string]*caller // by unique name; those with something under way
	nCalls  int
	nBytes  int
	nHeld   int
}

// caller is what one sender has under way.
type caller struct {
	calls, bytes int
	queue        []*call // ordered calls not begun yet; at most maxCallsPerSender
	draining     bool    // a goroutine works on queue
	held         map[*hold]struct{}
	rate         callBudget
}

// callBudget counts how much a sender has called lately.
type callBudget struct {
	owed float64 // calls
	at   time.Time
}

// spend counts a call and gives how long it has to wait.
func (b *callBudget) spend(cost float64, now time.Time) time.Duration {
	b.owed = max(0, b.owed-now.Sub(b.at).Seconds()*callRate) + cost
	b.at = now
	if over := b.owed - callBurst; over > 0 {
		return time.Duration(over / callRate * float64(time.Second))
	}
	return 0
}

// small tells whether so little is owed that it need not be remembered.
func (b *callBudget) small(now time.Time) bool {
	return b.owed-now.Sub(b.at).Seconds()*callRate < callBurst/2
}

// hold is a call that lasts until its caller leaves the bus.
type hold struct {
	ctx    context.Context
	cancel context.CancelFunc
}

// connect makes one attempt to reach the bus and own the name.
func (s *Server) connect(ctx context.Context) (*link, error) {
	dialing, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	conn, err := dialBus(dialing, s.opts.Address)
	if err != nil {
		return nil, err
	}
	l := &link{
		srv: s, conn: conn, done: make(chan struct{}),
		heavy:   make(chan struct{}, maxHeavy),
		callers: make(map[string]*caller),
	}
	l.hard, l.endHard = context.WithCancel(context.WithoutCancel(ctx))
	l.soft, l.endSoft = context.WithCancel(l.hard)
	l.auth = newAuthorizer(s, conn)
	if s.hooks.linked != nil {
		s.hooks.linked(l)
	}
	go l.readLoop()
	if err := l.own(dialing); err != nil {
		l.shut()
		return nil, err
	}
	return l, nil
}

// own says Hello, watches for what the link must know and takes the name.
func (l *link) own(ctx context.Context) error {
	if _, err := l.conn.driver(ctx, "Hello"); err != nil {
		return fmt.Errorf("greeting the message bus: %w", err)
	}
	if err := l.auth.watch(ctx); err != nil {
		return err
	}
	// Changes from here on are signalled; what is there already can be asked for
	// once the name is owned.
	known := l.srv.dirty.start(l.srv.opts.Bus)
	l.calls.Go(func() { l.signalChanges(known) })

	// Where the host of VMs is a VM itself, both daemons run, and castrad has the
	// name: DBUS_NAME_FLAG_… of the D-Bus specification, "org.freedesktop.DBus.RequestName".
	const allowReplacement, replaceExisting, doNotQueue uint32 = 1, 2, 4
	flags := doNotQueue | replaceExisting
	if l.srv.opts.Yield {
		flags = doNotQueue | allowReplacement
	}
	reply, err := l.conn.driver(ctx, "RequestName", BusName, flags)
	if e, ok := errors.AsType[dbus.Error](err); ok && e.Name == "org.freedesktop.DBus.Error.AccessDenied" {
		return fmt.Errorf("the message bus does not let this user own %s (its policy file, %s.conf, belongs into /usr/share/dbus-1/system.d): %w", BusName, BusName, err)
	}
	if err != nil {
		return fmt.Errorf("asking the message bus for the name %s: %w", BusName, err)
	}
	const primaryOwner = 1 // DBUS_REQUEST_NAME_REPLY_PRIMARY_OWNER
	if len(reply) != 1 || reply[0] != uint32(primaryOwner) {
		return ErrNameTaken
	}
	return nil
}

// serve returns when ctx is done or the connection is lost, everything that
// belongs to the link having ended.
func (l *link) serve(ctx context.Context) error {
	select {
	case <-ctx.Done():
	case <-l.done:
	}
	l.shut()
	return fmt.Errorf("the message bus went away: %w", l.err)
}

// shut takes no more calls, lets those under way end, and closes the connection.
func (l *link) shut() {
	l.srv.dirty.stop()
	l.mu.Lock()
	l.closing = true
	l.mu.Unlock()
	l.endSoft()
	l.conn.limitWrites(l.srv.hooks.grace)
	grace := time.AfterFunc(l.srv.hooks.grace, l.endHard)
	l.calls.Wait()
	grace.Stop()
	l.endHard()
	l.conn.close()
	<-l.done
}

// readLoop is the one reader of the connection.
func (l *link) readLoop() {
	defer close(l.done)
	defer l.conn.close() // ends our calls to others, and with them whoever waits
	for {
		m, err := l.conn.read()
		if err == nil && m.typ == dbus.TypeSignal {
			err = l.signal(m)
		} else if err == nil && m.sender != "" {
			err = l.dispatch(m)
		}
		if err != nil {
			l.err = err
			return
		}
	}
}

// signal takes in what the bus itself says; other senders' signals are not decoded.
func (l *link) signal(m *message) error {
	if m.sender != driverName || m.iface != ifaceDriver {
		return nil
	}
	args, err := m.body()
	if err != nil {
		return err
	}
	switch m.member {
	case "NameLost":
		if len(args) == 1 && args[0] == BusName {
			return fmt.Errorf("the name %s was taken away", BusName)
		}
	case "NameOwnerChanged":
		if m.signature != "sss" || len(args) != 3 {
			return nil
		}
		l.auth.ownerChanged(args[0].(string))
		if args[2] == "" {
			l.left(args[0].(string))
		}
	}
	return nil
}

// dispatch admits a call or refuses it. Refusing writes to the bus from the
// reader, on purpose: who floods us is read no faster than answered. Its error is
// the connection's end.
func (l *link) dispatch(m *message) error {
	c := &call{link: l, message: m}
	c.method, c.err = lookup(&m.header)
	if refusal := l.admit(c); refusal != nil {
		return c.sendError(refusal)
	}
	return nil
}

// admit counts a call and has it carried out, or says why not.
func (l *link) admit(c *call) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	who, size := l.callers[c.sender], len(c.frame)
	if who == nil {
		who = &caller{}
	}
	switch {
	case l.closing:
		return bus.Errorf(bus.CodeShuttingDown, "%s is stopping; try again", l.srv.daemon)
	case c.frame == nil:
		return dbusError(errNameLimits, "the message is larger than %d bytes", maxIncoming)
	case who.calls >= maxCallsPerSender || who.bytes+size > maxBytesPerSender:
		return dbusError(errNameLimits, "this connection waits for %d calls with %d bytes already, of at most %d and %d; wait for answers before calling again",
			who.calls, who.bytes, maxCallsPerSender, maxBytesPerSender)
	case l.nCalls >= maxCalls || l.nBytes+size > maxBytes:
		return dbusError(errNameLimits, "%s is busy with %d calls with %d bytes, of at most %d and %d; try again",
			l.srv.daemon, l.nCalls, l.nBytes, maxCalls, maxBytes)
	}
	l.callers[c.sender] = who
	c.who, c.size = who, size
	cost := 1.0
	if c.method != nil && c.method.heavy {
		cost = heavyCost
	}
	c.wait = who.rate.spend(cost, time.Now())
	who.calls, who.bytes = who.calls+1, who.bytes+size
	l.nCalls, l.nBytes = l.nCalls+1, l.nBytes+size
	switch {
	case c.method == nil || !c.method.ordered:
		l.calls.Go(func() { l.carryOut(c) })
	case who.draining:
		who.queue = append(who.queue, c)
	default:
		who.draining = true
		l.calls.Go(func() { l.drain(c) })
	}
	return nil
}

// drain carries out a sender's ordered calls until there are none.
func (l *link) drain(c *call) {
	for who := c.who; c != nil; {
		l.carryOut(c)
		l.mu.Lock()
		c = nil
		if len(who.queue) > 0 {
			c, who.queue = who.queue[0], who.queue[1:]
		} else {
			who.draining = false
		}
		l.mu.Unlock()
	}
}

// carryOut runs one admitted call.
func (l *link) carryOut(c *call) {
	c.run()
	c.uncount() // where there was no answer
}

// uncount counts a call as done, once. That is just before its answer goes out: who
// has the answer may call again at once, and must not be refused for the call
// answered. Of all answers one at a time goes out, so no more than one is not counted.
func (c *call) uncount() {
	l, who := c.link, c.who
	if c.uncounted || who == nil {
		return
	}
	c.uncounted = true
	l.mu.Lock()
	defer l.mu.Unlock()
	who.calls, who.bytes = who.calls-1, who.bytes-c.size
	l.nCalls, l.nBytes = l.nCalls-1, l.nBytes-c.size
	l.forget(c.sender, who)
}

// forget drops a caller that has nothing under way and has not called too much
// lately. l.mu is held.
func (l *link) forget(sender string, who *caller) {
	now := time.Now()
	gone := func(who *caller) bool { return who.calls == 0 && len(who.held) == 0 }
	if gone(who) && who.rate.small(now) {
		delete(l.callers, sender)
	}
	if len(l.callers) > maxIdleCallers {
		for name, who := range l.callers {
			if gone(who) {
				delete(l.callers, name)
			}
		}
	}
}

// hold makes a context that ends when c's sender leaves the bus, or with the
// link. release must be called once.
func (l *link) hold(ctx context.Context, c *call) (held context.Context, release func(), err error) {
	h := &hold{}
	h.ctx, h.cancel = context.WithCancel(l.soft)
	l.mu.Lock()
	full := len(c.who.held) >= maxHeldPerSender || l.nHeld >= maxHeld
	if !full {
		if c.who.held == nil {
			c.who.held = make(map[*hold]struct{})
		}
		c.who.held[h] = struct{}{}
		l.nHeld++
	}
	l.mu.Unlock()
	if full {
		h.cancel()
		return nil, nil, dbusError(errNameLimits, "too many tails and waits: a connection may have %d and all together %d; end one first", maxHeldPerSender, maxHeld)
	}
	// One rule a hold: the bus counts equal rules and takes them away one by one.
	rule := ownerRule(c.sender)
	release = func() {
		h.cancel()
		// Not soft, which may have ended: the rule would stay with the bus.
		_, _ = l.conn.driver(l.hard, "RemoveMatch", rule)
		l.mu.Lock()
		delete(c.who.held, h)
		l.nHeld--
		l.forget(c.sender, c.who)
		l.mu.Unlock()
	}
	if _, err := l.conn.driver(ctx, "AddMatch", rule); err != nil {
		release()
		return nil, nil, fmt.Errorf("watching for %s to leave the bus: %w", c.sender, err)
	}
	// It may have left before the rule was there.
	if reply, err := l.conn.driver(ctx, "NameHasOwner", c.sender); err != nil || len(reply) != 1 || reply[0] != true {
		release()
		return nil, nil, bus.Errorf(bus.CodeInternal, "the caller %s has left the message bus", c.sender)
	}
	return h.ctx, release, nil
}

// ownerRule matches the signals that tell who owns a name.
func ownerRule(name string) string {
	return "type='signal',sender='" + driverName + "',interface='" + ifaceDriver + "',member='NameOwnerChanged',arg0='" + name + "'"
}

// left ends what a connection held that is no longer on the bus.
func (l *link) left(name string) {
	l.mu.Lock()
	var ended []*hold
	if who := l.callers[name]; who != nil {
		ended = slices.Collect(maps.Keys(who.held))
	}
	l.mu.Unlock()
	for _, h := range ended {
		h.cancel()
	}
}
