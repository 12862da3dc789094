package cli

import "github.com/spf13/cobra"

func newBusCmd(f *Factory) *cobra.Command {
	return newGroup("bus", "Publish messages, ask guests, follow the record and check it", newPublishCmd(f), newRequestCmd(f), newTailCmd(f), newVerifyCmd(f))
}
