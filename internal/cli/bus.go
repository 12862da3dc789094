package cli

import "github.com/spf13/cobra"

func newBusCmd(f *Factory) *cobra.Command {
	return newGroup("bus", "Publish messages and follow the record of them", newPublishCmd(f), newTailCmd(f))
}
