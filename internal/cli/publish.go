package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

// maxInput bounds what is read of a payload's source: far above what a payload
// may take, since white space does not count, and far below what would hurt.
const maxInput = 16 << 20 // bytes

type publishOptions struct {
	topic, vm, id, reply string
	payload              string
	waitAck              spanFlag
	printSeq             bool
}

func newPublishCmd(f *Factory) *cobra.Command {
	var o publishOptions
	cmd := &cobra.Command{
		Use:   "publish [flags] (--payload JSON | @FILE | - | JSON)",
		Short: "Publish one message",
		Long: `Publish one JSON value. It is stored durably when the command ends with 0, unless
castrad is configured with a lazy sync, which a remark on stderr says; in a guest
it may be kept by castra-guestd until the host has it.

@FILE reads the payload from a file, - from standard input.`,
		Example: `  castractl bus publish '{"event":"maintenance"}'
  castractl bus publish --vm web1 --wait-ack 5s '"reload"'
  date +'"%c"' | castractl bus publish --topic clock -`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return fmt.Errorf("one word too many: %q; the payload is one JSON value, quote it for the shell", args[1])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := exclusive(cmd, "topic", "vm"); err != nil {
				return err
			}
			source := o.payload
			switch given := cmd.Flags().Changed("payload"); {
			case given && len(args) > 0:
				return usageError(cmd, "the payload is given twice")
			case !given && len(args) == 0:
				return usageError(cmd, "what is to be published? Give JSON, @FILE or -")
			case !given:
				source = args[0]
			}
			req, err := o.request(cmd, source)
			if err != nil {
				return err
			}
			return f.runPublish(cmd.Context(), &o, req, cmd.Flags().Changed("wait-ack"))
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&o.topic, "topic", "broadcast", "`TOPIC` to publish on")
	flags.StringVar(&o.vm, "vm", "", "publish to this VM alone: the topic vm:`NAME`")
	flags.StringVar(&o.id, "id", "", "the message's `ID`: a retry with the same one is stored once")
	flags.StringVar(&o.reply, "reply", "", "`TOPIC` on which an answer is awaited")
	flags.StringVar(&o.payload, "payload", "", "`JSON` to publish, or @FILE, or -")
	flags.Var(&o.waitAck, "wait-ack", "wait so long until a subscribed guest has acknowledged it")
	flags.Lookup("wait-ack").DefValue = "" // not 0s: without the flag nothing is waited for
	_ = cmd.RegisterFlagCompletionFunc("vm", f.completeVM)
	flags.BoolVar(&o.printSeq, "print-seq", false, "print the record's number alone; 0: the host has not numbered it yet")
	return cmd
}

// request checks what can be checked without the bus, so that a slip of the hand
// is a usage error whether castrad runs or not.
func (o *publishOptions) request(cmd *cobra.Command, source string) (bus.PublishRequest, error) {
	req := bus.PublishRequest{Topic: o.topic, ID: o.id, Reply: o.reply}
	if o.vm != "" {
		if err := checkName(o.vm); err != nil {
			return req, usageError(cmd, "--vm: %w", err)
		}
		req.Topic = "vm:" + o.vm
	}
	if err := checkTopic(req.Topic); err != nil {
		return req, usageError(cmd, "--topic: %w", err)
	}
	if o.reply != "" {
		if err := checkTopic(o.reply); err != nil {
			return req, usageError(cmd, "--reply: %w", err)
		}
	}
	if o.id != "" && !wire.ValidID(o.id) {
		return req, usageError(cmd, "--id takes 1 to %d bytes of UTF-8", wire.MaxID)
	}
	raw, err := readPayload(cmd.InOrStdin(), source)
	if err != nil {
		return req, err
	}
	req.Payload, err = wire.Compact(raw)
	if err != nil {
		what := strings.TrimPrefix(err.Error(), wire.ErrProtocol.Error()+": ")
		return req, usageError(cmd, `the payload is not JSON: %s (text needs its own quotes: '"text"')`, what)
	}
	if len(req.Payload) > wire.MaxPayload {
		return req, bus.Errorf(bus.CodeTooLarge, "the payload takes %d bytes, of at most %d: store it elsewhere and publish where", len(req.Payload), wire.MaxPayload)
	}
	return req, nil
}

func checkTopic(topic string) error {
	if wire.ValidTopic(topic) {
		return nil
	}
	return fmt.Errorf("%q is no topic: 1 to %d of A-Z a-z 0-9 . _ : / -, where vm: is followed by a VM's name", topic, wire.MaxTopic)
}

// readPayload reads what source names: a file, standard input, or itself.
func readPayload(stdin io.Reader, source string) ([]byte, error) {
	in := stdin
	switch {
	case source == "-":
	case source != "" && source[0] == '@':
		file, err := os.Open(source[1:])
		if err != nil {
			return nil, fmt.Errorf("reading the payload: %w", err)
		}
		defer file.Close()
		in = file
	default:
		return []byte(source), nil
	}
	raw, err := io.ReadAll(io.LimitReader(in, maxInput+1))
	if err != nil {
		return nil, fmt.Errorf("reading the payload: %w", err)
	}
	if len(raw) > maxInput {
		return nil, fmt.Errorf("the payload is over %d MiB, and may take %d bytes: store it elsewhere and publish where", maxInput>>20, wire.MaxPayload)
	}
	return raw, nil
}

func (f *Factory) runPublish(ctx context.Context, o *publishOptions, req bus.PublishRequest, wait bool) error {
	client, err := f.Client(ctx, MayStart)
	if err != nil {
		return err
	}
	if o.vm != "" {
		if err := f.mustKnow(ctx, o.vm); err != nil {
			return err
		}
	}
	call, cancel := f.call(ctx)
	defer cancel()
	seq, err := client.Publish(call, req)
	if err != nil {
		return fmt.Errorf("publishing on %s: %w", req.Topic, err)
	}
	if o.printSeq {
		if _, err := fmt.Fprintln(f.IO.Out, seq); err != nil && !isBrokenPipe(err) {
			return err
		}
	}
	switch {
	case seq == 0:
		f.note("queued: castra-guestd keeps it until the host is back")
		if wait {
			return exitf(ExitUnreachable, "nobody can acknowledge the message while the host is away; it is kept and sent later")
		}
		return nil
	case f.IO.Terminal && !o.printSeq && !f.Quiet:
		fmt.Fprintf(f.IO.Out, "record %d on %s\n", seq, escape(req.Topic))
	}
	f.noteLazy(ctx, seq)
	if wait {
		return f.waitAck(ctx, client, seq, time.Duration(o.waitAck))
	}
	return nil
}

// noteLazy says of a record that it may still be lost, where castrad's sync is lazy.
func (f *Factory) noteLazy(ctx context.Context, seq uint64) {
	if f.Quiet {
		return
	}
	st, err := f.status(ctx, NoStart, []string{""}) // nobody's name: of the VMs none is wanted
	if err == nil && st.Broker.Kind != kindGuest && st.Broker.Sync != "" && st.Broker.Sync != "always" {
		f.note("record %d is stored, but not durable yet: castrad's sync is %q, and a power cut may lose it", seq, st.Broker.Sync)
	}
}

// mustKnow turns down a name that no message can reach: where unknown VMs are
// refused, one that is neither registered nor was ever there is a slip of the
// hand. A guest knows no other guests, and so cannot tell.
func (f *Factory) mustKnow(ctx context.Context, name string) error {
	st, err := f.status(ctx, MayStart, []string{name})
	if err != nil {
		return err
	}
	if st.Broker.Kind == kindGuest || st.Broker.UnknownVMs != "reject" {
		return nil
	}
	if findVM(&st, name) == nil {
		return errNoSuchVM(name)
	}
	return nil
}

func (f *Factory) waitAck(ctx context.Context, client Client, seq uint64, timeout time.Duration) error {
	// The bus keeps the deadline; the call gets some more, so that its answer is
	// what ends the wait.
	call, cancel := context.WithTimeout(ctx, min(timeout, forever-f.answerTime())+f.answerTime())
	defer cancel()
	vm, err := client.WaitAck(call, seq, timeout)
	if refusal, ok := errors.AsType[*bus.Error](err); ok && refusal.Code == bus.CodeNoAck {
		return exitf(ExitUnreachable, "record %d is stored, but no guest acknowledged it within %v; see who listens: castractl status", seq, timeout)
	}
	if err != nil {
		return fmt.Errorf("waiting for record %d to be acknowledged: %w", seq, err)
	}
	if f.IO.Terminal && !f.Quiet {
		fmt.Fprintf(f.IO.Out, "acknowledged by %s\n", escape(vm))
	}
	return nil
}
