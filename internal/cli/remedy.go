package cli

import (
	"strings"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

// reasonUnproven is a guest's own: the host did not show that it has the guest's key.
const reasonUnproven = "host-unproven"

// remedy is remedies in one line.
func remedy(st *bus.Status, r *bus.Refused) string { return strings.Join(remedies(st, r), "; ") }

// remedies say how to let in a name that was turned away, and where to do so; any one
// of them does. The name is repeated in a command only where it is a valid one: a
// guest must not write commands for an operator to copy.
func remedies(st *bus.Status, r *bus.Refused) []string {
	on := ""
	if st.Broker.Kind == kindGuest {
		on = "on the host, "
	}
	switch {
	case r.Reason == wire.ReasonInvalidName, r.Reason == wire.ReasonReservedIdentity, checkName(r.VM) != nil:
		return []string{`give the guest a valid name: castra.vm, or "vm" in /etc/castra/guestd.toml`}
	case r.HasKey && notRegistered(r.Reason):
		// It would take no host's word that does not know this key.
		return []string{on + "make it a new key, and start it with that: castractl vm add " + r.VM}
	case notRegistered(r.Reason):
		return []string{
			on + "let it in as it is: castractl vm add " + r.VM + " --no-key",
			"or make it a key, and start it with that: castractl vm add " + r.VM,
		}
	case r.Reason == wire.ReasonAuthRequired, r.Reason == wire.ReasonAuthFailed:
		return []string{
			on + "start it with its key, as this says: castractl vm args " + r.VM,
			"or make it a new one: castractl vm rekey " + r.VM,
		}
	case r.Reason == reasonUnproven:
		return []string{on + "make it a key that both have, and start it with that: castractl vm rekey " + r.VM}
	case r.Reason == wire.ReasonForbidden:
		return []string{"it asked for host rights: take host-bus out of what it says hello with"}
	case r.Reason == wire.ReasonMissingCapability:
		return []string{"it speaks no " + wire.CapBus + ": install castra-guestd in it"}
	case r.Reason == wire.ReasonTooManySessions:
		return []string{on + "raise limits.max_sessions in castrad's configuration, then: systemctl reload castrad"}
	case r.Reason == wire.ReasonRateLimited:
		return []string{"it connects too often, or shares its name with another guest, see: castractl logs " + r.VM}
	case r.Reason == wire.ReasonStorageError, r.Reason == wire.ReasonIOError:
		return []string{"castrad could not go on with it, see why: castractl logs " + r.VM}
	}
	return []string{"what it said was no proper handshake, see what happened: castractl logs " + r.VM}
}

// notRegistered tells whether a name would have been let in had it been registered:
// limits.max_vms is of those that are not.
func notRegistered(reason string) bool {
	return reason == wire.ReasonUnknownVM || reason == wire.ReasonTooManyVMs
}
