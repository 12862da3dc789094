package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/dbusclient"
)

// reread is the safety net of a wait: signals are what wakes it, and should one
// be lost, or castrad restart, the state is read again after this long.
const reread = 2 * time.Second

// lastLook is how long the look at the deadline may take.
const lastLook = 5 * time.Second

// anyVM stands for the names that --all would wait for, where there are none.
const anyVM = "any VM"

type waitOptions struct {
	all     bool
	state   string
	timeout spanFlag
}

func newWaitCmd(f *Factory) *cobra.Command {
	o := waitOptions{timeout: spanFlag(30 * time.Second)}
	cmd := &cobra.Command{
		Use:   "wait (VM… | --all)",
		Short: "Wait until VMs are reachable",
		Long: `Wait until all the named VMs, or all that are known, are reachable, have a
subscription, or are unreachable. Names that have not been seen yet are waited
for. There is one deadline for all of them.

Exit codes: 0 when all are so, 3 when the deadline passes first, 5 when castrad
is not to be had.`,
		Example: `  castractl wait web1 web2 --for subscribed --timeout 2min
  castractl wait --all`,
		Args:              vmArgs(0, 0),
		ValidArgsFunction: f.completeVMs,
		RunE: func(cmd *cobra.Command, names []string) error {
			switch {
			case o.all && len(names) > 0:
				return usageError(cmd, "--all and names exclude each other")
			case !o.all && len(names) == 0:
				return usageError(cmd, "which VM? Give names or --all")
			case !o.known():
				return usageError(cmd, "--for takes reachable, subscribed or unreachable, not %q", o.state)
			}
			return f.runWait(cmd.Context(), &o, names)
		},
	}
	flags := cmd.Flags()
	flags.BoolVar(&o.all, "all", false, "wait for every VM that is known")
	flags.StringVar(&o.state, "for", "reachable", "`STATE` to wait for: reachable, subscribed or unreachable")
	flags.Var(&o.timeout, "timeout", "give up after this long; 0 looks once")
	_ = cmd.RegisterFlagCompletionFunc("for", cobra.FixedCompletions([]string{"reachable", "subscribed", "unreachable"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func (o *waitOptions) known() bool {
	return o.state == "reachable" || o.state == "subscribed" || o.state == "unreachable"
}

// met tells whether one VM is in the state waited for; nil is a VM not seen yet.
func (o *waitOptions) met(vm *bus.VM) bool {
	switch o.state {
	case "unreachable":
		return vm == nil || !vm.Reachable
	case "subscribed":
		return vm != nil && vm.Reachable && vm.BusSubscribed
	}
	return vm != nil && vm.Reachable
}

// missing gives the names that are not in the state waited for.
func (o *waitOptions) missing(st *bus.Status, names []string) []string {
	known := make(map[string]*bus.VM, len(st.VMs))
	for i := range st.VMs {
		vm := &st.VMs[i]
		known[vm.VM] = vm
		if o.all {
			names = append(names, vm.VM)
		}
	}
	var missing []string
	for _, name := range names {
		if !o.met(known[name]) {
			missing = append(missing, name)
		}
	}
	if o.all && len(names) == 0 && o.state != "unreachable" {
		// "All are there" is not true of a bus that nobody has come to yet.
		missing = append(missing, anyVM)
	}
	return missing
}

// hint is the command that tells why a VM is not as it was waited for.
func (o *waitOptions) hint(missing string) string {
	if missing == anyVM {
		return "castractl status"
	}
	return "castractl explain " + missing
}

func (f *Factory) runWait(ctx context.Context, o *waitOptions, names []string) error {
	timeout := time.Duration(o.timeout)
	over := time.NewTimer(timeout)
	defer over.Stop()
	// Everything ends with the deadline, castrad's start and an answer that does
	// not come too; what is added lets the last look, at the deadline, have its answer.
	ctx, cancel := context.WithTimeout(ctx, min(timeout, forever-lastLook)+lastLook)
	defer cancel()
	var changed <-chan struct{} // nil: nothing to wake up for
	if timeout > 0 {
		client, err := f.Client(ctx, MayStart)
		if err != nil {
			return err
		}
		// Before the first look: what changes between the two is then not missed.
		if changed, err = client.WatchVMs(ctx); err != nil {
			return fmt.Errorf("watching VMs: %w", err)
		}
	}
	return f.waitUntil(ctx, o, names, changed, over.C)
}

func (f *Factory) waitUntil(ctx context.Context, o *waitOptions, names []string, changed <-chan struct{}, timeout <-chan time.Time) error {
	again := time.NewTicker(reread)
	defer again.Stop()
	start := MayStart
	for over := o.timeout == 0; ; {
		st, err := f.status(ctx, start, names)
		if err != nil && (start == MayStart || over || !goneAway(err)) {
			return err
		}
		if errors.Is(err, dbusclient.ErrNoBus) {
			f.Close() // dial again; the signals are lost with it, and looking again is what is left
		}
		// It has answered. Should it go away from here on, whoever stopped it meant it.
		start = NoStart
		if err == nil {
			missing := o.missing(&st, names)
			if len(missing) == 0 {
				return nil
			}
			if over {
				return exitf(ExitUnreachable, "not %s within %v: %s; see why: %s", o.state, time.Duration(o.timeout), strings.Join(missing, ", "), o.hint(missing[0]))
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timeout:
			over = true
		case <-again.C:
		case <-changed:
		}
	}
}
