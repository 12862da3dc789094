package cli

import (
	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

// remedy says how to let in a name that was turned away, and where to do so. The
// name is repeated in a command only where it is a valid one: a guest must not write
// commands for an operator to copy.
func remedy(st *bus.Status, r *bus.Refused) string {
	on := ""
	if st.Broker.Kind == kindGuest {
		on = "on the host, "
	}
	switch {
	case r.Reason == wire.ReasonInvalidName, r.Reason == wire.ReasonReservedIdentity, checkName(r.VM) != nil:
		return `give the guest a valid name: castra.vm, or "vm" in /etc/castra/guestd.toml`
	case r.Reason == wire.ReasonUnknownVM, r.Reason == wire.ReasonTooManyVMs: // registered ones are not counted
		return on + "let it in: castractl vm add " + r.VM
	case r.Reason == wire.ReasonAuthRequired, r.Reason == wire.ReasonAuthFailed:
		return on + "hand over its key, or a new one: castractl vm rekey " + r.VM
	case r.Reason == wire.ReasonForbidden:
		return "it asked for host rights: take host-bus out of what it says hello with"
	case r.Reason == wire.ReasonMissingCapability:
		return "it speaks no " + wire.CapBus + ": install castra-guestd in it"
	case r.Reason == wire.ReasonTooManySessions:
		return on + "raise limits.max_sessions in castrad's configuration, then: systemctl reload castrad"
	case r.Reason == wire.ReasonRateLimited:
		return "it connects too often, or shares its name with another guest, see: castractl logs " + r.VM
	case r.Reason == wire.ReasonStorageError, r.Reason == wire.ReasonIOError:
		return "castrad could not go on with it, see why: castractl logs " + r.VM
	}
	return "what it said was no proper handshake, see what happened: castractl logs " + r.VM
}
