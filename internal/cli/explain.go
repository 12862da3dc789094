package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/castrabus/castra/internal/dbusclient"
)

// secondLook is how long after the first look a VM that lags is looked at again: by
// then one that reads has moved.
const secondLook = time.Second

// explanation is what `explain --json` prints; its keys are never renamed.
type explanation struct {
	VM     string `json:"vm"`
	Broken string `json:"broken"` // the first broken rung; "": none is
	Rungs  []rung `json:"rungs"`  // all of them, from the top
}

func newExplainCmd(f *Factory) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "explain VM",
		Short: "Say why the bus does not see a VM, and what mends it",
		Long: `Go down the ladder on whose rungs a VM stands: registered, listener, connected,
handshake, session, heartbeats, subscribed, lag, limits, storage. Each is ok, a
note, broken or not reached; the first that is broken is named, with the
command or the edit that mends it. castrad is not started for this.

Exit codes: 0 when no rung is broken, 3 when one is; 4 when the VM is not
registered and would be turned away, 5 when castrad is not to be had.`,
		Example: `  castractl explain web1
  castractl explain web1 --json | jq -r .broken`,
		Args:              vmArgs(1, 1),
		ValidArgsFunction: f.completeVM,
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.runExplain(cmd.Context(), args[0], asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (f *Factory) runExplain(ctx context.Context, name string, asJSON bool) error {
	l, err := f.look(ctx, name)
	if err != nil {
		return err
	}
	e := explanation{VM: name, Rungs: l.rungs()}
	broken := firstBroken(e.Rungs)
	if broken != nil {
		e.Broken = broken.Rung
	}
	if asJSON {
		err = f.printJSON(e)
	} else {
		err = f.paged(func(w io.Writer) error { return f.writeRungs(w, e.Rungs) })
	}
	if err != nil && !isBrokenPipe(err) {
		return err
	}
	if broken == nil {
		return nil
	}
	return exitf(l.exitCode(broken), "%s: %s: %s; %s", name, broken.Rung, broken.What, broken.Mend)
}

// look gathers what the rungs are judged by.
func (f *Factory) look(ctx context.Context, name string) (*ladder, error) {
	l := &ladder{name: name, daemon: f.daemon()}
	var err error
	if l.first, err = f.status(ctx, NoStart, []string{name}); err != nil {
		if l.absence = f.absence(ctx, err); l.absence == "" {
			return nil, err
		}
		return l, nil
	}
	l.second = l.first
	vm := findVM(&l.first, name)
	if l.guest() && vm == nil {
		return nil, exitf(ExitNoSuchVM, "this guest is not %s, and knows no other; ask castrad, on the host", name)
	}
	if !l.guest() {
		// castrad's network may be private to it: the host's sockets are looked at here.
		if l.open, err = openPorts(f.Proc); err != nil {
			return nil, err
		}
	}
	if vm == nil || vm.Lag == 0 {
		return l, nil
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(secondLook):
	}
	if l.second, err = f.status(ctx, NoStart, []string{name}); errors.Is(err, dbusclient.ErrNotRunning) {
		err = f.absent(ctx, err) // it ended between the two
	}
	return l, err
}

// exitCode is the code that a broken rung ends the command with.
func (l *ladder) exitCode(broken *rung) int {
	switch {
	case l.absence != "" && l.absence != dbusclient.Idle:
		return ExitNoCastrad
	case broken.Rung == rungRegistered:
		return ExitNoSuchVM
	}
	return ExitUnreachable
}

func firstBroken(rungs []rung) *rung {
	for i := range rungs {
		if rungs[i].State == rungBroken {
			return &rungs[i]
		}
	}
	return nil
}

// writeRungs prints a line a rung, and below one that is to be mended how.
func (f *Factory) writeRungs(w io.Writer, rungs []rung) error {
	const name, state, indent = 10, 11, 4 // columns: the longest rung and the longest state
	named := false
	var b strings.Builder
	for i := range rungs {
		r := &rungs[i]
		b.WriteString(f.IO.paint(bold, fmt.Sprintf("%-*s", name, r.Rung)))
		b.WriteString("  " + f.IO.paint(rungStyle(r.State), fmt.Sprintf("%-*s", state, r.State)) + "  ")
		what := r.What
		if what == "" {
			what = "-"
		}
		writeWrapped(&b, escape(what), name+state+indent, f.IO.Width)
		if r.Mend == "" || f.Quiet {
			continue
		}
		head := ""
		switch {
		case r.State == rungBroken && !named:
			head, named = "mend this first: ", true
		case r.State == rungBroken:
			head = "then this: "
		}
		b.WriteString(strings.Repeat(" ", name+state+indent))
		writeWrapped(&b, head+escape(r.Mend), name+state+indent, f.IO.Width)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func rungStyle(state string) style {
	switch state {
	case rungOK:
		return green
	case rungBroken:
		return red
	case rungNote:
		return yellow
	}
	return faint
}

// writeWrapped writes text whose first line begins at column indent, broken between
// words so that it fits width, where there is one.
func writeWrapped(b *strings.Builder, text string, indent, width int) {
	column := indent
	for i, word := range strings.Fields(text) {
		length := len([]rune(word))
		switch {
		case i == 0:
		case width > 0 && column+1+length > max(width, indent+leastWidth):
			b.WriteString("\n" + strings.Repeat(" ", indent))
			column = indent
		default:
			b.WriteByte(' ')
			column++
		}
		b.WriteString(word)
		column += length
	}
	b.WriteByte('\n')
}
