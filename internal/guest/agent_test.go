package guest

import (
	"context"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/castrabus/castra/internal/bubble"
	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

func (f *fixture) connected() bool { return f.uplink.session() != nil }

func TestHeartbeats(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := runAgent(t, nil)
		begun := time.Now()
		p := f.net.accept(t)
		for i := range 3 {
			p.want(`{"type":"heartbeat"}`)
			if d := time.Since(begun); d != time.Duration(i+1)*heartbeatEvery {
				t.Errorf("heartbeat %d after %v", i, d)
			}
			p.send(`{"type":"ack","ack":"heartbeat","status":"ok"}`)
		}
		synctest.Wait()
		if vm := f.Status(nil).VMs[0]; vm.LastHeartbeatAgeMS == nil || *vm.LastHeartbeatAgeMS != 0 {
			t.Errorf("age of the last heartbeat is %v", vm.LastHeartbeatAgeMS)
		}
		// A host that died takes what is sent and says nothing.
		silent := time.Now()
		go func() { _, _ = io.Copy(io.Discard, p.r) }()
		for f.connected() {
			time.Sleep(time.Millisecond)
		}
		if d := time.Since(silent); d < silentAfter || d > silentAfter+time.Second {
			t.Errorf("a silent host was given up after %v", d)
		}
		synctest.Wait()
		if s := f.Summary(); !strings.Contains(s, "no word from the host for 45s") {
			t.Error(s)
		}
		f.net.accept(t)
	})
}

// A host that reads nothing must not be waited for without end, even if it talks.
func TestHostThatTakesNothing(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := runAgent(t, nil)
		p := f.net.accept(t)
		talked := make(chan struct{})
		go func() {
			defer close(talked)
			for err := error(nil); err == nil; time.Sleep(10 * time.Second) {
				_, err = p.conn.Write(wire.AppendGapFrame(nil, "nobody", 1, 2))
			}
		}()
		defer func() { <-talked }()
		synctest.Wait()
		begun := time.Now()
		<-f.publish(bus.PublishRequest{Topic: "t"})
		for f.connected() && time.Since(begun) < time.Hour {
			time.Sleep(100 * time.Millisecond)
		}
		if d := time.Since(begun); d > silentAfter+time.Second {
			t.Errorf("given up after %v", d)
			_ = p.conn.Close()
		}
	})
}

func TestHostThatBreaksTheProtocol(t *testing.T) {
	frame := func(s string) string { return string(wire.AppendFrame(nil, []byte(s))) }
	for name, tt := range map[string]struct{ say, want string }{
		"dies in a frame":      {frame(`{"type":"heartbeat"}`)[:9], "ended within a frame"},
		"closes":               {"", "closed the connection"},
		"no JSON":              {frame("hello"), "protocol error"},
		"length 0":             {"\x00\x00\x00\x00", "frame length"},
		"length beyond":        {"\x00\x01\x00\x01", "frame length"},
		"ack of nothing":       {frame(`{"type":"ack","ack":"publish","status":"ok","seq":1}`), "was not sent"},
		"subscribe of nothing": {frame(`{"type":"ack","ack":"subscribe","status":"ok"}`), "was not sent"},
		"says why":             {frame(`{"type":"error","code":"superseded","reason":"a newer one"}`), `superseded: "a newer one"`},
	} {
		t.Run(name, func(t *testing.T) {
			bubble.Test(t, func(t *testing.T) {
				f := runAgent(t, nil)
				p := f.net.accept(t)
				// What no host of today sends changes nothing.
				p.send(`{"type":"future","x":1}`, `{"type":"ack","ack":"unsubscribe","status":"ok"}`, `{"type":"publish","subscription":"nobody","seq":3,"payload":1}`)
				p.write(tt.say)
				_ = p.conn.Close()
				synctest.Wait()
				if s := f.Summary(); !strings.Contains(s, tt.want) || !strings.HasPrefix(s, "connecting to host:7070 (") {
					t.Errorf("%q lacks %q", s, tt.want)
				}
				if f.logs.count(`level=warning msg="not connected to the host`) != 1 {
					t.Error(f.logs)
				}
				f.net.accept(t)
			})
		})
	}
}

func TestAcksOutOfOrderEndTheSession(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := runAgent(t, nil)
		p := f.net.accept(t)
		synctest.Wait()
		a, b := f.publish(bus.PublishRequest{Topic: "t", ID: "a"}), f.publish(bus.PublishRequest{Topic: "t", ID: "b"})
		p.wantPublish("null", 0)
		p.wantPublish("null", 0)
		p.ack("b", 1)
		for _, done := range []<-chan published{a, b} {
			if r := <-done; r.seq != 0 || r.err != nil {
				t.Errorf("told %+v", r)
			}
		}
		p = f.net.accept(t)
		for _, id := range []string{"a", "b"} {
			if got := p.wantPublish("null", 7); got != id {
				t.Errorf("got %s, want %s", got, id)
			}
		}
	})
}

func TestRefusedGuestSaysSoOnceAndHow(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := runAgent(t, nil)
		refuse := func(reason string) {
			p := f.net.greet(t)
			p.write("error: " + reason + "\n")
			_ = p.conn.Close()
			synctest.Wait()
		}
		for range 3 {
			refuse("unknown-vm")
		}
		const advice = "on the host run: castractl vm add web1 --no-key; or give it a key, and start it with that: castractl vm add web1"
		if got, want := f.Summary(), "refused: unknown-vm — "+advice; got != want {
			t.Errorf("summary %q, want %q", got, want)
		}
		if n := f.logs.count(advice); n != 1 {
			t.Errorf("said %d times: %s", n, f.logs)
		}
		st := f.Status(nil)
		if st.Broker.State != "refused: unknown-vm" || len(st.Refused) != 1 || st.Refused[0].VM != "web1" || st.Refused[0].Reason != "unknown-vm" {
			t.Errorf("status %+v", st)
		}
		if vm := st.VMs[0]; vm.Reachable || vm.Reason != "unknown-vm" {
			t.Errorf("vm %+v", vm)
		}
		refuse("auth-required")
		if f.logs.count("castractl vm rekey web1") != 1 {
			t.Error(f.logs)
		}
		p := f.net.accept(t)
		synctest.Wait()
		if got, want := f.Summary(), "connected to host:7070 as web1, session sess-1"; got != want {
			t.Errorf("summary %q, want %q", got, want)
		}
		_ = p.conn.Close()
		refuse("auth-required") // news again, since it was let in meanwhile
		if f.logs.count("castractl vm rekey web1") != 2 {
			t.Error(f.logs)
		}
	})
}

func TestSummaryWhileTheHostIsAway(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := runAgent(t, nil)
		if got := f.Summary(); got != "connecting to host:7070" {
			t.Error(got)
		}
		synctest.Wait()
		f.net.refuse(errRefusedConnection)
		p := f.net.greet(t)
		_ = p.conn.Close()
		time.Sleep(2500 * time.Millisecond)
		if _, err := f.Publish(t.Context(), bus.PublishRequest{Topic: "t"}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got := f.Summary(); got != "connecting to host:7070 (connection refused), next try within 1s, 1 spooled" {
			t.Error(got)
		}
		if st := f.Status(nil).Broker; st.State != "connecting" || st.SpoolCount != 1 || st.Kind != "guest" || !slices.Equal(st.Listen, []string{"host:7070"}) {
			t.Errorf("%+v", st)
		}
		if vms := f.Status([]string{"other"}).VMs; len(vms) != 0 {
			t.Errorf("%+v", vms)
		}
		if n := f.logs.count("connection refused"); n != 1 {
			t.Errorf("said %d times: %s", n, f.logs)
		}
	})
}

// Attempts are spaced by the pacer, which begins anew only after a session that
// lasted: a host that takes a guest and drops it at once is not hammered.
func TestPacing(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := runAgent(t, nil)
		var p *peer
		for range 3 {
			if p != nil {
				_ = p.conn.Close()
			}
			p = f.net.accept(t)
			synctest.Wait()
		}
		if f.pace.resets != 0 {
			t.Error("a session that ended at once counts as one that lasted")
		}
		if n := f.logs.count("closed the connection"); n != 2 {
			t.Errorf("the end of two sessions was said %d times", n)
		}
		time.Sleep(lastedFor)
		_ = p.conn.Close()
		begun := time.Now()
		f.net.accept(t)
		synctest.Wait()
		if f.pace.resets != 1 || time.Since(begun) >= returnWithin {
			t.Errorf("%d resets, back after %v", f.pace.resets, time.Since(begun))
		}
	})
}

func TestAlwaysSubscribed(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := runAgent(t, func(o *Options) { o.Subscribe = []string{"broadcast", "vm:self", "broadcast"} })
		p := f.net.accept(t)
		p.want(`{"type":"subscribe","topic":"broadcast","sub":"s1"}`)
		p.want(`{"type":"subscribe","topic":"vm:web1","sub":"s2"}`)
		p.send(`{"type":"ack","ack":"subscribe","status":"ok"}`, `{"type":"ack","ack":"subscribe","status":"error","code":"forbidden","reason":"no"}`)
		p.send(`{"type":"publish","subscription":"s1","topic":"broadcast","vm":"host","seq":9,"payload":1}`)
		p.want(`{"type":"ack","ack":"publish","subscription":"s1","seq":9}`)
		if f.logs.count("the host refuses a subscription") != 1 {
			t.Error(f.logs)
		}
		if vm := f.Status(nil).VMs[0]; !slices.Equal(vm.Subscriptions, []string{"broadcast"}) || !vm.BusSubscribed {
			t.Errorf("%+v", vm)
		}
		if err := f.Reload("host:7070", []string{"vm:other"}); err == nil {
			t.Error("another VM's topic was taken")
		}
		if err := f.Reload("host:7070", []string{"vm:self", "orders.>"}); err != nil {
			t.Fatal(err)
		}
		p.want(`{"type":"unsubscribe","subscription":"s1"}`)
		p.want(`{"type":"subscribe","topic":"orders.>","sub":"s3"}`)
		// Another address is gone to at once.
		begun := time.Now()
		if err := f.Reload("new:7070", []string{"orders.>"}); err != nil {
			t.Fatal(err)
		}
		p = f.net.accept(t)
		p.want(`{"type":"subscribe","topic":"orders.>","sub":"s4"}`)
		synctest.Wait()
		if d := time.Since(begun); d != 0 || !strings.HasPrefix(f.Summary(), "connected to new:7070") {
			t.Errorf("after %v: %s", d, f.Summary())
		}
	})
}

func TestStopDrains(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := runAgent(t, nil)
		p := f.net.accept(t)
		synctest.Wait()
		a := f.publish(bus.PublishRequest{Topic: "t", ID: "a"})
		b := f.publish(bus.PublishRequest{Topic: "t", ID: "b"})
		begun := time.Now()
		stopped := make(chan struct{})
		go func() {
			defer close(stopped)
			f.stop()
		}()
		synctest.Wait()
		if _, err := f.Publish(t.Context(), bus.PublishRequest{Topic: "t"}); refusalOf(err).Code != bus.CodeShuttingDown {
			t.Errorf("a stopping agent said %v", err)
		}
		if s := f.Status(nil).Broker.State; s != "stopping" || !strings.HasPrefix(f.Summary(), "stopping; connected") {
			t.Errorf("state %q, %s", s, f.Summary())
		}
		p.wantPublish("null", 1)
		p.wantPublish("null", 0)
		<-stopped
		if r := <-a; r.seq != 1 {
			t.Errorf("a: %+v", r)
		}
		if r := <-b; refusalOf(r.err).Code != bus.CodeShuttingDown {
			t.Errorf("b: %+v", r)
		}
		if d := time.Since(begun); d != drainFor {
			t.Errorf("stopped after %v", d)
		}
		if f.logs.count("are lost") != 1 {
			t.Error(f.logs)
		}
	})
	t.Run("nothing to drain", func(t *testing.T) {
		bubble.Test(t, func(t *testing.T) {
			f := runAgent(t, nil)
			f.net.refuse(errRefusedConnection)
			_, _ = f.Publish(t.Context(), bus.PublishRequest{Topic: "t"})
			begun := time.Now()
			f.stop()
			if d := time.Since(begun); d != 0 {
				t.Errorf("waited %v for a host that is not there", d)
			}
		})
	})
}

func TestWatch(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		states := 0
		f := runAgent(t, func(o *Options) { o.OnState = func() { states++ } })
		var seen []string
		cancel := f.Watch(func(vm bus.VM, _ bool) { seen = append(seen, vm.State) })
		p := f.net.accept(t)
		time.Sleep(time.Second)
		_ = p.conn.Close()
		f.net.refuse(errRefusedConnection)
		time.Sleep(5 * time.Second)
		cancel()
		f.net.refuse(nil)
		f.net.accept(t)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if want := []string{"reachable", "unreachable"}; !slices.Equal(slices.Compact(seen[len(seen)-2:]), want) {
			t.Errorf("seen %q, want %q at the end", seen, want)
		}
		if states < 3 {
			t.Errorf("%d changes of the summary were told", states)
		}
	})
}

func TestProbe(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		f := runAgent(t, nil)
		check := func(when string) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if err := f.Probe(ctx); err != nil {
				t.Errorf("%s: %v", when, err)
			}
		}
		check("while dialling")
		f.net.accept(t)
		check("while connected")
		f.net.refuse(errRefusedConnection)
		f.stop()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if f.Probe(ctx) == nil {
			t.Error("an agent that has ended answers")
		}
	})
}
