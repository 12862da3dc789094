package cli

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"
)

// completionTimeout bounds what a press of the tab key may wait for castrad.
const completionTimeout = time.Second

func newCompletionCmd(f *Factory) *cobra.Command {
	shells := []string{"bash", "zsh", "fish"}
	return &cobra.Command{
		Use:   "completion (bash | zsh | fish)",
		Short: "Print a shell's completion script",
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

// completeVMs offers the names that castrad knows just now, those on the line
// already left out. Without castrad there is nothing to offer, and a tab key is no
// reason to start it.
func (f *Factory) completeVMs(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	ctx := cmd.Context()
	if ctx == nil {
		ctx = context.Background() // cobra runs completions of a root without one
	}
	ctx, cancel := context.WithTimeout(ctx, completionTimeout)
	defer cancel()
	st, err := f.status(ctx, NoStart, nil)
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
