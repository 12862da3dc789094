package cli

import (
	"bytes"
	"context"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/dbusclient"
)

var update = flag.Bool("update", false, "write the golden files anew")

// fakeClient is a Client of which a test says what it needs; the rest fails.
type fakeClient struct {
	t *testing.T

	publish  func(bus.PublishRequest) (uint64, error)
	waitAck  func(uint64, time.Duration) (string, error)
	tail     func(bus.TailRequest) (io.ReadCloser, error)
	status   func([]string) (bus.Status, error)
	addVM    func(bus.AddVMRequest) (bool, []byte, error)
	removeVM func(string) error
	rekeyVM  func(string) ([]byte, error)
	changed  chan struct{}
	absence  dbusclient.Absence
}

func called[F any](c *fakeClient, name string, fn *F, set bool) F {
	c.t.Helper()
	if !set {
		c.t.Fatalf("%s was called, and is not expected", name)
	}
	return *fn
}

func (c *fakeClient) Publish(_ context.Context, req bus.PublishRequest) (uint64, error) {
	return called(c, "Publish", &c.publish, c.publish != nil)(req)
}

func (c *fakeClient) WaitAck(_ context.Context, seq uint64, d time.Duration) (string, error) {
	return called(c, "WaitAck", &c.waitAck, c.waitAck != nil)(seq, d)
}

func (c *fakeClient) Tail(ctx context.Context, req bus.TailRequest) (io.ReadCloser, error) {
	r, err := called(c, "Tail", &c.tail, c.tail != nil)(req)
	if err == nil {
		context.AfterFunc(ctx, func() { _ = r.Close() })
	}
	return r, err
}

func (c *fakeClient) Describe(_ context.Context, vms ...string) (bus.Status, error) {
	return called(c, "Describe", &c.status, c.status != nil)(vms)
}

func (c *fakeClient) AddVM(_ context.Context, req bus.AddVMRequest) (bool, []byte, error) {
	return called(c, "AddVM", &c.addVM, c.addVM != nil)(req)
}

func (c *fakeClient) RemoveVM(_ context.Context, name string) error {
	return called(c, "RemoveVM", &c.removeVM, c.removeVM != nil)(name)
}

func (c *fakeClient) RekeyVM(_ context.Context, name string) ([]byte, error) {
	return called(c, "RekeyVM", &c.rekeyVM, c.rekeyVM != nil)(name)
}
func (c *fakeClient) WatchVMs(context.Context) (<-chan struct{}, error) { return c.changed, nil }
func (c *fakeClient) Absence(context.Context) dbusclient.Absence        { return c.absence }
func (c *fakeClient) Close()                                            {}

// result is how a run of castractl ended.
type result struct {
	code     int
	out, err string
}

// testNow is the factory's clock in tests.
func testNow() time.Time { return time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC) }

// run runs castractl against a fake, after each change to its factory.
func run(t *testing.T, c *fakeClient, args []string, change ...func(*Factory)) result {
	t.Helper()
	c.t = t
	var out, errs bytes.Buffer
	f := &Factory{
		IO:      Streams{In: strings.NewReader(""), Out: &out, Err: &errs},
		Version: "0.1.0",
		Dial:    func(context.Context, Start) (Client, error) { return c, nil },
		Now:     testNow,
		Proc:    fstest.MapFS{},
	}
	for _, fn := range change {
		fn(f)
	}
	code := Run(t.Context(), f, args)
	return result{code, out.String(), errs.String()}
}

// want checks the exit code, and that the output holds the given text, or
// nothing where that is empty. Errors are one line with castractl's name.
func (r result) want(t *testing.T, code int, out, errs string) {
	t.Helper()
	if r.code != code {
		t.Errorf("exit code %d, want %d; stdout %q, stderr %q", r.code, code, r.out, r.err)
	}
	if out == "" && r.out != "" || !strings.Contains(r.out, out) {
		t.Errorf("stdout is %q, want %q in it", r.out, out)
	}
	if errs == "" && r.err != "" || !strings.Contains(r.err, errs) {
		t.Errorf("stderr is %q, want %q in it", r.err, errs)
	}
	if code == 0 {
		return
	}
	lines := strings.Split(strings.TrimSuffix(r.err, "\n"), "\n")
	if last := lines[len(lines)-1]; !strings.HasPrefix(last, "castractl: ") {
		t.Errorf("the error %q does not begin with castractl's name", last)
	}
}

// golden compares got with a file of testdata/golden.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", "golden", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs; got:\n%s\nwant:\n%s", name, got, want)
	}
}

// ms is an age of that many seconds.
func ms(seconds int64) *int64 { n := seconds * 1000; return &n }

// testStatus is a host with a bit of everything.
func testStatus() bus.Status {
	st := bus.Status{
		Broker: bus.Broker{
			Faults: []bus.Fault{},
			Kind:   "host", Version: "0.1.0", State: "running", PID: 812, UptimeMS: 11_520_000,
			Listen: []string{"127.0.0.1:7070"}, LogDir: "/var/log/castra", StateDir: "/var/lib/castra",
			UnknownVMs: "reject", Sync: "always", HeadSeq: 1042, OldestSeq: 1, Sessions: 2, Registered: 4, Reachable: 2,
			Limited: map[string]uint64{"publish_rate": 7, "max_handshakes": 1200},
		},
		VMs: []bus.VM{
			{
				VM: "db1", State: "reachable", Reachable: true, Registered: true, Keyed: true,
				LastHandshakeAgeMS: ms(12), LastHeartbeatAgeMS: ms(3), BusSubscribed: false,
				Session: "sess-0123456789abcdef0123456789abcdef", RemoteAddr: "127.0.0.1:40001",
			},
			{VM: "new1", State: "unreachable", Reason: "never-seen", Registered: true, Superseded: 9, Contended: true},
			{
				VM: "the-name-of-a-machine-of-the-longest-sort-that-anybody-uses-0001", State: "unreachable", Reason: "silent",
				Registered: true, LastHandshakeAgeMS: ms(3 * 86400), LastPublishAgeMS: ms(200 * 86400), LastHeartbeatAgeMS: ms(47*3600 + 59*60),
			},
			{
				VM: "web1", State: "reachable", Reachable: true, Registered: true, Keyed: true,
				LastHandshakeAgeMS: ms(3*3600 + 120), LastPublishAgeMS: ms(61), LastHeartbeatAgeMS: ms(0),
				BusSubscribed: true, Subscriptions: []string{"broadcast", "vm:web1", "orders.>"},
				Session: "sess-fedcba9876543210fedcba9876543210", RemoteAddr: "127.0.0.1:40002", Capabilities: []string{"bus-v1", "auth-hmac-v1"},
				Lag: 2, Published: 77, Forwards: []string{"tcp:2222:22"},
			},
		},
		Refused: []bus.Refused{
			{VM: "web9", Reason: "unknown-vm", AgeMS: 240_000},
			{VM: "web1", Reason: "auth-failed", AgeMS: 4_000},
			{VM: "evil\x1b[31m;$(reboot)\u009b", Reason: "invalid-name", AgeMS: 59_000},
			{VM: "Host", Reason: "reserved-identity", AgeMS: 1_000},
		},
	}
	for i := range st.VMs {
		for _, list := range []*[]string{&st.VMs[i].Subscriptions, &st.VMs[i].Capabilities, &st.VMs[i].Forwards} {
			if *list == nil {
				*list = []string{}
			}
		}
	}
	return st
}

// withStatus is a fake that answers with testStatus, the named VMs of it.
func withStatus() *fakeClient {
	return &fakeClient{status: func(names []string) (bus.Status, error) {
		st := testStatus()
		if len(names) == 0 {
			return st, nil
		}
		var kept []bus.VM
		for _, name := range names {
			if vm := findVM(&st, name); vm != nil {
				kept = append(kept, *vm)
			}
		}
		st.VMs = kept
		return st, nil
	}}
}
