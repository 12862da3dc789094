package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/castrabus/castra/internal/bus"
)

// completionTimeout bounds what a press of the tab key may wait for castrad.
const completionTimeout = time.Second

func newCompletionCmd(f *Factory) *cobra.Command {
	shells := []string{"bash", "zsh", "fish"}
	return &cobra.Command{
		Use:   "completion (bash | zsh | fish)",
		Short: "Print a shell's completion script",
		Long: `Print what lets the shell complete castractl's commands and flags, and with
them the names of VMs, the topics and the formats that there are just now.

The exit code is 0, or 2 for a shell that is not known.`,
		Example: `  castractl completion bash > /etc/bash_completion.d/castractl
  source <(castractl completion zsh)`,
		ValidArgs: shells,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 || !slices.Contains(shells, args[0]) {
				return fmt.Errorf("which shell? One of bash, zsh and fish")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			switch root := cmd.Root(); args[0] {
			case "bash":
				return root.GenBashCompletionV2(f.IO.Out, true)
			case "zsh":
				return root.GenZshCompletion(f.IO.Out)
			default:
				return root.GenFishCompletion(f.IO.Out, true)
			}
		},
	}
}

// completionStatus asks for all there is to offer.
func (f *Factory) completionStatus(cmd *cobra.Command) (bus.Status, error) {
	ctx := cmd.Context()
	if ctx == nil {
		ctx = context.Background() // cobra runs completions of a root without one
	}
	ctx, cancel := context.WithTimeout(ctx, completionTimeout)
	defer cancel()
	return f.status(ctx, NoStart, nil)
}

// completeVMs offers the names that castrad knows just now, those on the line
// already left out. Without castrad there is nothing to offer, and a tab key is no
// reason to start it.
func (f *Factory) completeVMs(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	st, err := f.completionStatus(cmd)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, vm := range st.VMs {
		if !slices.Contains(args, vm.VM) {
			names = append(names, vm.VM)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// completeVM is completeVMs for a command that takes one.
func (f *Factory) completeVM(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return f.completeVMs(cmd, args, word)
}

// completeTopic offers the topics that somebody is subscribed to just now, and those
// that are always there.
func (f *Factory) completeTopic(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return slices.DeleteFunc(f.liveTopics(cmd, "", "broadcast"), isPattern), cobra.ShellCompDirectiveNoFileComp
}

// completePattern is completeTopic for one who listens.
func (f *Factory) completePattern(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return f.liveTopics(cmd, "", "broadcast", "castra.presence"), cobra.ShellCompDirectiveNoFileComp
}

// completeRequest offers what can be asked: where a VM is named, the topics below
// its own that it listens to.
func (f *Factory) completeRequest(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	switch {
	case len(args) == 1:
		return nil, cobra.ShellCompDirectiveDefault // @FILE
	case len(args) > 1:
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	prefix := ""
	if vm, _ := cmd.Flags().GetString("vm"); vm != "" {
		prefix = "vm:" + vm + "/"
	}
	return slices.DeleteFunc(f.liveTopics(cmd, prefix), isPattern), cobra.ShellCompDirectiveNoFileComp
}

// isPattern tells whether somebody listens to it and nobody can publish on it.
func isPattern(topic string) bool { return strings.ContainsAny(topic, "*>") }

// liveTopics gives the topics that begin with prefix, without it, and always as well.
func (f *Factory) liveTopics(cmd *cobra.Command, prefix string, always ...string) []string {
	topics := always
	st, err := f.completionStatus(cmd)
	if err != nil {
		return topics
	}
	for _, vm := range st.VMs {
		for _, topic := range vm.Subscriptions {
			if rest, ok := strings.CutPrefix(topic, prefix); ok && rest != "" {
				topics = append(topics, rest)
			}
		}
	}
	slices.Sort(topics)
	return slices.Compact(topics)
}
