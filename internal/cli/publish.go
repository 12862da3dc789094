package cli

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

type publishOptions struct {
	topic, vm, id, reply string
	payload              string
	lines                bool
	waitAck              spanFlag
	wait                 bool // waitAck was given
	printSeq             bool

	newest uint64 // the number of what was published last; 0: nothing, or none is known yet
}

func newPublishCmd(f *Factory) *cobra.Command {
	var o publishOptions
	cmd := &cobra.Command{
		Use:   "publish [flags] (--payload JSON | @FILE | - | JSON)",
		Short: "Publish a message, or one for each line of a file",
		Long: `Publish one JSON value. It is stored durably when the command ends with 0,
unless castrad is configured with a lazy sync, which a remark on stderr says; in
a guest it may be kept by castra-guestd until the host has it.

@FILE reads the payload from a file, - from standard input. With --lines each
line is a message of its own, published as it comes; the first that fails ends
the command, and the error says which it was.

Exit codes: 0 when all is stored; 1 when castrad refused it, 2 when it is no
JSON or no topic, 3 when nobody acknowledged it within --wait-ack (it is stored
all the same), 4 when the VM is not known, 5 when castrad is not to be had.`,
		Example: `  castractl bus publish '{"event":"maintenance"}'
  castractl bus publish --vm web1 --wait-ack 5s '"reload"'
  date +'"%c"' | castractl bus publish --topic clock -
  castractl bus publish --topic jobs.new --lines --print-seq @jobs.jsonl`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return fmt.Errorf("one word too many: %q; the payload is one JSON value, quote it for the shell", args[1])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := errors.Join(exclusive(cmd, "topic", "vm"), exclusive(cmd, "lines", "id")); err != nil {
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
			o.wait = cmd.Flags().Changed("wait-ack")
			return f.runPublish(cmd, &o, source)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&o.topic, "topic", "broadcast", "`TOPIC` to publish on")
	flags.StringVar(&o.vm, "vm", "", "publish to this VM alone: the topic vm:`NAME`")
	flags.StringVar(&o.id, "id", "", "the message's `ID`: a retry with the same one is stored once")
	flags.StringVar(&o.reply, "reply", "", "`TOPIC` on which an answer is awaited")
	flags.StringVar(&o.payload, "payload", "", "`JSON` to publish, or @FILE, or -")
	flags.BoolVar(&o.lines, "lines", false, "publish each line as a message of its own")
	flags.Var(&o.waitAck, "wait-ack", "wait so long until a subscribed guest has acknowledged it")
	flags.Lookup("wait-ack").DefValue = "" // not 0s: without the flag nothing is waited for
	flags.BoolVar(&o.printSeq, "print-seq", false, "print each record's number, on a line of its own; 0: the host has not numbered it yet")
	_ = cmd.RegisterFlagCompletionFunc("vm", f.completeVM)
	_ = cmd.RegisterFlagCompletionFunc("topic", f.completeTopic)
	_ = cmd.RegisterFlagCompletionFunc("reply", f.completeTopic)
	return cmd
}

// request checks what can be checked without the bus, so that a slip of the hand
// is a usage error whether castrad runs or not.
func (o *publishOptions) request(cmd *cobra.Command) (bus.PublishRequest, error) {
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
	if cmd.Flags().Changed("id") && !wire.ValidID(o.id) {
		return req, usageError(cmd, "--id takes 1 to %d bytes of UTF-8", wire.MaxID)
	}
	return req, nil
}

func checkTopic(topic string) error {
	if wire.ValidTopic(topic) {
		return nil
	}
	return fmt.Errorf("%q is no topic: 1 to %d of A-Z a-z 0-9 . _ : / -, where vm: is followed by a VM's name", topic, wire.MaxTopic)
}

func (f *Factory) runPublish(cmd *cobra.Command, o *publishOptions, source string) error {
	ctx := cmd.Context()
	defer func() { f.noteLazy(ctx, o.newest) }()
	req, err := o.request(cmd)
	if err != nil {
		return err
	}
	if o.vm == "" {
		o.vm, _ = wire.TopicVM(req.Topic)
	}
	if o.lines {
		known := false
		return eachPayload(cmd, source, func(payload []byte) error {
			if !known { // asked once, and only when there is something to publish
				if err := f.mayPublish(ctx, o); err != nil {
					return err
				}
				known = true
			}
			req.Payload = payload
			return f.publishOne(ctx, o, req)
		})
	}
	if req.Payload, err = readPayload(cmd, source); err != nil {
		return err
	}
	if err := f.mayPublish(ctx, o); err != nil {
		return err
	}
	return f.publishOne(ctx, o, req)
}

// publishOne publishes a message, prints what was asked for, and waits where it is
// to wait.
func (f *Factory) publishOne(ctx context.Context, o *publishOptions, req bus.PublishRequest) error {
	seq, err := f.publish(ctx, req)
	if err != nil {
		return err
	}
	o.newest = seq
	if o.printSeq {
		if _, err := fmt.Fprintln(f.IO.Out, seq); err != nil && !isBrokenPipe(err) {
			return fmt.Errorf("record %d is stored, but its number could not be written: %w", seq, err)
		}
	}
	switch {
	case seq == 0:
		f.note("queued: castra-guestd keeps it until the host has it; see what is between: castractl status")
		return nil
	case f.IO.Terminal && !o.printSeq && !f.Quiet:
		fmt.Fprintf(f.IO.Out, "record %d on %s\n", seq, escape(req.Topic))
	}
	if o.wait {
		return f.waitAck(ctx, o, seq)
	}
	return nil
}

// noteLazy says of what was published up to seq that it may still be lost, where
// castrad's sync is lazy.
func (f *Factory) noteLazy(ctx context.Context, seq uint64) {
	if f.Quiet || seq == 0 {
		return
	}
	b, err := f.broker(ctx, NoStart)
	if err == nil && b.Kind != kindGuest && b.Sync != "" && b.Sync != "always" {
		f.note("record %d is stored, but not durable yet: castrad's sync is %q, and a power cut may lose it", seq, b.Sync)
	}
}

// whoListens is the command that tells why nobody took a message.
func whoListens(vm string) string {
	if vm == "" {
		return "see who listens: castractl status"
	}
	return "see what is the matter: castractl explain " + vm
}

// publish stores a message and gives its number.
func (f *Factory) publish(ctx context.Context, req bus.PublishRequest) (seq uint64, err error) {
	client, err := f.Client(ctx, MayStart)
	if err != nil {
		return 0, err
	}
	ctx, cancel := f.call(ctx)
	defer cancel()
	if seq, err = client.Publish(ctx, req); err != nil {
		return 0, fmt.Errorf("publishing on %s: %w", req.Topic, err)
	}
	return seq, nil
}

// mayPublish turns down what can end well for nobody while nothing is stored yet: a
// message to a VM that is not known, and a wait in a guest.
func (f *Factory) mayPublish(ctx context.Context, o *publishOptions) error {
	if o.vm == "" && !o.wait {
		return nil
	}
	st, err := f.status(ctx, MayStart, []string{o.vm})
	if err != nil {
		return err
	}
	if o.wait && st.Broker.Kind == kindGuest {
		return errors.New("nothing was published: only the host knows which guest acknowledges a message; publish it there, or here without --wait-ack")
	}
	return knows(&st, o.vm)
}

// knows turns down a name that no message can reach: where unknown VMs are refused,
// one that is neither registered nor was ever there is a slip of the hand. A guest
// knows no other guests, and so cannot tell. No name is fine.
func knows(st *bus.Status, name string) error {
	if name == "" || st.Broker.Kind == kindGuest || st.Broker.UnknownVMs != "reject" || findVM(st, name) != nil {
		return nil
	}
	return errNoSuchVM(name)
}

func (f *Factory) waitAck(ctx context.Context, o *publishOptions, seq uint64) error {
	timeout := time.Duration(o.waitAck)
	client, err := f.Client(ctx, MayStart)
	if err != nil {
		return err
	}
	// The bus keeps the deadline; the call gets some more, so that its answer is
	// what ends the wait.
	call, cancel := context.WithTimeout(ctx, min(timeout, forever-f.answerTime())+f.answerTime())
	defer cancel()
	vm, err := client.WaitAck(call, seq, timeout)
	if refusal, ok := errors.AsType[*bus.Error](err); ok && refusal.Code == bus.CodeNoAck {
		return exitf(ExitUnreachable, "record %d is stored, but no guest acknowledged it within %v; %s", seq, timeout, whoListens(o.vm))
	}
	if err != nil {
		return fmt.Errorf("record %d is stored; waiting for a guest to acknowledge it: %w", seq, err)
	}
	if f.IO.Terminal && !f.Quiet {
		fmt.Fprintf(f.IO.Out, "acknowledged by %s\n", escape(vm))
	}
	return nil
}
