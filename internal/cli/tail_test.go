package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/castrabus/castra/internal/bubble"
	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/dbusclient"
)

// record is a line of the stream.
func record(seq int, payload string) string {
	return fmt.Sprintf(`{"seq":%d,"time":"2026-03-04T05:06:07.123456Z","vm":"web1","topic":"t.x","payload":%s}`+"\n", seq, payload)
}

const gap = `{"type":"gap","from":3,"to":7}` + "\n"

// streams is a fake whose tails are the given texts, one after the other, then
// err; it keeps what was asked.
func streams(asked *[]bus.TailRequest, err error, texts ...string) *fakeClient {
	c := withStatus()
	c.tail = func(req bus.TailRequest) (io.ReadCloser, error) {
		*asked = append(*asked, req)
		if len(texts) == 0 {
			return nil, err
		}
		text := texts[0]
		texts = texts[1:]
		return io.NopCloser(strings.NewReader(text)), nil
	}
	return c
}

func TestTailRequests(t *testing.T) {
	now := testNow()
	for args, want := range map[string]bus.TailRequest{
		"":                                    {Lines: 10, Follow: true},
		"-f":                                  {Lines: 10, Follow: true},
		"--no-follow":                         {Lines: 10},
		"--follow=false":                      {Lines: 10},
		"-n 3":                                {Lines: 3, Follow: true},
		"-n 0":                                {From: 1043, Follow: true}, // the newest is 1042
		"-n all --no-follow":                  {All: true},
		"--from 7 -f":                         {From: 7, Follow: true},
		"--from 7 -n all":                     {From: 7, Follow: true},
		"--from 7 -n 3":                       {Lines: 3, Follow: true},
		"--since -1h -n all":                  {Since: now.Add(-time.Hour), Follow: true},
		"--since -1h -n 3":                    {Lines: 3, Follow: true},
		"--since -1h":                         {Since: now.Add(-time.Hour), Follow: true},
		"--since yesterday --until today":     {Since: time.Date(2026, 3, 3, 0, 0, 0, 0, time.UTC), Until: time.Date(2026, 3, 4, 0, 0, 0, 0, time.UTC)},
		"--until +1h":                         {All: true, Until: now.Add(time.Hour), Follow: true},
		"--until now":                         {All: true, Until: now},
		"--until now -n 5":                    {Lines: 5, Until: now},
		"--vm web1 --topic a.* --topic vm:>":  {VM: "web1", Topics: []string{"a.*", "vm:>"}, Lines: 10, Follow: true},
		"--vm host":                           {VM: "host", Lines: 10, Follow: true},
		"--topic castra.presence --no-follow": {Topics: []string{"castra.presence"}, Lines: 10},
	} {
		var asked []bus.TailRequest
		run(t, streams(&asked, errors.New("done")), append([]string{"bus", "tail"}, strings.Fields(args)...)).want(t, ExitFailed, "", "done")
		if len(asked) != 1 || fmt.Sprint(asked[0]) != fmt.Sprint(want) {
			t.Errorf("%q asks for %+v, want %+v", args, asked, want)
		}
	}
}

func TestTailUsage(t *testing.T) {
	for args, want := range map[string]string{
		"web1":                 "one word too many",
		"-n some":              "--lines takes",
		"-n -1":                "--lines takes",
		"--from 0":             "count from 1",
		"--from x":             "invalid argument",
		"--since now --from 1": "exclude each other",
		"--from 1 -n some":     "--lines takes",
		"--since soon":         "no moment",
		"--until soon":         "no moment",
		"-f --no-follow":       "exclude each other",
		"-o xml":               "no format",
		"--vm a=b":             "no VM name",
		"--topic a*":           "--topic",
		"--topic a.>.b":        "--topic",
		"--cursor-file":        "needs an argument",
		"--cursor-file=":       "--cursor-file is given, but empty",
		"--vm=":                "--vm is given, but empty",
		"--until=":             "--until is given, but empty",
		"--since now --from":   "needs an argument",
	} {
		run(t, &fakeClient{}, append([]string{"bus", "tail"}, strings.Fields(args)...)).want(t, ExitUsage, "", want)
	}
}

func TestTailFormats(t *testing.T) {
	t.Setenv("TZ", "UTC")
	nasty := record(2, `{"a":"\u001b[31m`+"\x7f\u009b"+`"}`)
	text := record(1, `{"n":12345678901234567890.10}`) + nasty + gap + record(8, "null")
	stamp := testNow().Add(123456 * time.Microsecond).Local().Format("Jan 02 15:04:05.000")
	for format, want := range map[string]string{
		"short": stamp + ` web1 t.x: {"n":12345678901234567890.10}` + "\n" +
			stamp + ` web1 t.x: {"a":"\u001b[31m\u007f\u009b"}` + "\n" +
			"-- gap: records 3 to 7 are gone --\n" +
			stamp + " web1 t.x: null\n",
		"cat":  `{"n":12345678901234567890.10}` + "\n" + `{"a":"\u001b[31m\u007f\u009b"}` + "\nnull\n",
		"json": text,
	} {
		var asked []bus.TailRequest
		r := run(t, streams(&asked, nil, text), []string{"bus", "tail", "--no-follow", "-o", format})
		if r.code != 0 || r.out != want {
			t.Errorf("-o %s, exit code %d:\n%q\nwant\n%q", format, r.code, r.out, want)
		}
		if gapSaid := strings.Contains(r.err, "records 3 to 7 are gone"); gapSaid != (format == "cat") {
			t.Errorf("-o %s: stderr %q", format, r.err)
		}
	}
	var asked []bus.TailRequest
	r := run(t, streams(&asked, nil, record(1, `{"a":[1,2]}`)), []string{"bus", "tail", "--no-follow", "-o", "json-pretty"})
	r.want(t, 0, "  \"payload\": {\n    \"a\": [\n      1,\n", "")
}

// The last N of those from a record or a moment on.
func TestTailLinesFrom(t *testing.T) {
	late := strings.Replace(record(9, "1"), "05:06:07", "05:06:08", 1)
	text := record(1, "1") + record(2, "1") + gap + record(8, "1") + late
	for args, want := range map[string]string{
		"--from 2":                            record(2, "1") + gap + record(8, "1") + late,
		"--from 4":                            gap + record(8, "1") + late,
		"--from 8":                            record(8, "1") + late,
		"--from 10":                           "",
		"--since 2026-03-04T05:06:08Z":        gap + late,
		"--since 2026-03-04T05:06:07.123456Z": text,
	} {
		var asked []bus.TailRequest
		r := run(t, streams(&asked, nil, text), append([]string{"bus", "tail", "--no-follow", "-o", "json", "-n", "5"}, strings.Fields(args)...))
		if r.code != 0 || r.out != want {
			t.Errorf("%s, exit code %d:\n%s\nwant\n%s", args, r.code, r.out, want)
		}
	}
}

func TestTailBadStreams(t *testing.T) {
	for name, c := range map[string]struct{ text, err string }{
		"not JSON":   {record(1, "1") + "garbage\n", "reading a record"},
		"a long one": {record(1, "1") + strings.Repeat("x", maxLine+1), "over 131072 bytes"},
		"half a one": {record(1, "1") + `{"seq":2,`, "unexpected EOF"},
		"an error":   {record(1, "1") + `{"type":"error","code":"internal","reason":"the disk broke"}` + "\n", "internal: the disk broke"},
	} {
		t.Log(name)
		var asked []bus.TailRequest
		r := run(t, streams(&asked, nil, c.text), []string{"bus", "tail", "--no-follow", "-o", "json"})
		r.want(t, ExitFailed, record(1, "1"), c.err)
	}
}

// A following tail goes on after the last record shown when castrad restarts, and
// ends when it does not come back.
func TestTailOutlivesRestart(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		var asked []bus.TailRequest
		c := streams(&asked, dbusclient.ErrNotRunning,
			record(1, "1")+record(2, "2"),
			`{"type":"error","code":"shutting-down","reason":"bye"}`+"\n",
			gap+`{"seq":8,"ti`, // cut off in the middle of a record
			record(8, "8"),
		)
		began := time.Now()
		var starts []Start
		r := run(t, c, []string{"bus", "tail", "-o", "json", "--vm", "web1"}, func(f *Factory) {
			dial := f.Dial
			f.Dial = func(ctx context.Context, start Start) (Client, error) {
				starts = append(starts, start)
				return dial(ctx, start)
			}
		})
		r.want(t, ExitNoCastrad, record(1, "1")+record(2, "2")+gap+record(8, "8"), "daemon not running")
		if !strings.Contains(r.err, "the daemon has gone") {
			t.Errorf("the break is not said: %q", r.err)
		}
		if starts[0] != MayStart || slices.Contains(starts[1:], MayStart) {
			t.Errorf("a castrad that was stopped is started again: %v", starts)
		}
		for i, from := range []uint64{0, 3, 3, 8, 9} {
			if asked[i].From != from || asked[i].VM != "web1" || (asked[i].Lines > 0) != (i == 0) {
				t.Errorf("request %d: %+v, want from %d", i, asked[i], from)
			}
		}
		if took := time.Since(began); took < patience || took > patience+2*lastRetry {
			t.Errorf("gave up after %v", took)
		}
	})
}

// A castrad that comes back with a log begun anew, which ends at 1042, has new records
// to show all the same.
func TestTailOutlivesItsLog(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		var asked []bus.TailRequest
		c := streams(&asked, dbusclient.ErrNotRunning, record(5000, "1"), record(1043, "2"))
		r := run(t, c, []string{"bus", "tail", "-o", "json"})
		r.want(t, ExitNoCastrad, record(5000, "1")+record(1043, "2"), "shown is record 5000, but the newest is 1042")
		if asked[1].From != 1043 {
			t.Errorf("went on from %d", asked[1].From)
		}
	})
}

func TestTailWithoutCastrad(t *testing.T) {
	var asked []bus.TailRequest
	run(t, streams(&asked, dbusclient.ErrNotRunning), []string{"bus", "tail"}).want(t, ExitNoCastrad, "", "daemon not running")
	run(t, streams(&asked, bus.Errorf(bus.CodeAccessDenied, "not you")), []string{"bus", "tail"}).want(t, ExitFailed, "", "access-denied: not you")
}

type brokenPipe struct{}

func (brokenPipe) Write([]byte) (int, error) { return 0, syscall.EPIPE }

func TestTailClosedPipe(t *testing.T) {
	cursor := filepath.Join(t.TempDir(), "cursor")
	for _, flags := range [][]string{{}, {"--no-follow"}, {"--cursor-file", cursor}} {
		var asked []bus.TailRequest
		r := run(t, streams(&asked, nil, record(1, "1")), append([]string{"bus", "tail"}, flags...), func(f *Factory) { f.IO.Out = brokenPipe{} })
		r.want(t, ExitDone, "", "")
	}
	wantNoFile(t, cursor) // what nobody read was not shown
}

// The reader of the pipe goes while there is nothing to write.
func TestTailEndsWithItsReader(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	silent, end := io.Pipe()
	defer end.Close()
	c := withStatus()
	c.tail = func(bus.TailRequest) (io.ReadCloser, error) {
		_ = r.Close()
		return silent, nil
	}
	run(t, c, []string{"bus", "tail"}, func(f *Factory) { f.IO.Out = w }).want(t, ExitDone, "", "")
}

func TestTailInterrupted(t *testing.T) {
	silent, end := io.Pipe()
	defer end.Close()
	c := withStatus()
	c.tail = func(bus.TailRequest) (io.ReadCloser, error) {
		return silent, syscall.Kill(os.Getpid(), syscall.SIGINT)
	}
	run(t, c, []string{"bus", "tail"}).want(t, ExitDone, "", "")
}

func TestTailCursor(t *testing.T) {
	cursor := filepath.Join(t.TempDir(), "cursor")
	tail := func(text string, flags ...string) (result, bus.TailRequest) {
		var asked []bus.TailRequest
		r := run(t, streams(&asked, nil, text), append([]string{"bus", "tail", "--no-follow", "-o", "json", "--cursor-file", cursor}, flags...))
		return r, append(asked, bus.TailRequest{})[0]
	}
	noted := func(want string) {
		t.Helper()
		if got, err := os.ReadFile(cursor); err != nil || string(got) != want {
			t.Errorf("the cursor is %q (%v), want %q", got, err, want)
		}
	}
	if _, req := tail(record(1, "1")+record(2, "2"), "-n", "all"); !req.All {
		t.Errorf("without a file the other flags count: %+v", req)
	}
	noted("2\n")
	if _, req := tail(gap, "-n", "all"); req.All || req.From != 3 {
		t.Errorf("goes on after the cursor: %+v", req)
	}
	noted("7\n")
	if _, req := tail(""); req.From != 8 {
		t.Errorf("goes on after the gap: %+v", req)
	}
	noted("7\n")

	// castrad's log ends at 1042: the cursor is from another one.
	if err := os.WriteFile(cursor, []byte("5000\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if r, req := tail(record(1043, "1")); req.From != 1043 || !strings.Contains(r.err, "notes record 5000, but the newest is 1042") {
		t.Errorf("a cursor past the end: %+v, stderr %q", req, r.err)
	}
	noted("1043\n")

	for _, text := range []string{"", "\n"} {
		if err := os.WriteFile(cursor, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, req := tail(""); req.Lines != 10 {
			t.Errorf("an empty file: %+v", req)
		}
	}
	if err := os.WriteFile(cursor, []byte("s=abc;i=1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	r, _ := tail("")
	r.want(t, ExitFailed, "", "holds no record number")
	noted("s=abc;i=1\n")

	cursor = filepath.Join(t.TempDir(), "no", "such", "place")
	r, _ = tail(record(1, "1"))
	r.want(t, ExitFailed, "", "choose another place with --cursor-file") // and nothing is shown that would come again
}

// The file is replaced at each save, which must befall no device, no pipe and no link.
func TestTailCursorIsAFile(t *testing.T) {
	dir := t.TempDir()
	tail := func(cursor string) result {
		var asked []bus.TailRequest
		return run(t, streams(&asked, nil, record(2, "1")), []string{"bus", "tail", "--no-follow", "-o", "json", "--cursor-file", cursor})
	}
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	toPipe := filepath.Join(dir, "to-pipe")
	toFile, file := filepath.Join(dir, "to-file"), filepath.Join(dir, "file")
	if err := errors.Join(os.Symlink(pipe, toPipe), os.Symlink(file, toFile), os.WriteFile(file, []byte("1\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, cursor := range []string{pipe, toPipe, dir} {
		tail(cursor).want(t, ExitFailed, "", "no regular file")
		if info, err := os.Lstat(pipe); err != nil || info.Mode().IsRegular() {
			t.Fatalf("--cursor-file %s replaced it", cursor)
		}
	}
	tail(toFile).want(t, ExitDone, record(2, "1"), "")
	if got, err := os.ReadFile(file); err != nil || string(got) != "2\n" {
		t.Errorf("the file that the link leads to holds %q (%v)", got, err)
	}
	if target, err := os.Readlink(toFile); err != nil || target != file {
		t.Errorf("the link leads to %q (%v)", target, err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
		t.Errorf("files are left behind: %q", left)
	}
}

// In a guest, whose daemon does not know where the host's log ends, a cursor past its end
// is found by what there is to show.
func TestTailCursorInGuest(t *testing.T) {
	cursor := filepath.Join(t.TempDir(), "cursor")
	for name, tt := range map[string]struct {
		newest string
		from   uint64
	}{
		"the same log":  {record(70, "1"), 51},
		"another log":   {record(7, "1"), 8},
		"no record":     {"", 51},
		"no host":       {`{"type":"error","code":"not-connected","reason":"x"}` + "\n", 51},
		"a gap at most": {gap, 51},
	} {
		if err := os.WriteFile(cursor, []byte("50\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		var asked []bus.TailRequest
		c := streams(&asked, nil, tt.newest, "")
		status := c.status
		c.status = func(names []string) (bus.Status, error) {
			st, err := status(names)
			st.Broker.Kind, st.Broker.HeadSeq = kindGuest, 0
			return st, err
		}
		run(t, c, []string{"bus", "tail", "--no-follow", "--cursor-file", cursor, "--topic", "a.>"})
		if len(asked) != 2 || asked[0].Lines != 1 || asked[0].Topics[0] != "a.>" || asked[1].From != tt.from {
			t.Errorf("%s: asked for %+v, want from %d", name, asked, tt.from)
		}
	}
}

// While following, the cursor is noted within a second of what was shown.
func TestTailCursorWhileFollowing(t *testing.T) {
	cursor := filepath.Join(t.TempDir(), "cursor")
	bubble.Test(t, func(t *testing.T) {
		records, bus1 := io.Pipe()
		c := withStatus()
		c.tail = func(bus.TailRequest) (io.ReadCloser, error) { return records, nil }
		done := make(chan result, 1) // one result
		go func() {
			done <- run(t, c, []string{"bus", "tail", "-o", "json", "--cursor-file", cursor, "--until", "+1s"})
		}()
		_, _ = io.WriteString(bus1, record(5, "5"))
		time.Sleep(cursorInterval + time.Millisecond)
		synctest.Wait()
		if got, err := os.ReadFile(cursor); err != nil || string(got) != "5\n" {
			t.Errorf("the cursor is %q (%v) while following", got, err)
		}
		_ = bus1.CloseWithError(errors.New("the end"))
		if r := <-done; r.code != ExitFailed {
			t.Errorf("%+v", r)
		}
	})
}
