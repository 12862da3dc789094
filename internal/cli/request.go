package cli

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

type requestOptions struct {
	vm, topic string
	timeout   spanFlag
	format    string
}

func newRequestCmd(f *Factory) *cobra.Command {
	o := requestOptions{timeout: spanFlag(5 * time.Second), format: "cat"}
	cmd := &cobra.Command{
		Use:   "request [--vm NAME] TOPIC [JSON | @FILE | -]",
		Short: "Publish a message and print the first answer to it",
		Long: `Publish a message that names a topic for the answer, and print the first
answer. With --vm it goes to vm:NAME/TOPIC, which that VM alone hears and
answers; without, to a topic that everybody hears who subscribes. Without JSON
the payload is null.

The answer is a message on the topic that the request names as "reply"; in the
guest "castractl bus tail -o json" shows it. That topic is new for each
request, so no answer is taken for another's, and it lies below the VM's own
topic, where no other VM may publish.

Exit codes: 0 when an answer came; 3 when none came in time (the request is
stored all the same, and may still be answered), 4 when the VM is not known.`,
		Example: `  castractl bus request --vm web1 uptime
  castractl bus request --vm web1 reload '{"unit":"nginx"}' --timeout 30s

  # In the guest, what answers the first of them:
  castractl bus tail --topic vm:self/uptime -n 0 -o json |
    while read -r request; do
      reply=$(jq -r .reply <<<"$request")
      castractl bus publish --topic "$reply" "\"$(uptime -p)\""
    done`,
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case len(args) == 0:
				return errors.New("which topic? It is missing")
			case len(args) > 2:
				return fmt.Errorf("one word too many: %q; the payload is one JSON value, quote it for the shell", args[2])
			}
			return nil
		},
		ValidArgsFunction: f.completeRequest,
		RunE: func(cmd *cobra.Command, args []string) error {
			source := "null"
			if len(args) > 1 {
				source = args[1]
			}
			o.topic = args[0]
			req, err := o.request(cmd)
			if err != nil {
				return err
			}
			if o.vm == "" {
				o.vm, _ = wire.TopicVM(req.Topic)
			}
			if req.Payload, err = readPayload(cmd, source); err != nil {
				return err
			}
			return f.runRequest(cmd.Context(), &o, req)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&o.vm, "vm", "", "ask this VM alone: the topic vm:`NAME`/TOPIC")
	flags.Var(&o.timeout, "timeout", "give up after this long without an answer")
	flags.StringVarP(&o.format, "output", "o", o.format, "`FORMAT` of the answer: cat (its payload), short, json or json-pretty")
	_ = cmd.RegisterFlagCompletionFunc("vm", f.completeVM)
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func (o *requestOptions) request(cmd *cobra.Command) (bus.PublishRequest, error) {
	req := bus.PublishRequest{Topic: o.topic}
	switch {
	case !slices.Contains(formats, o.format):
		return req, usageError(cmd, "--output: no format %q: it is short, cat, json or json-pretty", o.format)
	case o.vm != "" && strings.HasPrefix(o.topic, "vm:"):
		return req, usageError(cmd, "with --vm the topic is what follows vm:%s/, and %q is whole", o.vm, o.topic)
	case o.vm != "":
		if err := checkName(o.vm); err != nil {
			return req, usageError(cmd, "--vm: %w", err)
		}
		req.Topic = "vm:" + o.vm + "/" + o.topic
	}
	if err := checkTopic(req.Topic); err != nil {
		return req, usageError(cmd, "%w", err)
	}
	return req, nil
}

// errAnswered ends the tail that waits for an answer.
var errAnswered = errors.New("the answer has come")

func (f *Factory) runRequest(ctx context.Context, o *requestOptions, req bus.PublishRequest) error {
	st, err := f.status(ctx, MayStart, []string{o.vm}) // "" is nobody's name: of the VMs none is wanted then
	if err == nil {
		err = knows(&st, o.vm)
	}
	if err != nil {
		return err
	}
	if req.Reply, err = f.replyTopic(ctx, &st, o.vm); err != nil {
		return err
	}
	seq, err := f.publish(ctx, req)
	if err != nil {
		return err
	}
	timeout := time.Duration(o.timeout)
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	// An answer has a higher number than its request, and the log keeps it: to begin
	// there misses none, however fast it came. A guest whose host is away has no
	// number for the request yet, but one for the newest record before it.
	after := seq
	if after == 0 {
		after = st.Broker.HeadSeq
	}
	t := &tailer{
		f: f, start: MayStart,
		req: bus.TailRequest{Topics: []string{req.Reply}, Follow: true},
		out: bufio.NewWriter(f.IO.Out),
	}
	t.beginAfter(after)
	format := newFormatter(o.format, f)
	t.format = func(w *bufio.Writer, e *entry) error {
		if err := format(w, e); err != nil || e.isGap() {
			return err
		}
		return errAnswered
	}
	err = t.run(ctx)
	switch {
	case errors.Is(err, errAnswered):
		return nil
	case ctx.Err() != nil:
		return exitf(ExitUnreachable, "no answer on %s within %v; %s", req.Reply, timeout, whoListens(o.vm))
	}
	return err
}

// replyTopic makes up a topic on which the answer is to come: one that the VM which
// is asked may publish on and no other VM may, or, in a guest, one that this guest
// may hear.
func (f *Factory) replyTopic(ctx context.Context, st *bus.Status, vm string) (string, error) {
	topic := "reply." + strings.ToLower(rand.Text()) // a guest that hears the request is the only one to know it
	if st.Broker.Kind == kindGuest {
		own, err := f.status(ctx, MayStart, nil)
		if err != nil {
			return "", err
		}
		for i := range own.VMs { // the one that this is
			vm = own.VMs[i].VM
		}
	}
	if vm != "" {
		topic = "vm:" + vm + "/" + topic
	}
	return topic, nil
}
