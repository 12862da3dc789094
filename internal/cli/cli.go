// Package cli is castractl: one constructor a command, each taking a Factory
// that holds the terminal's streams and reaches the bus when first asked to.
// The package knows the bus through Client alone.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/castrabus/castra/internal/wire"
)

// Main runs castractl with args, the program's name left out, on the process's
// own streams, and returns its exit code. version may be empty.
func Main(args []string, version string) int {
	// A broken pipe is to come back from write as EPIPE, since the contract wants
	// a tail whose reader has gone to end with 0; the runtime would otherwise die
	// of SIGPIPE. Notify, not Ignore: an ignored signal would be inherited by the
	// pager and by journalctl. One slot, never read: there is nothing to tell.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	return Run(context.Background(), NewFactory(version), args)
}

// Run runs castractl with args on the streams and the bus that f gives, prints
// the error if there is one, and returns the exit code.
func Run(ctx context.Context, f *Factory, args []string) int {
	root := newRootCmd(f)
	root.SetArgs(args)
	root.SetIn(f.IO.In)
	help := &sticky{Writer: f.IO.Out} // cobra does not look whether its help arrives
	root.SetOut(help)
	root.SetErr(f.IO.Err)
	parsed := false
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		parsed = true
		return noneEmpty(cmd)
	}
	cmd, err := root.ExecuteContextC(ctx)
	f.Close()
	if err == nil {
		err = help.err
	}
	if err != nil && !parsed && help.err == nil {
		// Cobra turned it down before any command ran: a word it does not know, too
		// many of them, or a flag's value that does not parse.
		err = usageError(cmd, "%w", err)
	}
	return f.report(err)
}

// sticky keeps the first error of a writer.
type sticky struct {
	io.Writer
	err error
}

func (s *sticky) Write(p []byte) (int, error) {
	n, err := s.Writer.Write(p)
	if s.err == nil {
		s.err = err
	}
	return n, err
}

func newRootCmd(f *Factory) *cobra.Command {
	root := &cobra.Command{
		Use:   "castractl",
		Short: "Ask and steer the Castra bus",
		Long: `castractl shows which virtual machines are on the bus, publishes messages,
follows the record of all of them, and registers new machines. In a guest the
same commands serve, through castra-guestd.

Commands that only look (status, explain, ports, logs, vm list, vm show, vm
args, bus tail --no-follow) never start castrad and never wait for a guest.

Exit codes: 0 done, 1 failed, 2 usage, 3 not reachable or not answered in time,
4 no such VM, 5 castrad is not to be had. Errors are one line on standard
error.`,
		Version:           f.Version,
		Args:              unknownCommand,
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},

		DisableFlagsInUseLine: true,
		RunE:                  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetUsageTemplate(strings.ReplaceAll(root.UsageTemplate(), ".FlagUsages ", ".FlagUsagesWrapped 80 "))
	root.SetVersionTemplate("castractl {{.Version}}\n")
	flags := root.PersistentFlags()
	flags.BoolVar(&f.NoPager, "no-pager", false, "never start a pager")
	flags.BoolVar(&f.NoLegend, "no-legend", false, "leave out table headings and the lines that explain them")
	flags.BoolVarP(&f.Quiet, "quiet", "q", false, "leave out notes and hints")
	root.AddCommand(
		newStatusCmd(f),
		newExplainCmd(f),
		newWaitCmd(f),
		newBusCmd(f),
		newVMCmd(f),
		newPortsCmd(f),
		newLogsCmd(f),
		newVersionCmd(f),
		newCompletionCmd(f),
	)
	root.InitDefaultHelpCmd()
	help, _, _ := root.Find([]string{"help"}) // just made
	help.Args = func(_ *cobra.Command, args []string) error {
		cmd, rest, err := root.Find(args)
		if err != nil || len(rest) == 0 {
			return err
		}
		return unknownCommand(cmd, rest)
	}
	return root
}

// newGroup is a command that only holds others.
func newGroup(use, short, long string, subs ...*cobra.Command) *cobra.Command {
	names := make([]string, len(subs))
	for i, sub := range subs {
		names[i] = sub.Name()
	}
	cmd := &cobra.Command{
		Use:   use,
		Short: short,
		Long:  long,
		Args:  unknownCommand,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usageError(cmd, "%s needs one of: %s", cmd.CommandPath(), strings.Join(names, ", "))
		},
		DisableFlagsInUseLine: true,
	}
	cmd.AddCommand(subs...)
	return cmd
}

// unknownCommand is the argument check of a command that only holds others: a
// word that reaches it is a command that does not exist. Cobra's own check lets
// such a word through below the root.
func unknownCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	// Letters; cobra sets it only where it prints suggestions itself. Of a word as short
	// as "ls" two are nearly all.
	cmd.SuggestionsMinimumDistance = min(2, len(args[0])-2)
	near := cmd.SuggestionsFor(args[0])
	if path := elsewhere(cmd.Root(), args[0]); path != "" {
		near = []string{path}
	}
	if len(near) > 0 {
		return fmt.Errorf("unknown command %q; did you mean %q?", args[0], near[0])
	}
	return fmt.Errorf("unknown command %q", args[0])
}

// elsewhere finds a command of that very name under another one: "castractl tail" is
// meant as "castractl bus tail".
func elsewhere(cmd *cobra.Command, name string) (path string) {
	for _, sub := range cmd.Commands() {
		if sub.Name() == name {
			return sub.CommandPath()
		}
		if path = elsewhere(sub, name); path != "" {
			return path
		}
	}
	return ""
}

// vmArgs is the argument check of a command that takes between least and most VM
// names; most 0 means any number.
func vmArgs(least, most int) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		switch {
		case len(args) < least:
			return errors.New("which VM? Its name is missing")
		case most > 0 && len(args) > most:
			return fmt.Errorf("one word too many: %q", args[most])
		}
		for _, name := range args {
			if err := checkName(name); err != nil {
				return err
			}
		}
		return nil
	}
}

// noArgs is the argument check of a command that takes none.
func noArgs(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("one word too many: %q", args[0])
	}
	return nil
}

// noneEmpty turns down a flag that was given nothing. Taken for one that was not
// given, --vm "$VM" of a script where VM is not set would reach every guest.
func noneEmpty(cmd *cobra.Command) (err error) {
	cmd.Flags().Visit(func(flag *pflag.Flag) {
		if err == nil && flag.Value.Type() == "string" && flag.Value.String() == "" {
			err = usageError(cmd, "--%s is given, but empty", flag.Name)
		}
	})
	return err
}

// checkName turns down what can be no VM's name before castrad is asked, so that
// a slip of the hand is a usage error whether castrad runs or not.
func checkName(name string) error {
	switch {
	case wire.Reserved(name):
		return fmt.Errorf("%q is the host's own name and no VM's", name)
	case !wire.ValidName(name):
		return fmt.Errorf("%q is no VM name: 1 to %d of A-Z a-z 0-9 . _ -, a letter or digit first", name, wire.MaxName)
	}
	return nil
}

// exclusive is a usage error when more than one of the named flags was given.
func exclusive(cmd *cobra.Command, names ...string) error {
	var first string
	for _, name := range names {
		switch {
		case !cmd.Flags().Changed(name):
		case first == "":
			first = name
		default:
			return usageError(cmd, "--%s and --%s exclude each other", first, name)
		}
	}
	return nil
}

// isBrokenPipe tells whether err comes from a reader that has gone.
func isBrokenPipe(err error) bool { return errors.Is(err, syscall.EPIPE) }
