package cli

import "github.com/spf13/cobra"

func newBusCmd(f *Factory) *cobra.Command {
	return newGroup("bus", "Publish messages, ask guests, follow the record and check it",
		`What passes over the bus is JSON, a message a value, on a topic. Everything is
written down before it is acknowledged, and the record can be read later.`,
		newPublishCmd(f), newRequestCmd(f), newTailCmd(f), newVerifyCmd(f))
}
