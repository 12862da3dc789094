package cli

import (
	"fmt"

	"github.com/spf13/cobra"
)

func newVersionCmd(f *Factory) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print castractl's version",
		Long: `Print castractl's own version. castrad's is in "castractl status".

The exit code is 0.`,
		Example: `  castractl version`,
		Args:    noArgs,
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintf(f.IO.Out, "castractl %s\n", f.Version)
			return err
		},
	}
}
