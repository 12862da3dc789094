package presence

import (
	"fmt"
	"math"
	"slices"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bubble"
)

// What one table knew the next one knows, with ages that went on, and without a
// word to anybody: but of those whose session did not come along.
func TestCarry(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		old := New(Options{ReachableWithin: 45 * time.Second, SessionTimeout: time.Minute})
		sessions := make(map[string]*fakeSession)
		for _, name := range []string{"lost", "quick", "silent"} {
			sessions[name] = &fakeSession{token: "sess-" + name}
			v, _, err := old.Connect(name, sessions[name], "127.0.0.1:"+name, []string{"bus-v1"})
			if err != nil {
				t.Fatal(err)
			}
			v.Published(3)
			old.Subscribed(v, sessions[name], []string{"t"})
		}
		old.Know("never")
		sweepFor(old, 50*time.Second) // all are silent by then
		old.Attend("shakes", "127.0.0.1:9", nil)
		for _, name := range []string{"lost", "quick"} {
			old.vms[name].Heard()
			old.vms[name].Heartbeat()
		}
		states(old)
		time.Sleep(5 * time.Second)

		carried, with := old.Carry()
		if len(carried) != 4 {
			t.Fatalf("%d VMs: %+v", len(carried), carried)
		}
		const away = 2 * time.Second
		time.Sleep(away)
		tab := New(old.opts)
		tab.Know("quick")
		for i := range carried {
			s := with[i]
			if carried[i].VM == "lost" {
				s = nil
			}
			if tab.Resume(&carried[i], s, away) == nil {
				t.Fatalf("%s is not taken in", carried[i].VM)
			}
			if tab.Resume(&carried[i], s, away) != nil {
				t.Errorf("%s is taken in twice", carried[i].VM)
			}
		}
		if got := states(tab); !slices.Equal(got, []string{"lost down restarted"}) {
			t.Errorf("announced: %v", got)
		}
		if n, _ := tab.Counts(); n != 2 {
			t.Errorf("%d sessions", n)
		}
		got := ""
		for _, d := range tab.Snapshot(nil) {
			age := func(ms *int64) string {
				if ms == nil {
					return "never"
				}
				return fmt.Sprint((time.Duration(*ms) * time.Millisecond).Round(time.Second))
			}
			got += fmt.Sprintln(d.VM, d.State, d.Session, d.RemoteAddr, d.Subscriptions, d.Published, age(d.LastHandshakeAgeMS), age(d.LastPublishAgeMS), age(d.LastHeartbeatAgeMS))
		}
		const want = `lost unreachable   [] 3 57s 57s 7s
quick reachable sess-quick 127.0.0.1:quick [t] 3 57s 57s 7s
shakes reachable  127.0.0.1:9 [] 0 7s never never
silent unreachable sess-silent 127.0.0.1:silent [t] 3 57s 57s never
`
		if got != want {
			t.Errorf("got\n%swant\n%s", got, want)
		}

		// The deadlines go on as well; a silent one's is near, and it gets a moment
		// for what it may have said in between.
		if tab.Sweep(); sessions["silent"].expired != 0 {
			t.Error("it had no time to be heard")
		}
		sweepFor(tab, 4*time.Second)
		if sessions["silent"].expired == 0 {
			t.Error("silent for more than a minute, and not ended")
		}
		tab.vms["silent"].Heard()
		if got := states(tab); !slices.Equal(got, []string{"silent up frame"}) {
			t.Errorf("announced: %v", got)
		}
		sweepFor(tab, 35*time.Second)
		if got := states(tab); !slices.Equal(got, []string{"quick down silent", "shakes down expired"}) && !slices.Equal(got, []string{"shakes down expired", "quick down silent"}) {
			t.Errorf("announced: %v", got)
		}
	})
}

// A restart gives nobody a new share, and hides nobody who was turned away.
func TestCarryLimits(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		rate := Rate{Records: 1, Burst: 10, Bytes: 1000}
		old := New(Options{ReachableWithin: 45 * time.Second, SessionTimeout: time.Minute})
		v, _, err := old.Connect("busy", &fakeSession{token: "sess-busy"}, "127.0.0.1:1", nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := old.Pace("busy", Rate{Records: 0.01, Burst: 1, Bytes: 1}, 0); !ok {
			t.Fatal("the first handshake has to wait")
		}
		for range 10 {
			if v.Limit.Take(rate, 1, time.Now()) != 0 {
				t.Fatal("the burst is short")
			}
		}
		old.Know("shut")
		for range 3 {
			old.Refuse("shut", "auth-failed", true)
		}
		time.Sleep(time.Second)
		old.Refuse("stranger", "unknown-vm", true)

		carried, with := old.Carry()
		refused := old.CarryRefused()
		const away = 2 * time.Second
		time.Sleep(away)
		tab := New(old.opts)
		tab.ResumeRefused(refused, away)
		v = tab.Resume(&carried[0], with[0], away)
		for i := range 4 { // a record a second, since the burst
			if wait := v.Limit.Take(rate, 1, time.Now()); (wait == 0) != (i < 3) {
				t.Errorf("record %d has to wait %v", i+1, wait)
			}
		}
		if _, ok := tab.Pace("busy", Rate{Records: 0.01, Burst: 1, Bytes: 1}, time.Second); ok {
			t.Error("a restart lets another handshake in")
		}
		got := fmt.Sprint(tab.Refused())
		if want := fmt.Sprint(old.Refused()); got != want || len(refused) != 2 {
			t.Errorf("turned away:\n%s, and were\n%s", got, want)
		}
		if len(tab.refused) != 2 || !tab.refused[0].known || tab.refused[0].times != 3 {
			t.Errorf("%+v", tab.refused)
		}
	})
}

// What JSON cannot say must not cost anybody the hand-over.
func TestLevel(t *testing.T) {
	now := time.Unix(1, 0)
	var b Bucket
	if l := b.level(now); l != nil {
		t.Errorf("a bucket that nobody used is at %+v", l)
	}
	b.Take(Rate{Records: 1, Burst: math.Inf(1), Bytes: 1}, 0, now)
	if l := b.level(now); l != nil {
		t.Errorf("a bucket without a bottom is at %+v", l)
	}
	var c Bucket
	c.Take(Rate{Records: 1, Burst: 5, Bytes: 1}, 0, now)
	if l := c.level(now.Add(worthCarrying)); l == nil || l.Records != 4 {
		t.Errorf("it is at %+v", l)
	}
	if l := c.level(now.Add(worthCarrying + 1)); l != nil {
		t.Errorf("long ago it was at %+v", l)
	}
	var d Bucket
	d.setLevel(&Level{Age: -time.Hour}, now, 0) // a file that is wrong must not stop it from filling
	if wait := d.Take(Rate{Records: 1, Burst: 5, Bytes: 1}, 0, now.Add(time.Second)); wait != 0 {
		t.Errorf("a second behind a level of the future it waits %v", wait)
	}
}

// Whoever was told something else last is told how it is, and nobody anything twice.
func TestCatchUp(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		tab := New(Options{ReachableWithin: 45 * time.Second, SessionTimeout: time.Minute})
		for _, name := range []string{"told", "news", "forgotten", "left"} {
			tab.Attend(name, "127.0.0.1:9", nil)
		}
		tab.Know("known")
		tab.Forget("forgotten")
		tab.set(tab.vms["left"], false, ReasonSilent)
		got := fmt.Sprint(tab.CatchUp(map[string]struct{}{"told": {}, "left": {}, "known": {}, "forgotten": {}, "unheard-of": {}}))
		want := fmt.Sprint([]Change{
			{VM: "forgotten", Reason: ReasonDisconnected},
			{VM: "known", Reason: ReasonRestarted},
			{VM: "left", Reason: ReasonSilent},
			{VM: "news", Reachable: true, Reason: tab.vms["news"].reason},
			{VM: "unheard-of", Reason: ReasonRestarted},
		})
		if got != want {
			t.Errorf("they are told %s, want %s", got, want)
		}
		if changes, _ := tab.Changes(); changes != nil {
			t.Errorf("%v is told again", changes)
		}
	})
}
