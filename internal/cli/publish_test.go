package cli

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/dbusclient"
	"github.com/castrabus/castra/internal/wire"
)

func TestPublish(t *testing.T) {
	file := filepath.Join(t.TempDir(), "payload")
	if err := os.WriteFile(file, []byte("{\n  \"from\": \"file\"\n}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args []string
		want bus.PublishRequest
	}{
		"argument":   {[]string{`{"a": 1.50}`}, bus.PublishRequest{Topic: "broadcast", Payload: []byte(`{"a":1.50}`)}},
		"flag":       {[]string{"--payload", "-5"}, bus.PublishRequest{Topic: "broadcast", Payload: []byte("-5")}},
		"input":      {[]string{"-"}, bus.PublishRequest{Topic: "broadcast", Payload: []byte(`"from input"`)}},
		"file":       {[]string{"@" + file}, bus.PublishRequest{Topic: "broadcast", Payload: []byte(`{"from":"file"}`)}},
		"flag input": {[]string{"--payload=-"}, bus.PublishRequest{Topic: "broadcast", Payload: []byte(`"from input"`)}},
		"all flags": {
			[]string{"--topic", "orders.new", "--id", "7", "--reply", "answers", "null"},
			bus.PublishRequest{Topic: "orders.new", ID: "7", Reply: "answers", Payload: []byte("null")},
		},
		"vm": {[]string{"--vm", "web1", "1"}, bus.PublishRequest{Topic: "vm:web1", Payload: []byte("1")}},
	} {
		t.Run(name, func(t *testing.T) {
			client := withStatus()
			var got bus.PublishRequest
			client.publish = func(req bus.PublishRequest) (uint64, error) {
				got = req
				return 42, nil
			}
			r := run(t, client, append([]string{"bus", "publish"}, c.args...), func(f *Factory) {
				f.IO.In = strings.NewReader("  \"from input\" \n")
			})
			r.want(t, 0, "", "")
			if got.Topic != c.want.Topic || got.ID != c.want.ID || got.Reply != c.want.Reply || string(got.Payload) != string(c.want.Payload) {
				t.Errorf("published %+v (%s), want %+v (%s)", got, got.Payload, c.want, c.want.Payload)
			}
		})
	}
}

func TestPublishUsage(t *testing.T) {
	for _, c := range []struct {
		args string
		err  string
	}{
		{"", "what is to be published?"},
		{"1 2", "one word too many"},
		{"--payload 1 2", "given twice"},
		{"--topic a --vm b 1", "exclude each other"},
		{"--topic a=b 1", "no topic"},
		{"--topic vm: 1", "no topic"},
		{"--topic= 1", "--topic is given, but empty"},
		{"--vm= 1", "--vm is given, but empty"},
		{"--reply= 1", "--reply is given, but empty"},
		{"--payload=", "--payload is given, but empty"},
		{"--reply a=b 1", "no topic"},
		{"--vm a=b 1", "no VM name"},
		{"--vm host 1", "host's own name"},
		{"--id " + strings.Repeat("x", 129) + " 1", "--id takes"},
		{"--wait-ack soon 1", "invalid argument"},
		{"{", "not JSON"},
		{"-", "the payload is empty"},
		{"hello", "text needs its own quotes"},
		{`{"a":1}{}`, "not JSON"},
		{"--rows 1", "unknown flag"},
		{"--lines --id 7 1", "exclude each other"},
	} {
		r := run(t, &fakeClient{}, append([]string{"bus", "publish"}, strings.Fields(c.args)...))
		r.want(t, ExitUsage, "", c.err)
		if n := strings.Count(r.err, "\n"); n != 1 {
			t.Errorf("%q: %d lines on stderr: %q", c.args, n, r.err)
		}
	}
}

func TestPublishAnswers(t *testing.T) {
	answer := func(seq uint64, err error) *fakeClient {
		c := withStatus()
		c.publish = func(bus.PublishRequest) (uint64, error) { return seq, err }
		return c
	}
	args := func(extra ...string) []string { return append([]string{"bus", "publish", "1"}, extra...) }

	run(t, answer(42, nil), args("--print-seq")).want(t, 0, "42\n", "")
	run(t, answer(42, nil), args(), func(f *Factory) { f.IO.Terminal = true }).want(t, 0, "record 42 on broadcast\n", "")
	run(t, answer(42, nil), args("-q"), func(f *Factory) { f.IO.Terminal = true }).want(t, 0, "", "")
	run(t, answer(0, nil), args()).want(t, 0, "", "queued")
	run(t, answer(0, nil), args("-q")).want(t, 0, "", "")
	run(t, answer(0, nil), args("--print-seq", "-q")).want(t, 0, "0\n", "")
	run(t, answer(0, dbusclient.ErrNotRunning), args()).want(t, ExitNoCastrad, "", "daemon not running")
	run(t, answer(0, errors.New("broken\n\x1b[31m")), args()).want(t, ExitFailed, "", `broken \u001b[31m`)
	for code, want := range map[bus.Code]int{
		bus.CodeRateLimited: ExitFailed, bus.CodeStorageFull: ExitFailed, bus.CodeStorageStalled: ExitFailed,
		bus.CodeTooLarge: ExitFailed, bus.CodeShuttingDown: ExitFailed, bus.CodeAccessDenied: ExitFailed,
		bus.CodeBadTopic: ExitUsage, bus.CodeInvalidArg: ExitUsage, bus.CodeNoSuchVM: ExitNoSuchVM, bus.CodeForbidden: ExitFailed,
	} {
		run(t, answer(0, bus.Errorf(code, "the reason")), args()).want(t, want, "", string(code)+": the reason")
	}
}

func TestPublishToVM(t *testing.T) {
	args := []string{"bus", "publish", "--vm", "nobody", "1"}
	run(t, withStatus(), args).want(t, ExitNoSuchVM, "", "no VM is named nobody")
	for _, b := range []bus.Broker{{Kind: "host", UnknownVMs: "accept"}, {Kind: "guest", UnknownVMs: "reject"}} {
		c := &fakeClient{
			status:  func([]string) (bus.Status, error) { return bus.Status{Broker: b}, nil },
			publish: func(bus.PublishRequest) (uint64, error) { return 1, nil },
		}
		run(t, c, args).want(t, 0, "", "")
	}
}

func TestPublishWaitAck(t *testing.T) {
	c := withStatus()
	c.publish = func(bus.PublishRequest) (uint64, error) { return 42, nil }
	c.waitAck = func(seq uint64, timeout time.Duration) (string, error) {
		if seq != 42 || timeout != 5*time.Second {
			t.Errorf("waits for record %d, %v", seq, timeout)
		}
		return "web1", nil
	}
	args := []string{"bus", "publish", "--vm", "web1", "--wait-ack", "5s", "1"}
	run(t, c, args).want(t, 0, "", "")
	run(t, c, args, func(f *Factory) { f.IO.Terminal = true }).want(t, 0, "acknowledged by web1\n", "")
	c.waitAck = func(uint64, time.Duration) (string, error) { return "", bus.Errorf(bus.CodeNoAck, "none") }
	run(t, c, args).want(t, ExitUnreachable, "", "record 42 is stored, but no guest acknowledged it within 5s")
	for _, args := range [][]string{args, {"bus", "publish", "--wait-ack", "5s", "1"}} {
		c := &fakeClient{
			status: func([]string) (bus.Status, error) { return bus.Status{Broker: bus.Broker{Kind: "guest"}}, nil },
			publish: func(bus.PublishRequest) (uint64, error) {
				t.Error("published, though nobody can wait here")
				return 1, nil
			},
		}
		run(t, c, args).want(t, ExitFailed, "", "nothing was published: only the host knows")
	}
}

func TestPublishTooMuchInput(t *testing.T) {
	r := run(t, &fakeClient{}, []string{"bus", "publish", "-"}, func(f *Factory) {
		f.IO.In = strings.NewReader(strings.Repeat(" ", maxInput+1))
	})
	r.want(t, ExitFailed, "", "over 16 MiB")
	run(t, &fakeClient{}, []string{"bus", "publish", `"` + strings.Repeat("x", wire.MaxPayload) + `"`}).want(t, ExitFailed, "", "too-large: the payload takes 61442 bytes")
	run(t, &fakeClient{}, []string{"bus", "publish", "@/nonexistent/file"}).want(t, ExitFailed, "", "no such file")
}
