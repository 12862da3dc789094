package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/castrabus/castra/internal/bus"
)

// handover is how a VM is given its name and its key.
type handover struct {
	VM      string   `json:"vm"`
	Created bool     `json:"created"`
	KeyFile string   `json:"key_file"` // "": no key
	Args    []string `json:"qemu_args"`
}

// existing is the handover of a VM that was registered before; castrad does not
// know where its key file is, so the caller's word or the default stands. Where there
// is none QEMU will not start, which is said here with what mends it.
func (f *Factory) existing(vm *bus.VM, keyOut string) handover {
	h := handover{VM: vm.VM}
	if !vm.Keyed {
		return h
	}
	h.KeyFile = keyPath(vm.VM, keyOut)
	if _, err := os.Stat(h.KeyFile); errors.Is(err, os.ErrNotExist) {
		f.note("%s is not here; say where it is with --key-out, or make a new key: castractl vm rekey %s", h.KeyFile, h.VM)
	}
	return h
}

// args gives the QEMU arguments. The key goes by path: a value would show in the
// process list.
func (h *handover) args() []string {
	args := []string{"-smbios", "type=11,value=io.systemd.credential:castra.vm=" + h.VM}
	if h.KeyFile != "" {
		// QEMU takes a doubled comma for one that does not end the option's value.
		args = append(args, "-smbios", "type=11,path="+strings.ReplaceAll(h.KeyFile, ",", ",,"))
	}
	return args
}

// printHandover prints the arguments, a line a VM, quoted for the shell.
func (f *Factory) printHandover(ctx context.Context, handed []handover, asJSON bool) error {
	if len(handed) == 0 {
		return nil
	}
	if asJSON {
		names := make([]string, len(handed))
		for i := range handed {
			names[i] = handed[i].VM
			handed[i].Args = handed[i].args()
		}
		st, err := f.status(ctx, NoStart, names)
		if err != nil {
			return err
		}
		return f.printJSON(struct {
			bus.Status
			Args []handover `json:"args"`
		}{st, handed})
	}
	var lines strings.Builder
	for i := range handed {
		for j, arg := range handed[i].args() {
			if j > 0 {
				lines.WriteByte(' ')
			}
			lines.WriteString(shellQuote(arg))
		}
		lines.WriteByte('\n')
	}
	// A reader that has gone undoes nothing of what was done.
	if _, err := fmt.Fprint(f.IO.Out, lines.String()); err != nil && !isBrokenPipe(err) {
		return fmt.Errorf("QEMU's arguments for %s, which castractl vm args prints again, could not be shown: %w", handed[0].VM, err)
	}
	return nil
}

// shellQuote writes a word so that a POSIX shell reads it as it is.
func shellQuote(word string) string {
	bare := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("_./=:,@%+-", r)
	}
	if word != "" && strings.IndexFunc(word, func(r rune) bool { return !bare(r) }) < 0 {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}

func newVMArgsCmd(f *Factory) *cobra.Command {
	var keyOut string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "args NAME",
		Short: "Print the QEMU arguments that hand over a VM's name and key",
		Long: `Print the QEMU arguments that hand over a VM's name and, if it has one, its
key, on one line for a launch script. castrad is not started for this.

Exit codes: 0 done, 4 no such VM, 5 castrad is not to be had.`,
		Example: `  qemu-system-x86_64 -m 512 $(castractl vm args web1)
  castractl vm args web1 --key-out /etc/vms/web1.key`,
		Args:              vmArgs(1, 1),
		ValidArgsFunction: f.completeVM,
		RunE: func(cmd *cobra.Command, args []string) error {
			st, err := f.lookUp(cmd.Context(), args)
			if err != nil {
				return err
			}
			h := f.existing(findVM(&st, args[0]), keyOut)
			return f.printHandover(cmd.Context(), []handover{h}, asJSON)
		},
	}
	cmd.Flags().StringVar(&keyOut, "key-out", "", "the `FILE` that \"vm add\" wrote the key to (default NAME.castra-key)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newVMRekeyCmd(f *Factory) *cobra.Command {
	var keyOut string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "rekey NAME",
		Short: "Give a VM a new key; the old one is void at once",
		Long: `Make a new key for a VM. Its session ends, and it comes back with the new key
alone: hand that over and restart the VM. What is printed is what "vm add"
prints.

Exit codes: 0 done; 1 when the key could not be written; 4 no such VM; 5
castrad is not to be had.`,
		Example:           `  castractl vm rekey web1 --key-out web1.new-key`,
		Args:              vmArgs(1, 1),
		ValidArgsFunction: f.completeVM,
		RunE: func(cmd *cobra.Command, args []string) error {
			h, err := f.rekeyVM(cmd.Context(), args[0], keyOut)
			if err != nil {
				return err
			}
			return f.printHandover(cmd.Context(), []handover{h}, asJSON)
		},
	}
	cmd.Flags().StringVar(&keyOut, "key-out", "", "write the guest's copy of the key to `FILE` (default NAME.castra-key)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (f *Factory) rekeyVM(ctx context.Context, name, keyOut string) (handover, error) {
	client, err := f.Client(ctx, MayStart)
	if err != nil {
		return handover{}, err
	}
	file, err := createKeyFile(name, keyOut)
	if err != nil {
		return handover{}, err
	}
	defer file.discard()
	ctx, cancel := f.call(ctx)
	defer cancel()
	key, err := client.RekeyVM(ctx, name)
	if err != nil {
		return handover{}, fmt.Errorf("rekeying %s: %w", name, err)
	}
	if err := file.write(key); err != nil {
		return handover{}, fmt.Errorf("%s has a new key, but its copy is lost: %w; make another: castractl vm rekey %s --key-out FILE", name, err, name)
	}
	f.note("%s has a new key, in %s; start QEMU with this (libvirt: vm add --help):", name, file.path)
	return handover{VM: name, KeyFile: file.path}, nil
}

// printVMs prints the state of the named VMs as JSON.
func (f *Factory) printVMs(ctx context.Context, names []string) error {
	st, err := f.status(ctx, NoStart, names)
	if err != nil {
		return err
	}
	return f.printJSON(st)
}
