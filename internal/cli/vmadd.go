package cli

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/castrabus/castra/internal/bus"
)

type addOptions struct {
	noKey     bool
	keyOut    string
	ifMissing bool
	forwards  []string
	json      bool
}

func newVMAddCmd(f *Factory) *cobra.Command {
	var o addOptions
	cmd := &cobra.Command{
		Use:   "add NAME…",
		Short: "Register VMs and write the keys they prove themselves with",
		Long: `Register VMs. Each gets a key of its own; the guest's copy is written to
NAME.castra-key here, readable by you alone, and the QEMU arguments that hand
over name and key are printed. The key itself is never printed, and a key file
that is there is never overwritten.

With --if-missing a VM that is registered is left as it is, and its arguments
are printed all the same: a launch script may run it each time.

In a libvirt domain the same arguments stand below xmlns:qemu:

  <domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
    …
    <qemu:commandline>
      <qemu:arg value='-smbios'/>
      <qemu:arg value='type=11,value=io.systemd.credential:castra.vm=NAME'/>
      <qemu:arg value='-smbios'/>
      <qemu:arg value='type=11,path=/PATH/NAME.castra-key'/>
    </qemu:commandline>
  </domain>

The key's file must be readable by the user that libvirt runs QEMU as, and by
nobody else; where AppArmor or SELinux confines QEMU, that must allow it too.
<oemStrings> would put the key into the process list.

Exit codes: 0 done; 1 when a name is registered already, a forwarded port leads
to another VM, or a key could not be written: that name is not registered then;
5 castrad is not to be had.`,
		Example: `  castractl vm add web1
  castractl vm add --no-key --forward tcp:2222:22 old1
  castractl vm add -q --if-missing web1 --key-out /etc/vms/web1.key`,
		Args: vmArgs(1, 0),
		RunE: func(cmd *cobra.Command, names []string) error {
			if err := exclusive(cmd, "no-key", "key-out"); err != nil {
				return err
			}
			if o.keyOut != "" && len(names) > 1 {
				return usageError(cmd, "--key-out takes one key, but %d VMs are to be added", len(names))
			}
			if len(o.forwards) > 0 && len(names) > 1 {
				return usageError(cmd, "--forward leads to one VM, but %d are to be added", len(names))
			}
			for _, forward := range o.forwards {
				if _, err := parseForward(forward); err != nil {
					return usageError(cmd, "--forward: %w", err)
				}
			}
			return f.runVMAdd(cmd.Context(), &o, names)
		},
	}
	flags := cmd.Flags()
	flags.BoolVar(&o.noKey, "no-key", false, "admit the name without proof")
	flags.StringVar(&o.keyOut, "key-out", "", "write the guest's copy of the key to `FILE` (default NAME.castra-key)")
	flags.BoolVar(&o.ifMissing, "if-missing", false, "leave a VM that is registered as it is")
	flags.StringArrayVar(&o.forwards, "forward", nil, "note a forwarded port, `tcp:HOST:GUEST`, for \"castractl ports\"; may be repeated")
	flags.BoolVar(&o.json, "json", false, "print JSON")
	return cmd
}

func (f *Factory) runVMAdd(ctx context.Context, o *addOptions, names []string) (err error) {
	var handed []handover
	// What was done before an error is said all the same.
	defer func() { err = errors.Join(err, f.printHandover(ctx, handed, o.json)) }()
	for _, name := range names {
		h, err := f.addVM(ctx, o, name)
		if err != nil {
			return err
		}
		handed = append(handed, h)
	}
	return nil
}

// addVM registers one VM. The key's file is made first: that it exists, or cannot
// be written, is then found out before anything is registered.
func (f *Factory) addVM(ctx context.Context, o *addOptions, name string) (handover, error) {
	h := handover{VM: name}
	client, err := f.Client(ctx, MayStart)
	if err != nil {
		return h, err
	}
	if o.ifMissing {
		st, err := f.status(ctx, MayStart, []string{name})
		if err != nil {
			return h, err
		}
		if vm := findVM(&st, name); vm != nil && vm.Registered {
			f.note("%s is registered already", name)
			return f.existing(vm, o.keyOut), nil
		}
	}
	var file *keyFile
	if !o.noKey {
		if file, err = createKeyFile(name, o.keyOut); err != nil {
			return h, f.whyNoKey(ctx, name, err)
		}
		defer file.discard()
	}
	call, cancel := f.call(ctx)
	defer cancel()
	created, key, err := client.AddVM(call, bus.AddVMRequest{
		Name: name, NoKey: o.noKey, IfMissing: o.ifMissing, Forwards: o.forwards,
	})
	if refusal, ok := errors.AsType[*bus.Error](err); ok && refusal.Code == bus.CodeVMExists {
		return h, fmt.Errorf("adding %s: %w; for its arguments: castractl vm args %s", name, err, name)
	}
	if err != nil {
		return h, fmt.Errorf("adding %s: %w", name, err)
	}
	switch {
	case !created: // somebody else was faster, and --if-missing is content with that
		return f.existing(&bus.VM{VM: name, Keyed: !o.noKey}, o.keyOut), nil
	case file == nil:
		f.note("%s is registered, without a key, and let in when it comes; start QEMU with this (libvirt: vm add --help), then: castractl wait %s", name, name)
	default:
		if err := file.write(key); err != nil {
			return h, f.undoAdd(ctx, client, name, err)
		}
		h.KeyFile = file.path
		f.note("%s is registered, its key is in %s; start QEMU with this (libvirt: vm add --help), then: castractl wait %s", name, file.path, name)
	}
	h.Created = true
	return h, nil
}

// whyNoKey says of a VM whose key's file cannot be made, as a rule because it is there,
// that it is registered, where that is so.
func (f *Factory) whyNoKey(ctx context.Context, name string, err error) error {
	st, serr := f.status(ctx, MayStart, []string{name})
	if serr != nil {
		return err
	}
	if vm := findVM(&st, name); vm == nil || !vm.Registered {
		return err
	}
	return fmt.Errorf("adding %s: it is registered already; for its arguments: castractl vm args %s", name, name)
}

// undoAdd takes back a registration whose key nobody has.
func (f *Factory) undoAdd(ctx context.Context, client Client, name string, cause error) error {
	ctx, cancel := f.call(ctx)
	defer cancel()
	if err := client.RemoveVM(ctx, name); err != nil {
		return fmt.Errorf("%s is registered, but its key is lost: %w; and it could not be removed again: %w; castractl vm remove %s", name, cause, err, name)
	}
	return fmt.Errorf("%s was not added: %w; its registration is taken back", name, cause)
}
