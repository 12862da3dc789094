package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/dbusclient"
)

// maxLine bounds one line of the stream: a record is a frame of at most 64 KiB
// with a few members added.
const maxLine = 128 << 10 // bytes

// A following tail outlives a restart of castrad by trying again, after firstRetry
// and then twice as long each time up to lastRetry, and gives up after patience.
const (
	firstRetry = 100 * time.Millisecond
	lastRetry  = 2 * time.Second
	patience   = 30 * time.Second
)

// entry is one line of the stream: a record; with Type "gap", records that are
// gone; with Type "error", why the stream ends here.
type entry struct {
	Type    string          `json:"type"`
	Seq     uint64          `json:"seq"`
	Time    time.Time       `json:"time"`
	VM      string          `json:"vm"`
	Topic   string          `json:"topic"`
	Payload json.RawMessage `json:"payload"`
	From    uint64          `json:"from"`
	To      uint64          `json:"to"`
	Code    bus.Code        `json:"code"`
	Reason  string          `json:"reason"`

	line []byte // as it came, without its line end
}

func (e *entry) isGap() bool { return e.Type == "gap" }

// tailer shows a stream of records, and goes on where it left off when castrad
// was restarted under it.
type tailer struct {
	f      *Factory
	req    bus.TailRequest
	cursor *cursorFile // nil: none
	floor  floor       // below it nothing is shown

	start   Start
	started bool // a stream has been open

	out    *bufio.Writer
	format formatter
	last   uint64 // everything up to here is shown, filtered out or reported gone
}

// resume begins after the record that the cursor file notes.
func (t *tailer) resume(ctx context.Context) error {
	seq, err := t.cursor.load()
	if err != nil || seq == 0 {
		return err
	}
	t.floor = floor{}
	return t.goOnAfter(ctx, seq, t.cursor.path+" notes")
}

// goOnAfter begins after record seq, or where the log ends before it: after its end.
func (t *tailer) goOnAfter(ctx context.Context, seq uint64, says string) error {
	b, err := t.f.broker(ctx, t.start)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return err
	}
	newest, known := b.HeadSeq, true
	if b.Kind == kindGuest {
		newest, known = t.newestInGuest(ctx)
	}
	if known && seq > newest {
		// The log was restored or begun anew. Waiting for that number to come round
		// would hide every record until then.
		t.f.note("%s record %d, but the newest is %d: going on with what is new", says, seq, newest)
		seq = newest
	}
	t.beginAfter(seq)
	return nil
}

// newestInGuest gives the number of the newest record on the tail's topics, where there
// is one: castra-guestd itself knows what it was sent, and not where the host's log ends.
func (t *tailer) newestInGuest(ctx context.Context) (seq uint64, known bool) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	client, err := t.f.Client(ctx, t.start)
	if err != nil {
		return 0, false
	}
	records, err := client.Tail(ctx, bus.TailRequest{Topics: t.req.Topics, Lines: 1})
	if err != nil {
		return 0, false
	}
	defer records.Close()
	var e entry
	if json.NewDecoder(records).Decode(&e) != nil || e.Type != "" {
		return 0, false // none, or the host is away
	}
	return e.Seq, true
}

// pin gives a tail of what is new the number that it begins with: should castrad be
// restarted before there is anything to show, what was published meanwhile is new too.
func (t *tailer) pin(ctx context.Context) error {
	if r := &t.req; !r.Follow || r.Lines > 0 || r.All || r.From > 0 || !r.Since.IsZero() {
		return nil
	}
	b, err := t.f.broker(ctx, t.start)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err == nil && b.Kind != kindGuest {
		t.beginAfter(b.HeadSeq)
	}
	return err
}

func (t *tailer) beginAfter(seq uint64) {
	t.last = seq
	t.req.From, t.req.Lines, t.req.All, t.req.Since = seq+1, 0, false, time.Time{}
}

// show prints records in a format until the stream is over, ctx is done or the
// reader has gone.
func (t *tailer) show(ctx context.Context, format string) error {
	run := func(w io.Writer) error {
		t.out = bufio.NewWriter(w)
		t.format = newFormatter(format, t.f)
		return t.run(ctx)
	}
	if t.req.Follow {
		return run(t.f.IO.Out) // a pager would have to be left before it shows what is new
	}
	return t.f.paged(run)
}

// run streams, and once it has, again and again while castrad comes back.
func (t *tailer) run(ctx context.Context) error {
	wait, deadline := firstRetry, time.Now().Add(patience)
	for {
		began := time.Now()
		open, err := t.stream(ctx)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil && !goneAway(err), !t.req.Follow, t.pastUntil(), !t.started && !open:
			return err
		case open:
			t.f.note("-- the daemon has gone; waiting for it to come back --")
			deadline = time.Now().Add(patience)
		case time.Now().After(deadline):
			return err
		}
		if time.Since(began) > lastRetry {
			wait = firstRetry
		}
		// castrad is not started a second time: whoever stopped it meant it.
		t.started, t.start = true, NoStart
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait):
		}
		wait = min(2*wait, lastRetry)
		t.f.Close()
	}
}

// goneAway tells whether err is castrad's absence, which may pass.
func goneAway(err error) bool {
	if refusal, ok := errors.AsType[*bus.Error](err); ok {
		return refusal.Code == bus.CodeShuttingDown
	}
	return errors.Is(err, dbusclient.ErrNotRunning) || errors.Is(err, dbusclient.ErrNoBus) || errors.Is(err, io.ErrUnexpectedEOF)
}

func (t *tailer) pastUntil() bool {
	return !t.req.Until.IsZero() && !t.f.Now().Before(t.req.Until)
}

// stream shows one stream to its end; open tells whether it had begun.
func (t *tailer) stream(ctx context.Context) (open bool, err error) {
	if t.started && t.last > 0 {
		if err := t.goOnAfter(ctx, t.last, "shown is"); err != nil {
			return false, err
		}
	}
	client, err := t.f.Client(ctx, t.start)
	if err != nil {
		return false, err
	}
	// The context is the stream's as well, so the call's deadline is a timer's.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	deadline := time.AfterFunc(t.f.answerTime(), func() { cancel(context.DeadlineExceeded) })
	records, err := client.Tail(ctx, t.req)
	if !deadline.Stop() {
		err = context.DeadlineExceeded
	}
	if err != nil {
		return false, fmt.Errorf("tailing: %w", err)
	}
	defer records.Close()
	return true, t.copy(bufio.NewReaderSize(records, maxLine))
}

// copy prints lines until there are no more.
func (t *tailer) copy(in *bufio.Reader) error {
	for {
		line, err := in.ReadSlice('\n')
		switch {
		case err == nil:
			err = t.print(line[:len(line)-1])
		case errors.Is(err, io.EOF) && len(line) == 0:
			return t.flush()
		case errors.Is(err, io.EOF):
			err = io.ErrUnexpectedEOF // the record comes whole with the next stream
		case errors.Is(err, bufio.ErrBufferFull):
			err = fmt.Errorf("a record of over %d bytes came; is castrad of this version? see: castractl version", maxLine)
		}
		if err == nil && in.Buffered() == 0 {
			err = t.flush()
		}
		if err != nil {
			if ferr := t.flush(); !errors.Is(err, ferr) { // which a failed write leaves as it was
				err = errors.Join(err, ferr)
			}
			return err
		}
	}
}

func (t *tailer) print(line []byte) error {
	e := entry{line: line}
	if err := json.Unmarshal(line, &e); err != nil {
		return fmt.Errorf("reading a record: %w; is castrad of this version? see: castractl version", err)
	}
	if e.Type == "error" {
		return &bus.Error{Code: e.Code, Reason: e.Reason}
	}
	t.last = max(t.last, e.Seq, e.To)
	if t.floor.hides(&e) {
		return nil
	}
	return t.format(t.out, &e)
}

// flush hands over what was formatted, and only then counts it as shown.
func (t *tailer) flush() error {
	if err := t.out.Flush(); err != nil {
		return err
	}
	if t.cursor != nil && t.last > 0 {
		t.cursor.shown.Store(t.last)
	}
	return nil
}
