package cli

import "github.com/spf13/cobra"

func newBusCmd(f *Factory) *cobra.Command {
	return newGroup("bus", "Publish messages, follow the record of them and check it", newPublishCmd(f), newTailCmd(f), newVerifyCmd(f))
}
