package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/castrabus/castra/internal/bus"
)

func newVMCmd(f *Factory) *cobra.Command {
	return newGroup("vm", "Register VMs and hand over their keys",
		`A VM is let in when its name is registered, and with a key it must prove the
name. Name and key reach the guest through QEMU's arguments.`,
		newVMAddCmd(f), newVMRemoveCmd(f), newVMListCmd(f), newVMShowCmd(f), newVMRekeyCmd(f), newVMArgsCmd(f))
}

func newVMRemoveCmd(f *Factory) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:        "remove NAME",
		SuggestFor: []string{"rm", "del", "delete"},
		Short:      "Take a VM's registration and key away",
		Long: `Take a VM's registration and key away. Its session ends at once, and it is
turned away when it comes back; its records stay until they expire.

Exit codes: 0 done, 4 no such VM, 5 castrad is not to be had.`,
		Example:           `  castractl vm remove web1`,
		Args:              vmArgs(1, 1),
		ValidArgsFunction: f.completeVM,
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := f.Client(cmd.Context(), MayStart)
			if err != nil {
				return err
			}
			ctx, cancel := f.call(cmd.Context())
			defer cancel()
			if err := client.RemoveVM(ctx, args[0]); err != nil {
				return fmt.Errorf("removing %s: %w", args[0], err)
			}
			if asJSON {
				return f.printVMs(cmd.Context(), args)
			}
			f.note("%s is removed; its records stay until they expire", args[0])
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newVMListCmd(f *Factory) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:        "list",
		SuggestFor: []string{"ls"},
		Short:      "List the VMs that castrad knows",
		Long: `List the VMs that are registered, and those that were let in unregistered.
castrad is not started for this.

Exit codes: 0 done, 5 castrad is not to be had.`,
		Example: `  castractl vm list
  castractl vm list --no-legend | awk '{print $1}'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := f.lookUp(cmd.Context(), nil)
			if err != nil {
				return err
			}
			if asJSON {
				return f.printJSON(st)
			}
			return f.paged(func(w io.Writer) error { return f.writeVMList(w, st.VMs) })
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (f *Factory) writeVMList(w io.Writer, vms []bus.VM) error {
	t := table{columns: []column{
		{title: "VM", yield: cutMiddle},
		{title: "REGISTERED"},
		{title: "KEY"},
		{title: "STATE"},
		{title: "FORWARDS", yield: cutEnd},
	}}
	for _, vm := range vms {
		t.add(
			cell{vm.VM, plain},
			cell{yesNo(vm.Registered), plain},
			cell{yesNo(vm.Keyed), plain},
			cell{vm.State, vmStyle(&vm)},
			cell{strings.Join(vm.Forwards, " "), plain},
		)
	}
	return t.write(w, &f.IO, !f.NoLegend)
}

func yesNo(yes bool) string {
	if yes {
		return "yes"
	}
	return "no"
}

func newVMShowCmd(f *Factory) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "show NAME",
		Short: "Show all that castrad knows about a VM",
		Long: `Show all that castrad knows about a VM, a line each. castrad is not started for
this.

Exit codes: 0 done, 4 no such VM, 5 castrad is not to be had.`,
		Example: `  castractl vm show web1
  castractl vm show web1 --json | jq .vms[0].lag`,
		Args:              vmArgs(1, 1),
		ValidArgsFunction: f.completeVM,
		RunE: func(cmd *cobra.Command, args []string) error {
			st, err := f.lookUp(cmd.Context(), args)
			if err != nil {
				return err
			}
			if asJSON {
				return f.printJSON(st)
			}
			return f.paged(func(w io.Writer) error { return writeVM(w, findVM(&st, args[0])) })
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// writeVM prints a VM as `systemctl show` does: a property a line.
func writeVM(w io.Writer, vm *bus.VM) error {
	state := vm.State
	if vm.Reason != "" {
		state += " (" + vm.Reason + ")"
	}
	ago := func(ms *int64) string {
		if ms == nil {
			return "never"
		}
		return age(ms) + " ago"
	}
	number := func(n uint64) string { return strconv.FormatUint(n, 10) }
	limited := number(vm.RateLimited)
	if vm.LastLimitedAgeMS != nil {
		limited += ", the last " + age(vm.LastLimitedAgeMS) + " ago"
	}
	var b strings.Builder
	for _, row := range [][2]string{
		{"VM", vm.VM},
		{"State", state},
		{"Registered", yesNo(vm.Registered)},
		{"Key", yesNo(vm.Keyed)},
		{"Last handshake", ago(vm.LastHandshakeAgeMS)},
		{"Last publish", ago(vm.LastPublishAgeMS)},
		{"Last heartbeat", ago(vm.LastHeartbeatAgeMS)},
		{"Session", vm.Session},
		{"Remote address", vm.RemoteAddr},
		{"Capabilities", strings.Join(vm.Capabilities, " ")},
		{"Subscriptions", strings.Join(vm.Subscriptions, " ")},
		{"Lag", number(vm.Lag)},
		{"Published", number(vm.Published)},
		{"Rate limited", limited},
		{"Superseded", superseded(vm)},
		{"Forwards", strings.Join(vm.Forwards, " ")},
	} {
		value := escape(row[1])
		if value == "" {
			value = "-"
		}
		fmt.Fprintf(&b, "%14s: %s\n", row[0], value)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func superseded(vm *bus.VM) string {
	text := strconv.FormatUint(vm.Superseded, 10)
	if vm.Contended {
		text += " (two guests have this identity and keep replacing each other)"
	}
	return text
}

// lookUp asks for the state of VMs without starting castrad; a name that is not
// known is an error.
func (f *Factory) lookUp(ctx context.Context, names []string) (bus.Status, error) {
	st, err := f.status(ctx, NoStart, names)
	if err != nil {
		return st, f.absent(ctx, err)
	}
	for _, name := range names {
		if findVM(&st, name) == nil {
			return st, errNoSuchVM(name)
		}
	}
	return st, nil
}

// findVM gives the VM of that name, nil when it is not known.
func findVM(st *bus.Status, name string) *bus.VM {
	i := slices.IndexFunc(st.VMs, func(vm bus.VM) bool { return vm.VM == name })
	if i < 0 {
		return nil
	}
	return &st.VMs[i]
}
