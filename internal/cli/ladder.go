package cli

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/dbusclient"
	"github.com/castrabus/castra/internal/wire"
)

// The rungs, from the top. Each is only worth a look where those above it hold, but
// for what a VM with a session is told all of.
const (
	rungRegistered = "registered" // castrad lets the name in
	rungListener   = "listener"   // guests can connect
	rungConnected  = "connected"  // the VM has, since castrad started
	rungHandshake  = "handshake"  // and was not turned away
	rungSession    = "session"    // it has one now
	rungHeartbeats = "heartbeats" // and is heard of on it
	rungSubscribed = "subscribed" // and listens to something
	rungLag        = "lag"        // and reads what it is sent
	rungLimits     = "limits"     // and publishes no more than it may
	rungStorage    = "storage"    // and castrad can store it
)

// What a rung may be.
const (
	rungOK         = "ok"
	rungNote       = "note"   // no fault, and worth knowing
	rungBroken     = "broken" // the bus fails the VM here
	rungNotReached = "not-reached"
)

// limitedLately is for how long after its last refusal a VM counts as limited.
const limitedLately = time.Minute

// presenceSilent is castrad's reason for a VM of which nothing was heard for too long.
const presenceSilent = "silent"

// rung is one question about a VM, and its answer.
type rung struct {
	Rung  string `json:"rung"`
	State string `json:"state"`
	What  string `json:"what"`           // what was found
	Mend  string `json:"mend,omitempty"` // the command or the edit that mends it
}

// ladder is what the rungs are judged by.
type ladder struct {
	name          string
	daemon        string             // whose answer it is
	absence       dbusclient.Absence // "": the daemon answered
	first, second bus.Status         // two looks, a moment apart where the VM lags
	open          map[socketPort]bool
}

func (l *ladder) guest() bool {
	return l.daemon == dbusclient.GuestDaemon || l.first.Broker.Kind == kindGuest
}

// rungs judges all rungs. Those below a broken one of which nothing can be known are
// not reached.
func (l *ladder) rungs() []rung {
	vm := findVM(&l.first, l.name)
	if vm == nil {
		vm = &bus.VM{VM: l.name, Reason: "never-seen"}
	}
	var rungs []rung
	cut := false // a rung is broken without which those below do not exist
	judge := func(name string, must bool, fn func(vm *bus.VM) rung) {
		r := rung{State: rungNotReached}
		if !cut {
			r = fn(vm)
		}
		r.Rung = name
		cut = cut || must && r.State == rungBroken
		rungs = append(rungs, r)
	}
	judge(rungRegistered, true, l.registered)
	unregistered := cut
	cut = false // others may well connect
	judge(rungListener, true, l.listener)
	cut = cut || unregistered
	judge(rungConnected, true, l.connected)
	judge(rungHandshake, true, l.handshake)
	judge(rungSession, true, l.session)
	judge(rungHeartbeats, vm.Session == "", l.heartbeats) // without a session nothing listens or lags
	judge(rungSubscribed, false, l.subscribed)
	judge(rungLag, false, l.lag)
	judge(rungLimits, false, l.limits)
	if l.absence == "" {
		cut = false // castrad's own, whatever becomes of the VM
	}
	judge(rungStorage, false, l.storage)
	return rungs
}

func (l *ladder) registered(vm *bus.VM) rung {
	refused := refusalOf(&l.first, l.name)
	switch {
	case l.guest():
		return rung{State: rungNote, What: "the host alone knows; there: castractl explain " + l.name}
	case l.absence != "":
		return rung{State: rungNotReached, What: "castrad is not running, and it alone knows"}
	case vm.Registered && vm.Keyed:
		return rung{State: rungOK, What: "with a key"}
	case vm.Registered:
		return rung{State: rungOK, What: "without a key: the name is taken at its word"}
	case l.first.Broker.UnknownVMs != "reject":
		return rung{State: rungOK, What: `not registered, and let in by unknown_vms = "accept"`}
	}
	what, mend := "nobody has registered this name", "castractl vm add "+l.name
	if refused != nil {
		what += fmt.Sprintf("; a guest that bears it was turned away %s ago", spanMS(refused.AgeMS))
		mend = remedy(&l.first, refused)
	}
	return rung{State: rungBroken, What: what, Mend: mend + l.strangers("is it one of these, by another name?")}
}

func (l *ladder) listener(*bus.VM) rung {
	start, stopped := "systemctl start castrad.socket", "castrad is not running, and its socket does not listen"
	if l.guest() {
		start, stopped = "systemctl start "+l.daemon, l.daemon+" is not running"
	}
	switch l.absence {
	case dbusclient.Idle:
		return rung{State: rungOK, What: "castrad's socket; the first guest to connect starts castrad"}
	case dbusclient.Starting:
		return rung{State: rungBroken, What: l.daemon + " is starting", Mend: "ask again in a moment; see what it does: castractl logs -f"}
	case dbusclient.Failing:
		return rung{State: rungBroken, What: l.daemon + " has failed, and is started again", Mend: "see why: castractl logs -n 20"}
	case dbusclient.Failed:
		return rung{State: rungBroken, What: l.daemon + " has failed", Mend: "see why: castractl logs; then: " + start}
	case dbusclient.Stopped:
		return rung{State: rungBroken, What: stopped, Mend: start}
	}
	listen := l.first.Broker.Listen
	where := strings.Join(listen, ", ")
	switch {
	case l.guest():
		return rung{State: rungNote, What: "the host is looked for at " + where}
	case len(listen) == 0:
		return rung{State: rungBroken, What: "castrad listens nowhere", Mend: start}
	case !slices.ContainsFunc(listen, l.isOpen):
		return rung{State: rungBroken, What: "castrad says that it listens on " + where + ", and nothing does on this host", Mend: "is castrad in another network? See: castractl logs; else: systemctl restart castrad.socket castrad.service"}
	}
	return rung{State: rungOK, What: where}
}

// isOpen tells whether the host's sockets show a listener of the bus. One that is no
// TCP port cannot be seen there, and is believed.
func (l *ladder) isOpen(address string) bool {
	_, service, err := net.SplitHostPort(address)
	if err != nil {
		return true
	}
	port, err := strconv.ParseUint(service, 10, 16)
	return err != nil || l.open[socketPort{"tcp", uint16(port)}]
}

func (l *ladder) connected(vm *bus.VM) rung {
	refused := refusalOf(&l.first, l.name)
	up := spanMS(l.first.Broker.UptimeMS)
	switch {
	case l.absence == dbusclient.Idle:
		return rung{State: rungBroken, What: "nobody has connected since castrad's socket listens", Mend: l.begin("vm add --if-missing ")} // starts castrad, and so tells
	case vm.LastHandshakeAgeMS != nil:
		return rung{State: rungOK, What: fmt.Sprintf("%s ago", spanMS(*vm.LastHandshakeAgeMS))}
	case refused != nil:
		return rung{State: rungOK, What: fmt.Sprintf("%s ago, and was turned away", spanMS(refused.AgeMS))}
	case l.guest():
		return rung{State: rungBroken, What: "the host has not answered since castra-guestd started, " + up + " ago", Mend: "on the host: castractl status; is the address right? It is [broker] address in /etc/castra/guestd.toml"}
	}
	return rung{State: rungBroken, What: "not since castrad started, " + up + " ago", Mend: l.begin("vm args ") + l.strangers("does it bear one of these names?")}
}

// begin says how a guest comes to connect; the command is one that prints QEMU's
// arguments.
func (l *ladder) begin(command string) string {
	return "start the VM with what this prints: castractl " + command + l.name + "; in the guest: systemctl status castra-guestd"
}

// strangers lists the names that were turned away as nobody's, each only where it is
// a valid one: a guest must not write what an operator copies.
func (l *ladder) strangers(question string) string {
	const most = 3
	var names []string
	for i := range l.first.Refused {
		r := &l.first.Refused[i]
		if r.Reason == wire.ReasonUnknownVM && r.VM != l.name && checkName(r.VM) == nil && len(names) < most {
			names = append(names, r.VM)
		}
	}
	if len(names) == 0 {
		return ""
	}
	return "; " + question + " Turned away lately: " + strings.Join(names, ", ")
}

func (l *ladder) handshake(vm *bus.VM) rung {
	refused := refusalOf(&l.first, l.name)
	switch {
	case refused == nil && vm.Session == "" && !l.guest() && !vm.Keyed && slices.Contains(vm.Capabilities, wire.CapAuth):
		return rung{
			State: rungBroken, What: "let in, and gone: it has a key, castrad has none for it, and so cannot prove to it that it is the host",
			Mend: "make it a key that both have, and start it with that: castractl vm rekey " + l.name,
		}
	case refused == nil:
		return rung{State: rungOK, What: "not turned away"}
	case vm.Session != "":
		// Whoever was turned away is not who has the session.
		return rung{State: rungNote, What: fmt.Sprintf("another guest that bears this name was turned away %s ago: %s", spanMS(refused.AgeMS), refused.Reason)}
	}
	return rung{State: rungBroken, What: fmt.Sprintf("turned away %s ago: %s", spanMS(refused.AgeMS), refused.Reason), Mend: remedy(&l.first, refused)}
}

func (l *ladder) session(vm *bus.VM) rung {
	switch {
	case vm.Contended:
		return rung{
			State: rungBroken, What: fmt.Sprintf("two guests, as clones do, keep replacing each other under this name: %d times", vm.Superseded),
			Mend: "give one of them a name and a key of its own: castractl vm add NAME",
		}
	case vm.Session != "" && vm.RemoteAddr != "":
		return rung{State: rungOK, What: "from " + vm.RemoteAddr}
	case vm.Session != "":
		return rung{State: rungOK}
	case vm.Reason == presenceSilent && !l.guest():
		return rung{State: rungNote, What: "ended by castrad, since nothing was heard on it"} // which the next rung explains
	case len(vm.Capabilities) > 0 && !slices.ContainsFunc(vm.Capabilities, isBusCapability):
		return rung{State: rungBroken, What: "its guest is an old one, that says hello and no more: its messages reach nobody, and it hears none", Mend: "in the guest: install castra-guestd"}
	case l.guest():
		return rung{State: rungBroken, What: "the connection to the host is lost", Mend: "it is tried again by itself; on the host: castractl status; here: journalctl -u castra-guestd"}
	}
	return rung{State: rungBroken, What: "its connection has ended", Mend: "does the VM run? In the guest: systemctl start castra-guestd; how it ended: castractl logs " + l.name}
}

func isBusCapability(c string) bool { return strings.EqualFold(c, wire.CapBus) }

func (l *ladder) heartbeats(vm *bus.VM) rung {
	last := vm.LastHeartbeatAgeMS
	switch {
	case vm.Reachable && last == nil:
		return rung{State: rungOK, What: "none yet: the session is new"}
	case vm.Reachable:
		return rung{State: rungOK, What: "the last " + spanMS(*last) + " ago"}
	}
	what := "none has come"
	if last != nil {
		what = "they have stopped: the last came " + spanMS(*last) + " ago"
	}
	return rung{
		State: rungBroken, What: what,
		Mend: "is the VM paused or stuck, or its network cut? Look at its console; if it runs, in the guest: systemctl restart castra-guestd",
	}
}

func (l *ladder) subscribed(vm *bus.VM) rung {
	if vm.BusSubscribed {
		return rung{State: rungOK, What: strings.Join(vm.Subscriptions, " ")}
	}
	return rung{
		State: rungNote, What: "to nothing: what is sent to it waits in the record",
		Mend: `to listen, in the guest: castractl bus tail; for good: subscribe = ["vm:self"] under [bus] in /etc/castra/guestd.toml`,
	}
}

// lag compares two looks: what counts is not how much is left to read, but that it
// is read.
func (l *ladder) lag(vm *bus.VM) rung {
	now := findVM(&l.second, l.name)
	switch {
	case vm.Lag == 0 || now == nil || now.Lag == 0:
		return rung{State: rungOK, What: "reads everything"}
	case l.second.Broker.HeadSeq-now.Lag > l.first.Broker.HeadSeq-vm.Lag:
		return rung{State: rungNote, What: fmt.Sprintf("%d records behind, and reading", now.Lag)}
	}
	return rung{
		State: rungBroken, What: fmt.Sprintf("%d records behind, and not reading", now.Lag),
		Mend: "in the guest, what listens has stopped to read: " + strings.Join(vm.Subscriptions, " ") + "; else: systemctl restart castra-guestd",
	}
}

func (l *ladder) limits(vm *bus.VM) rung {
	if vm.RateLimited == 0 {
		return rung{State: rungOK, What: "nothing refused"}
	}
	what := fmt.Sprintf("%d publishes refused for their rate", vm.RateLimited)
	if vm.LastLimitedAgeMS != nil {
		what += ", the last " + spanMS(*vm.LastLimitedAgeMS) + " ago"
		if time.Duration(*vm.LastLimitedAgeMS)*time.Millisecond <= limitedLately {
			return rung{State: rungBroken, What: what, Mend: "publish less from it, or raise publish_rate, publish_burst and publish_bytes under [limits] in /etc/castra/castrad.toml; then: systemctl reload castrad"}
		}
	}
	return rung{State: rungOK, What: what}
}

func (l *ladder) storage(*bus.VM) rung {
	b := &l.first.Broker
	switch word, why, _ := strings.Cut(b.State, ": "); {
	case l.guest():
		return spool(b)
	case word == "degraded":
		mend := "is the disk full, or does it not answer? df " + b.LogDir + "; castractl logs"
		if len(b.Faults) > 0 {
			mend = b.Faults[0].Advice
		}
		return rung{State: rungBroken, What: "castrad is degraded: " + why, Mend: mend}
	}
	return rung{State: rungOK, What: "castrad stores what is published"}
}

// spool is the storage of a guest; the host's is the host's to judge.
func spool(b *bus.Broker) rung {
	durable := b.SpoolDurable != nil && *b.SpoolDurable
	switch {
	case durable && b.SpoolReason != "":
		return rung{
			State: rungBroken, What: "this guest's disk takes no messages while the host is away: " + b.SpoolReason,
			Mend: "is it full, or does it fail? See: castractl logs, and df of spool_dir, which /etc/castra/guestd.toml may set",
		}
	case b.SpoolCount > 0:
		return rung{State: rungNote, What: fmt.Sprintf("%d messages (%d bytes) wait in this guest for the host", b.SpoolCount, b.SpoolBytes)}
	case b.SpoolReason != "":
		return rung{State: rungNote, What: "while the host is away, messages are kept in this guest's memory alone: " + b.SpoolReason}
	}
	return rung{State: rungOK, What: "nothing waits in this guest for the host"}
}

// refusalOf finds what is known of a name that was turned away.
func refusalOf(st *bus.Status, name string) *bus.Refused {
	for i := range st.Refused {
		if st.Refused[i].VM == name {
			return &st.Refused[i]
		}
	}
	return nil
}
