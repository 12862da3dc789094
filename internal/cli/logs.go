package cli

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"

	"github.com/spf13/cobra"
)

func newLogsCmd(f *Factory) *cobra.Command {
	var follow bool
	var lines string
	cmd := &cobra.Command{
		Use:   "logs [VM]",
		Short: "Show the daemon's log, or what in it concerns one VM",
		Long: `Run journalctl for castrad and castra-guestd; with a VM, for the entries that
concern it. For messages see "castractl bus tail".

The exit code is journalctl's.`,
		Example: `  castractl logs web1
  castractl logs -f -n 20`,
		Args:              vmArgs(0, 1),
		ValidArgsFunction: f.completeVM,
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, err := strconv.ParseUint(lines, 10, 32); err != nil && lines != "" && lines != "all" {
				return usageError(cmd, `--lines takes a number or "all", not %q`, lines)
			}
			path, err := exec.LookPath("journalctl")
			if errors.Is(err, exec.ErrNotFound) {
				return fmt.Errorf("there is no journalctl here: castrad's log is where its stderr goes, ask who started it (in a container: docker logs)")
			}
			if err != nil {
				return fmt.Errorf("looking for journalctl: %w", err)
			}
			argv := f.journalArgs(args, follow, lines)
			// In castractl's place, so that keys, signals and the exit code are journalctl's.
			if err := f.Exec(path, argv, os.Environ()); err != nil {
				return fmt.Errorf("running %s: %w", path, err)
			}
			return nil
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with new entries")
	cmd.Flags().StringVarP(&lines, "lines", "n", "", "begin with the last `N` entries, or with \"all\"")
	return cmd
}

// journalArgs is the command line: both units, since castractl serves in a guest
// as well, and a machine may be both.
func (f *Factory) journalArgs(vm []string, follow bool, lines string) []string {
	argv := []string{"journalctl", "--unit=castrad.service", "--unit=castra-guestd.service"}
	if follow {
		argv = append(argv, "--follow")
	}
	if lines != "" {
		argv = append(argv, "--lines="+lines)
	}
	if f.NoPager {
		argv = append(argv, "--no-pager")
	}
	if f.Quiet {
		argv = append(argv, "--quiet")
	}
	for _, name := range vm {
		argv = append(argv, "CASTRA_VM="+name)
	}
	return argv
}
