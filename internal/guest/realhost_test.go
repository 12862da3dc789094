package guest

import (
	"context"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/broker"
	"github.com/castrabus/castra/internal/bus"
	registry "github.com/castrabus/castra/internal/identity"
	"github.com/castrabus/castra/internal/presence"
	"github.com/castrabus/castra/internal/reserve"
	"github.com/castrabus/castra/internal/wire"
)

// realHost is castrad's broker on a directory of its own, which can be stopped and
// started again.
type realHost struct {
	*broker.Broker
	t    *testing.T
	dir  string
	addr string
	rate presence.Rate
}

func newRealHost(t *testing.T) *realHost {
	t.Helper()
	h := &realHost{t: t, dir: t.TempDir(), addr: fmt.Sprint("127.0.0.1:", reserve.Port(t)), rate: presence.Rate{Records: 1e6, Burst: 1e6, Bytes: 1e9}}
	h.open()
	h.serve()
	t.Cleanup(func() { _ = h.Close() })
	return h
}

func (h *realHost) open() {
	h.t.Helper()
	reg, problems, err := registry.Open(h.dir+"/state/vms", h.dir+"/vms.d")
	if err != nil || len(problems) > 0 {
		h.t.Fatal(err, problems)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	shared, err := wire.ParsePattern("shared.>")
	if err != nil {
		h.t.Fatal(err)
	}
	h.Broker, err = broker.Open(broker.Options{
		Version: "test", StateDir: h.dir + "/state", LogDir: h.dir + "/log", Registry: reg, Log: log,
		SyncName: "never", SyncEvery: -1, SegmentSize: 1 << 20, HostRetention: 1 << 30, VMRetention: 8 << 20, MaxHandshakes: 100,
		Settings: broker.Settings{
			AcceptUnknown: true, GuestTopics: []wire.Pattern{shared},
			HandshakeTimeout: 5 * time.Second, SessionTimeout: time.Minute, ReachableWithin: 45 * time.Second,
			MaxSessions: 100, MaxVMs: 100, MaxSubscriptions: 16, Rate: h.rate,
		},
	})
	if err != nil {
		h.t.Fatal(err)
	}
}

// serve lets guests in.
func (h *realHost) serve() {
	h.t.Helper()
	ln, err := net.Listen("tcp", h.addr)
	if err != nil {
		h.t.Fatal(err)
	}
	h.Serve(ln)
}

func (h *realHost) publish(topic, payload string) uint64 {
	h.t.Helper()
	seq, err := h.Publish(context.Background(), bus.PublishRequest{Topic: topic, Payload: []byte(payload)})
	if err != nil {
		h.t.Fatal(err)
	}
	return seq
}

// withRealHost runs an agent against a broker, on the real clock.
func withRealHost(t *testing.T, h *realHost, name string) *fixture {
	t.Helper()
	f := &fixture{pace: &evenly{pause: 20 * time.Millisecond}, logs: &logs{}}
	opts := Options{Name: name, Address: h.addr, Version: "test", SpoolSize: 1 << 20, Log: f.logs.entry()}
	a, err := newAgent(opts, f.pace, func(ctx context.Context, address string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", address)
	})
	if err != nil {
		t.Fatal(err)
	}
	f.Agent = a
	f.start(t)
	f.until(t, f.connected)
	return f
}

// TestPublishersOrder publishes faster than the host allows, through restarts of the
// host: every record is stored once, and in the order of its publisher.
func TestPublishersOrder(t *testing.T) {
	h := newRealHost(t)
	_ = h.Close()
	h.rate = presence.Rate{Records: 500, Burst: 20, Bytes: 1e9}
	h.open()
	h.serve()
	f := withRealHost(t, h, "web1")
	const n = 600
	for i := range n {
		if err := f.Agent.publish(bus.PublishRequest{Topic: "vm:self", Payload: fmt.Append(nil, i)}, func(result) {}); err != nil {
			t.Fatal(err)
		}
		if i == 200 || i == 400 {
			f.until(t, func() bool { c := f.outbox.counts(); return c.published > uint64(i/2) })
			_ = h.Close()
			f.until(t, func() bool { return !f.connected() })
			h.open()
			h.serve()
			f.until(t, f.connected)
		}
	}
	f.until(t, func() bool { return f.outbox.counts().records == 0 })
	got := newLines()
	if err := h.Tail(t.Context(), bus.TailRequest{All: true, Topics: []string{"vm:web1"}}, got); err != nil {
		t.Fatal(err)
	}
	p := got.payloads(t)
	if len(p) != n {
		t.Errorf("%d records were stored of %d", len(p), n)
	}
	for i, payload := range p {
		if payload != fmt.Sprint(i) {
			t.Fatalf("record %d is %s", i, payload)
		}
	}
	if limited := f.outbox.counts().limited; limited == 0 {
		t.Error("nothing was refused: the order was never at risk")
	}
}
