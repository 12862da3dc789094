package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/dbusclient"
)

func newStatusCmd(f *Factory) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status [VM…]",
		Short: "Show the bus, its VMs and who was turned away",
		Long: `Show the state of the bus and of the VMs on it, all of them or the named ones.

Names that were turned away in the last hour are shown with the command that
lets them in. castrad is not started for this, and no guest is waited for.

Exit codes: 0 done, also when castrad is idle and its socket listens; with
names, 3 when one of them is not reachable and 4 when one is not known; 5 when
castrad is not to be had.`,
		Example: `  castractl status
  castractl status web1 && echo "web1 is there"
  castractl status --json | jq -r '.vms[] | select(.reachable | not) | .vm'`,
		Args:              vmArgs(0, 0),
		ValidArgsFunction: f.completeVMs,
		RunE: func(cmd *cobra.Command, names []string) error {
			return f.runStatus(cmd.Context(), names, asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (f *Factory) runStatus(ctx context.Context, names []string, asJSON bool) error {
	st, err := f.status(ctx, NoStart, names)
	idle := false
	if err != nil {
		if f.absence(ctx, err) != dbusclient.Idle {
			return f.absent(ctx, err)
		}
		// The first guest or the first publish starts castrad: nothing is wrong.
		st, idle = idleStatus(), true
	}
	switch {
	case asJSON:
		err = f.printJSON(st)
	case idle:
		text := "castrad is idle: its socket listens, and the first guest to connect starts it\n"
		if len(names) == 0 && !f.Quiet {
			text += "Register a VM: castractl vm add NAME\n"
		}
		_, err = io.WriteString(f.IO.Out, text)
	default:
		err = f.paged(func(w io.Writer) error { return f.writeStatus(w, &st, len(names) > 0) })
	}
	if err != nil && !isBrokenPipe(err) {
		return err
	}
	return judge(&st, names, idle)
}

// judge turns the state of the named VMs into the command's end.
func judge(st *bus.Status, names []string, idle bool) error {
	var unknown, away []string
	for _, name := range names {
		vm := findVM(st, name)
		switch {
		case idle:
			away = append(away, name)
		case vm == nil:
			unknown = append(unknown, name)
		case !vm.Reachable:
			away = append(away, name)
		}
	}
	switch {
	case len(unknown) > 0:
		return errNoSuchVM(unknown...)
	case len(away) > 0:
		return exitf(ExitUnreachable, "not reachable: %s; see why: castractl explain %s", strings.Join(away, ", "), away[0])
	}
	return nil
}

// absence tells why castrad did not answer; "" where err is of another kind.
func (f *Factory) absence(ctx context.Context, err error) dbusclient.Absence {
	if !errors.Is(err, dbusclient.ErrNotRunning) {
		return ""
	}
	client, cerr := f.Client(ctx, NoStart)
	if cerr != nil {
		return dbusclient.Stopped
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return client.Absence(ctx)
}

// absent says what the daemon's absence means for a command that needs its answer and
// may not start it. Other errors stay as they are.
func (f *Factory) absent(ctx context.Context, err error) error {
	d := f.daemon()
	switch f.absence(ctx, err) {
	case dbusclient.Idle:
		return exitf(ExitNoCastrad, "%s is idle, nobody has connected to its socket yet; start it: systemctl start %s", d, d)
	case dbusclient.Starting:
		return exitf(ExitNoCastrad, "%s is starting; try again in a moment, or see what it does: castractl logs -f", d)
	case dbusclient.Failing:
		return exitf(ExitNoCastrad, "%s has failed, and is started again; see why: castractl logs -n 20", d)
	case dbusclient.Failed:
		return exitf(ExitNoCastrad, "%s has failed; see why: castractl logs, and start it again: systemctl start %s", d, d)
	}
	return err
}

// idleStatus is what is true of a bus whose daemon has not been needed yet.
func idleStatus() bus.Status {
	return bus.Status{
		Broker:  bus.Broker{Kind: "host", State: "idle", Listen: []string{}, Faults: []bus.Fault{}, Limited: map[string]uint64{}},
		VMs:     []bus.VM{},
		Refused: []bus.Refused{},
	}
}

// writeStatus prints the state for people; some of it only when all VMs were
// asked for.
func (f *Factory) writeStatus(w io.Writer, st *bus.Status, named bool) error {
	if !named {
		if err := f.writeBroker(w, &st.Broker); err != nil {
			return err
		}
	}
	if len(st.VMs) > 0 {
		if err := f.writeVMs(w, st.VMs); err != nil {
			return err
		}
	} else if !named && st.Broker.Kind != kindGuest {
		none := "No VM is known yet; register one: castractl vm add NAME"
		if len(st.Refused) > 0 {
			none = "No VM is known yet."
		}
		if _, err := fmt.Fprintln(w, none); err != nil {
			return err
		}
	}
	if named {
		return nil
	}
	return f.writeRefused(w, st)
}

const kindGuest = "guest"

func (f *Factory) writeBroker(w io.Writer, b *bus.Broker) error {
	name := "castrad"
	if b.Kind == kindGuest {
		name = "castra-guestd"
	}
	up := spanMS(b.UptimeMS)
	var lines strings.Builder
	fmt.Fprintf(&lines, "%s %s: %s, up %s\n", name, escape(b.Version), f.IO.paint(stateStyle(b.State), escape(b.State)), up)
	if b.Kind == kindGuest {
		if b.ConnectedTo != "" {
			fmt.Fprintf(&lines, "connected to %s\n", escape(b.ConnectedTo))
		} else {
			fmt.Fprintf(&lines, "not connected; the host is looked for at %s\n", escape(strings.Join(b.Listen, ", ")))
		}
		lines.WriteString(f.spoolLine(b))
	} else {
		fmt.Fprintf(&lines, "VMs reachable: %d, registered: %d, sessions: %d, newest record: %d\n", b.Reachable, b.Registered, b.Sessions, b.HeadSeq)
		if len(b.Limited) > 0 {
			fmt.Fprintf(&lines, "%s %s\n", f.IO.paint(yellow, "limits reached:"), escape(reached(b.Limited)))
		}
		fmt.Fprintf(&lines, "listening on %s, records in %s\n", escape(strings.Join(b.Listen, ", ")), escape(b.LogDir))
	}
	for _, fault := range b.Faults {
		f.writeFault(&lines, &fault)
	}
	lines.WriteByte('\n')
	_, err := io.WriteString(w, lines.String())
	return err
}

// writeFault says what is wrong, what that means, and what to do next.
func (f *Factory) writeFault(lines *strings.Builder, fault *bus.Fault) {
	since := spanMS(fault.AgeMS)
	fmt.Fprintf(lines, "%s: %s, since %s\n", f.IO.paint(bold, escape(fault.Part)), f.IO.paint(red, escape(fault.Cause)), since)
	fmt.Fprintf(lines, "      error:  %s\n", escape(fault.Detail))
	fmt.Fprintf(lines, "      effect: %s\n", escape(fault.Effect))
	if !f.Quiet {
		fmt.Fprintf(lines, "      mend:   %s\n", escape(fault.Advice))
	}
}

// spoolLine says what a guest keeps for the host, and whether it would survive the
// guest.
func (f *Factory) spoolLine(b *bus.Broker) string {
	text := fmt.Sprintf("spool: %d messages (%d bytes) kept until the host has them, ", b.SpoolCount, b.SpoolBytes)
	if b.SpoolCount == 0 {
		text = "spool: empty, "
	}
	durable := b.SpoolDurable != nil && *b.SpoolDurable
	switch {
	case durable && b.SpoolReason == "":
		return text + "on disk\n"
	case durable:
		return text + "on disk, which takes no more: " + f.IO.paint(red, escape(b.SpoolReason)) + "\n"
	case b.SpoolReason != "":
		return text + f.IO.paint(yellow, "not durable") + ", " + escape(b.SpoolReason) + "\n"
	default:
		return text + f.IO.paint(yellow, "not durable") + "\n"
	}
}

// stateStyle marks a daemon's state by its first word: what follows is a reason.
func stateStyle(state string) style {
	switch word, _, _ := strings.Cut(state, ":"); word {
	case "running":
		return green
	case "degraded", "refused":
		return red
	}
	return yellow
}

// reached lists how often each limit was reached, in the order of their names.
func reached(limited map[string]uint64) string {
	var all []string
	for _, name := range slices.Sorted(maps.Keys(limited)) {
		all = append(all, fmt.Sprintf("%s %d times", name, limited[name]))
	}
	return strings.Join(all, ", ")
}

func (f *Factory) writeVMs(w io.Writer, vms []bus.VM) error {
	t := table{columns: []column{
		{title: "VM", yield: cutMiddle},
		{title: "STATE"},
		{title: "HANDSHAKE", right: true},
		{title: "PUBLISH", right: true},
		{title: "HEARTBEAT", right: true},
		{title: "SUBSCRIPTIONS", yield: cutEnd},
	}}
	for _, vm := range vms {
		t.add(
			cell{vm.VM, plain},
			cell{vm.State, vmStyle(&vm)},
			cell{age(vm.LastHandshakeAgeMS), plain},
			cell{age(vm.LastPublishAgeMS), plain},
			cell{age(vm.LastHeartbeatAgeMS), plain},
			cell{strings.Join(vm.Subscriptions, " "), plain},
		)
	}
	if err := t.write(w, &f.IO, !f.NoLegend); err != nil {
		return err
	}
	var lines strings.Builder
	if !f.NoLegend {
		fmt.Fprintln(&lines, f.IO.paint(faint, "HANDSHAKE, PUBLISH, HEARTBEAT: time since the last one, - if there was none."))
	}
	f.addContended(&lines, vms)
	_, err := io.WriteString(w, lines.String())
	return err
}

// addContended names the VMs that are more than one guest.
func (f *Factory) addContended(lines *strings.Builder, vms []bus.VM) {
	first := !f.NoLegend
	for _, vm := range vms {
		if !vm.Contended {
			continue
		}
		if first {
			lines.WriteString("\nTwo guests, as clones do, keep replacing each other as\n")
			first = false
		}
		fmt.Fprintf(lines, "  %s  %d times\n", f.IO.paint(bold, escape(vm.VM)), vm.Superseded)
		if !f.Quiet {
			lines.WriteString("      give one of them a name and a key of its own: castractl vm add NAME\n")
		}
	}
}

func vmStyle(vm *bus.VM) style {
	if vm.Reachable {
		return green
	}
	return red
}

// writeRefused lists who was turned away, and below each what lets it in.
func (f *Factory) writeRefused(w io.Writer, st *bus.Status) error {
	if len(st.Refused) == 0 {
		return nil
	}
	var lines strings.Builder
	if !f.NoLegend {
		lines.WriteString("\nTurned away in the last hour:\n")
	}
	for _, r := range st.Refused {
		fmt.Fprintf(&lines, "  %s  %s, %s ago\n", f.IO.paint(bold, escape(r.VM)), f.IO.paint(yellow, escape(r.Reason)), spanMS(r.AgeMS))
		if !f.Quiet {
			for _, way := range remedies(st, &r) {
				fmt.Fprintf(&lines, "      %s\n", way)
			}
		}
	}
	_, err := io.WriteString(w, lines.String())
	return err
}
