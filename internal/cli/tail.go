package cli

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

type tailOptions struct {
	topics       []string
	vm           string
	lines        string
	from         seqFlag
	since, until string
	cursorFile   string
	follow, once bool
	format       string
	floor        floor // with lines and from or since
}

func newTailCmd(f *Factory) *cobra.Command {
	var o tailOptions
	cmd := &cobra.Command{
		Use:   "tail",
		Short: "Show the record, and follow it",
		Long: `Show the last 10 records and follow with what is new, until Ctrl-C.

T is a moment, as journalctl takes it: "2006-01-02 15:04:05", RFC 3339, today,
yesterday, now, -5min, "5min ago" or @SECONDS. In a pattern dots separate
tokens, * is one token and a final > the rest; neither matches a vm: or castra.
topic unless that beginning is spelled out.

Formats: short is a line for people; cat the payload alone; json an object a
line; json-pretty the same, indented. Records that are gone are a line of their
own: a gap, in json {"type":"gap","from":N,"to":M}, with cat on standard error.

A following tail outlives a restart of castrad and goes on where it was. With
--no-follow castrad is not started, and with --cursor-file each run shows what
the one before has not.

Exit codes: 0 at the end, also by Ctrl-C or when the reader has gone; 1 when it
failed, 5 when castrad is not to be had.`,
		Example: `  castractl bus tail --vm web1
  castractl bus tail --topic 'orders.*' --since -1h -o json | jq .payload
  castractl bus tail --since yesterday --until today
  castractl bus tail --no-follow --cursor-file seen -o json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			req, err := o.request(cmd, f.Now())
			if err != nil {
				return err
			}
			return f.runTail(cmd.Context(), &o, req)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&o.vm, "vm", "", "only what this VM published and what was sent to vm:`NAME`; host: what the host published")
	flags.StringArrayVar(&o.topics, "topic", nil, "only topics that match `PATTERN`; may be repeated")
	flags.StringVarP(&o.lines, "lines", "n", "10", "begin with the last `N` records (of those from --from or --since on), or with \"all\"")
	flags.Var(&o.from, "from", "begin with the record of number `SEQ`")
	flags.StringVar(&o.since, "since", "", "begin with the first record at or after `T`")
	flags.StringVar(&o.until, "until", "", "leave out records after `T`, and end there")
	flags.StringVar(&o.cursorFile, "cursor-file", "", "begin after the record noted in `FILE`, if there is one, and note the last one shown")
	flags.BoolVarP(&o.follow, "follow", "f", true, "go on with new records")
	flags.BoolVar(&o.once, "no-follow", false, "end at the newest record")
	flags.StringVarP(&o.format, "output", "o", "short", "`FORMAT`: short, cat, json or json-pretty")
	flags.Lookup("from").DefValue = ""
	_ = cmd.RegisterFlagCompletionFunc("vm", f.completeVM)
	_ = cmd.RegisterFlagCompletionFunc("topic", f.completePattern)
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// seqFlag is a flag that takes a record's number.
type seqFlag uint64

func (n *seqFlag) Set(s string) error {
	seq, err := strconv.ParseUint(s, 10, 64)
	if err != nil || seq == 0 {
		return errors.New("no record's number; they count from 1, and -n begins with the last ones")
	}
	*n = seqFlag(seq)
	return nil
}
func (n *seqFlag) String() string { return strconv.FormatUint(uint64(*n), 10) }
func (n *seqFlag) Type() string   { return "SEQ" }

// request turns the flags into what the bus is asked for.
func (o *tailOptions) request(cmd *cobra.Command, now time.Time) (bus.TailRequest, error) {
	req := bus.TailRequest{Topics: o.topics, VM: o.vm}
	if err := errors.Join(
		exclusive(cmd, "follow", "no-follow"),
		exclusive(cmd, "from", "since"),
	); err != nil {
		return req, err
	}
	if o.vm != "" && o.vm != bus.HostVM {
		if err := checkName(o.vm); err != nil {
			return req, usageError(cmd, "--vm: %w", err)
		}
	}
	for _, topic := range o.topics {
		if _, err := wire.ParsePattern(topic); err != nil {
			return req, usageError(cmd, "--topic: %w", err)
		}
	}
	if !slices.Contains(formats, o.format) {
		return req, usageError(cmd, "--output: no format %q: it is short, cat, json or json-pretty", o.format)
	}
	if err := o.begin(cmd, &req, now); err != nil {
		return req, err
	}
	req.Follow = o.follow && !o.once
	if o.until != "" {
		until, err := parseMoment(o.until, now)
		if err != nil {
			return req, usageError(cmd, "--until %q: %w", o.until, err)
		}
		req.Until = until
		// What is wanted is all there already: the newest record is the end.
		req.Follow = req.Follow && until.After(now)
	}
	return req, nil
}

// begin sets where the tail begins: with --from or --since there, and with --lines
// as well at the last so many from there on, as journalctl has it.
func (o *tailOptions) begin(cmd *cobra.Command, req *bus.TailRequest, now time.Time) error {
	flags := cmd.Flags()
	if flags.Changed("since") {
		since, err := parseMoment(o.since, now)
		if err != nil {
			return usageError(cmd, "--since %q: %w", o.since, err)
		}
		req.Since = since
	}
	req.From = uint64(o.from)
	begun := req.From > 0 || !req.Since.IsZero()
	switch {
	case o.lines == "all":
		req.All = !begun
	case flags.Changed("lines"), !begun && o.until == "":
		n, err := strconv.ParseUint(o.lines, 10, 64)
		if err != nil {
			return usageError(cmd, `--lines takes a number or "all", not %q`, o.lines)
		}
		o.floor = floor{seq: req.From, time: req.Since}
		req.Lines, req.From, req.Since = n, 0, time.Time{}
	case !begun:
		// With an end alone the beginning is the record's, as journalctl has it.
		req.All = true
	}
	return nil
}

// floor is where a tail of the last records begins at the earliest.
type floor struct {
	seq  uint64
	time time.Time
}

// hides tells whether all of e, a record or a gap, lies below. A gap has no time.
func (b floor) hides(e *entry) bool {
	return max(e.Seq, e.To) < b.seq || !e.isGap() && e.Time.Before(b.time)
}

func (f *Factory) runTail(ctx context.Context, o *tailOptions, req bus.TailRequest) error {
	// Ctrl-C is how a following tail ends, and no failure; so is a reader that has
	// gone, even while there is nothing to write.
	ctx, cancel := interruptible(ctx)
	defer cancel()
	ctx, release := endWithReader(ctx, f.IO.Out)
	defer release()

	if req.VM != "" && req.VM != bus.HostVM {
		// One that was removed may have left records, so it is no error; but a slip of the
		// hand would be silence for ever.
		if st, err := f.status(ctx, Start(req.Follow), []string{req.VM}); err == nil && knows(&st, req.VM) != nil {
			f.note("no VM is named %s; what the record has of that name is shown", req.VM)
		}
	}
	t := &tailer{f: f, req: req, start: Start(req.Follow), floor: o.floor}
	show := func(ctx context.Context) error { return t.show(ctx, o.format) }
	var err error
	if o.cursorFile == "" {
		if err = t.pin(ctx); err == nil {
			err = show(ctx)
		}
	} else {
		t.cursor = &cursorFile{path: o.cursorFile}
		if err = t.resume(ctx); err == nil {
			err = t.cursor.keep(ctx, show)
		}
	}
	if errors.Is(err, context.Canceled) {
		return nil
	}
	if !req.Follow { // castrad was not to be started, and it is said why it is not there
		return f.absent(context.WithoutCancel(ctx), err)
	}
	return err
}
