package dbusapi

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/castrabus/castra/internal/bus"
)

// TestHostileCallers sends what any local user may send over the system bus.
func TestHostileCallers(t *testing.T) {
	b := newBus(t, openPolicy)
	onState, told := states()
	b.serve(Options{Bus: newFakeBus(bus.VM{VM: "web1"}), OnState: onState}, quick())
	receive(t, told)
	c := b.client()
	descriptors := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	ask := func(m *dbus.Message) string {
		t.Helper()
		delete(m.Headers, dbus.FieldSender)
		return errorOf((<-c.Send(m, make(chan *dbus.Call, 1)).Done).Err)
	}

	// Descriptors nobody asked for must not stay open.
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	before := descriptors()
	for range 50 {
		m := methodCall(RootPath, ManagerInterface, "Describe", []dbus.UnixFD{dbus.UnixFD(null.Fd()), dbus.UnixFD(null.Fd())})
		m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.ParseSignatureMust("ah"))
		if got := ask(m); !strings.HasPrefix(got, "InvalidArgument: Describe takes") {
			t.Fatal(got)
		}
	}
	if after := descriptors(); after > before+5 {
		t.Errorf("%d descriptors are open, %d were", after, before)
	}

	// Legal on the bus, and more than godbus decodes.
	m := methodCall(RootPath, ManagerInterface, "Describe", map[uint32]string{1: "x"})
	m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.ParseSignatureMust("a{bs}"))
	if got := ask(m); !strings.HasPrefix(got, `InvalidArgument: Describe takes arguments of the types "as", not "a{bs}"`) {
		t.Error(got)
	}
	inner := dbus.MakeVariantWithSignature(map[uint32]string{1: "x"}, dbus.ParseSignatureMust("a{bs}"))
	m = methodCall(RootPath, ManagerInterface, "Publish", "t", "1", vars{"id": inner})
	m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(m.Body...))
	if got := ask(m); !strings.HasPrefix(got, "InvalidArgument: the arguments cannot be read") {
		t.Error(got)
	}
	m = methodCall(RootPath, ManagerInterface, "Describe", []string{strings.Repeat("x", maxIncoming)})
	m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(m.Body...))
	if got := ask(m); got != "LimitsExceeded: the message is larger than 2097152 bytes" {
		t.Error(got)
	}
	// Signals and answers that nobody waits for.
	if err := c.Emit("/x", "org.freedesktop.DBus.NameOwnerChanged", 1); err != nil {
		t.Error(err)
	}
	if err := manager(c).Call(ManagerInterface+".Describe", 0, []string{"web1"}).Err; err != nil {
		t.Error(err)
	}
	select {
	case got := <-told:
		t.Errorf("the state changed: %s", got)
	default:
	}
}

// TestOrder has one sender publish without waiting for answers.
func TestOrder(t *testing.T) {
	b, f := newBus(t, openPolicy), newFakeBus()
	b.serve(Options{Bus: f}, quick())
	m := manager(b.client())
	const count = maxCallsPerSender
	done := make(chan *dbus.Call, count) // every answer
	for range 20 {
		for n := range count {
			m.Go(ManagerInterface+".Publish", 0, done, "t", fmt.Sprint(n), vars{})
		}
		for range count {
			if err := receive(t, done).Err; err != nil {
				t.Fatal(err)
			}
		}
		for n, req := range f.asked() {
			if string(req.Payload) != fmt.Sprint(n) {
				t.Fatalf("publish %d is %s", n, req.Payload)
			}
		}
	}
}

// Who has an answer may call again at once: the call that it answers counts no more.
// Else a sender of as many calls as there may be was refused now and then.
func TestAnsweredCallsDoNotCount(t *testing.T) {
	b, f := newBus(t, openPolicy), newFakeBus()
	begun, end := make(chan struct{}), make(chan struct{})
	f.answer(func(context.Context, bus.PublishRequest) (uint64, error) {
		close(begun)
		<-end
		return 1, nil
	})
	l := &link{}
	h := quick()
	h.linked = func(made *link) { l = made }
	b.serve(Options{Bus: f}, h)
	call := manager(b.client()).Go(ManagerInterface+".Publish", 0, nil, "t", "1", vars{})
	<-begun
	l.mu.Lock() // it cannot be counted as done
	close(end)
	select {
	case <-call.Done:
		l.mu.Unlock()
		t.Fatal("a call was answered that still counted")
	case <-time.After(100 * time.Millisecond): // as long as an answer would take that does not wait
	}
	l.mu.Unlock()
	if err := (<-call.Done).Err; err != nil {
		t.Error(err)
	}
}

// TestLimits has calls that do not end, until there are as many as there may be.
func TestLimits(t *testing.T) {
	// A system bus has a limit of its own, which this test would meet first.
	b, f := newBus(t, openPolicy+`<limit name="max_replies_per_connection">1000</limit>`), newFakeBus()
	finish := make(chan struct{})
	wait := func(ctx context.Context) error {
		select {
		case <-finish:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	f.answer(func(ctx context.Context, _ bus.PublishRequest) (uint64, error) { return 1, wait(ctx) })
	f.waitAck = func(ctx context.Context, _ uint64) (string, error) { return "web1", wait(ctx) }
	b.serve(Options{Bus: f}, quick())

	type flood struct {
		done     chan *dbus.Call
		admitted int
	}
	var floods []flood
	// send makes calls of which the first are admitted and the others refused. One
	// refusal at least shows that all of them have arrived.
	send := func(c *dbus.Conn, admitted, refused int, want, method string, args ...any) {
		t.Helper()
		done := make(chan *dbus.Call, admitted+refused) // every answer
		for range admitted + refused {
			manager(c).Go(ManagerInterface+"."+method, 0, done, args...)
		}
		for range refused {
			if got := errorOf(receive(t, done).Err); !strings.HasPrefix(got, want) {
				t.Fatalf("refused with %q, want %q", got, want)
			}
		}
		floods = append(floods, flood{done, admitted})
	}
	const full = "LimitsExceeded: this connection waits for "
	left := maxCalls
	send(b.client(), maxHeldPerSender, 5, "LimitsExceeded: too many tails and waits", "WaitAck", uint64(1), uint64(1e12))
	left -= maxHeldPerSender
	// A megabyte each, white space for the most part: four fit.
	send(b.client(), 4, 5, full+"4 calls", "Publish", "t", strings.Repeat(" ", 1_000_000)+"1", vars{})
	left -= 4
	for ; left > maxCallsPerSender; left -= maxCallsPerSender {
		send(b.client(), maxCallsPerSender, 5, full+"128 calls", "Publish", "t", "1", vars{})
		if err := manager(b.client()).Call(ManagerInterface+".Describe", 0, []string{}).Err; err != nil {
			t.Errorf("another sender: %v", err)
		}
	}
	send(b.client(), left, 5, "LimitsExceeded: castrad is busy with 1024 calls", "Publish", "t", "1", vars{})

	close(finish)
	for _, f := range floods {
		for range f.admitted {
			if err := receive(t, f.done).Err; err != nil {
				t.Error(err)
			}
		}
	}
	if err := manager(b.client()).Call(ManagerInterface+".Publish", 0, "t", "1", vars{}).Err; err != nil {
		t.Errorf("with all calls done: %v", err)
	}
}

// TestCallersAreForgotten makes sure that senders leave nothing behind.
func TestCallersAreForgotten(t *testing.T) {
	b, f := newBus(t, openPolicy), newFakeBus()
	l := &link{}
	h := quick()
	h.linked = func(made *link) { l = made }
	b.serve(Options{Bus: f}, h)
	for range 20 {
		c := b.client()
		if err := manager(c).Call(ManagerInterface+".Publish", 0, "t", "1", vars{}).Err; err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	eventually(t, "no caller is left", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.callers) == 0 && l.nCalls == 0 && l.nBytes == 0 && l.nHeld == 0
	})
}
