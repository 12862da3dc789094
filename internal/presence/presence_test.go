package presence

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bubble"
	"github.com/castrabus/castra/internal/bus"
)

type fakeSession struct {
	token   string
	expired int
}

func (s *fakeSession) Token() string { return s.token }
func (s *fakeSession) Lag() uint64   { return 7 }
func (s *fakeSession) Expire()       { s.expired++ }

func table() *Table {
	return New(Options{ReachableWithin: 45 * time.Second, SessionTimeout: time.Minute, MaxVMs: 3})
}

// states lists the changes as words.
func states(t *Table) []string {
	var out []string
	changes, _ := t.Changes()
	for _, c := range changes {
		state := "down"
		if c.Reachable {
			state = "up"
		}
		out = append(out, c.VM+" "+state+" "+c.Reason)
	}
	return out
}

// sweepFor lets d pass with a sweep each interval.
func sweepFor(t *Table, d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end); {
		time.Sleep(t.Interval())
		t.Sweep()
	}
}

func TestSilence(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		tab, s := table(), &fakeSession{token: "sess-1"}
		v, _, err := tab.Connect("web1", s, "127.0.0.1:1", nil)
		if err != nil {
			t.Fatal(err)
		}
		sweepFor(tab, 44*time.Second)
		if got := states(tab); !slices.Equal(got, []string{"web1 up handshake"}) {
			t.Errorf("after 44 s: %v", got)
		}
		sweepFor(tab, 3*time.Second)
		if got := states(tab); !slices.Equal(got, []string{"web1 down silent"}) {
			t.Errorf("after 47 s: %v", got)
		}
		v.Heard()
		if got := states(tab); !slices.Equal(got, []string{"web1 up frame"}) {
			t.Errorf("after a frame: %v", got)
		}
		sweepFor(tab, 59*time.Second)
		if s.expired != 0 {
			t.Error("expired after 59 s")
		}
		sweepFor(tab, 3*time.Second)
		if s.expired == 0 {
			t.Error("not expired after 62 s")
		}
		// That the connection goes too is what comes of the silence.
		tab.Disconnect(v, s)
		if got := tab.Snapshot(nil)[0]; got.Reachable || got.Reason != ReasonSilent || got.Session != "" {
			t.Errorf("expired, it shows as %+v", got)
		}
	})
}

func TestHandshakeOnlyGuestExpires(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		tab := table()
		tab.Attend("old", "127.0.0.1:1", []string{"exec"})
		sweepFor(tab, 44*time.Second)
		if vm := tab.Snapshot(nil)[0]; !vm.Reachable || *vm.LastHandshakeAgeMS != 44000 {
			t.Errorf("after 44 s: %+v", vm)
		}
		sweepFor(tab, 3*time.Second)
		if got := states(tab); !slices.Equal(got, []string{"old up handshake", "old down expired"}) {
			t.Errorf("after 47 s: %v", got)
		}
	})
}

// The close of an older session never touches the newer one's state.
func TestLateCloseChangesNothing(t *testing.T) {
	tab := table()
	first, second := &fakeSession{token: "1"}, &fakeSession{token: "2"}
	v, old, _ := tab.Connect("web1", first, "a", nil)
	if old != nil {
		t.Error("an older session out of nowhere")
	}
	if _, old, _ = tab.Connect("web1", second, "b", nil); old != Session(first) {
		t.Errorf("replaced %v", old)
	}
	tab.Subscribed(v, first, []string{"late"})
	if tab.Disconnect(v, first) {
		t.Error("the late close did something")
	}
	vm := tab.Snapshot([]string{"web1"})[0]
	if !vm.Reachable || vm.Session != "2" || vm.RemoteAddr != "b" || vm.BusSubscribed || vm.Lag != 7 {
		t.Errorf("%+v", vm)
	}
	if !tab.Disconnect(v, second) || tab.Snapshot(nil)[0].Reachable {
		t.Error("the newer one's own close did nothing")
	}
	if got := states(tab); !slices.Equal(got, []string{"web1 up handshake", "web1 down disconnected"}) {
		t.Errorf("%v", got)
	}
}

func TestNamesAreBounded(t *testing.T) {
	tab := table()
	for i := range 5 {
		_, _, err := tab.Connect(fmt.Sprint("vm", i), &fakeSession{}, "", nil)
		if (err == nil) != (i < 3) {
			t.Errorf("name %d: %v", i, err)
		}
	}
	tab.Know("registered") // an operator's word is not bounded
	if n := len(tab.Snapshot(nil)); n != 4 {
		t.Errorf("%d names", n)
	}
}

func TestRefusalsAreBoundedAndForgotten(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		tab := table()
		for i := range 70 {
			tab.Refuse(fmt.Sprint("vm", i), "unknown-vm", false)
		}
		tab.Refuse("vm10", "auth-failed", false)
		got := tab.Refused()
		if len(got) != 64 || got[0].VM != "vm10" || got[0].Reason != "auth-failed" || got[1].VM != "vm69" {
			t.Errorf("%d, first %+v", len(got), got[:2])
		}
		tab.Admitted("vm69")
		if slices.ContainsFunc(tab.Refused(), func(r bus.Refused) bool { return r.VM == "vm69" }) {
			t.Error("still listed after it was let in")
		}
		time.Sleep(time.Hour + time.Second)
		if got := tab.Refused(); len(got) != 0 {
			t.Errorf("after an hour: %v", got)
		}
	})
}

func TestChangesAreMergedWhenTooMany(t *testing.T) {
	tab := table()
	v, _, _ := tab.Connect("web1", &fakeSession{}, "", nil)
	tab.mu.Lock()
	for i := range maxChanges + 10 {
		tab.set(v, i%2 == 1, "x")
	}
	n, last := len(tab.changes), tab.changes[len(tab.changes)-1]
	tab.mu.Unlock()
	if n > 20 || last.Reachable != v.reachable {
		t.Errorf("%d changes wait, the last %+v", n, last)
	}
}

func TestBucket(t *testing.T) {
	now := time.Now()
	var b Bucket
	r := Rate{Records: 10, Burst: 3, Bytes: 1000}
	for i := range 3 {
		if wait := b.Take(r, 10, now); wait != 0 {
			t.Errorf("record %d of the burst waits %v", i, wait)
		}
	}
	if wait := b.Take(r, 10, now); wait != 100*time.Millisecond {
		t.Errorf("beyond the burst: %v", wait)
	}
	now = now.Add(100 * time.Millisecond)
	if wait := b.Take(r, 10, now); wait != 0 {
		t.Errorf("a tenth of a second later: %v", wait)
	}
	now = now.Add(time.Hour)
	if wait := b.Take(r, 5000, now); wait != 0 {
		t.Errorf("more bytes than fit, into a full bucket: %v", wait)
	}
	if wait := b.Take(r, 500, now); wait != 500*time.Millisecond {
		t.Errorf("behind it: %v", wait)
	}
	// Somebody looked at the clock before, and comes behind: nothing fills twice.
	if wait := b.Take(r, 500, now.Add(-400*time.Millisecond)); wait != 500*time.Millisecond {
		t.Errorf("earlier: %v", wait)
	}
	if wait := b.Take(r, 500, now); wait != 500*time.Millisecond {
		t.Errorf("behind the earlier one: %v", wait)
	}
}

// A bucket that lacks less than a nanosecond's worth has it not.
func TestBucketRoundsAgainstTheTaker(t *testing.T) {
	now := time.Now()
	var b Bucket
	r := Rate{Records: 3, Burst: 1, Bytes: 1}
	b.Take(r, 0, now)
	now = now.Add(time.Second / 3)
	if first, second := b.Take(r, 0, now), b.Take(r, 0, now); first == 0 && second == 0 {
		t.Error("two were taken where there was one at most")
	}
}

// Names that came once make room; those with a session, or registered, stay.
func TestStrangersMakeRoom(t *testing.T) {
	tab := table()
	gone := &fakeSession{}
	v, _, err := tab.Connect("gone", gone, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "b"} {
		if _, _, err := tab.Connect(name, &fakeSession{}, "", nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := tab.Connect("c", &fakeSession{}, "", nil); !errors.Is(err, ErrTooManyVMs) {
		t.Errorf("while all are connected: %v", err)
	}
	tab.Disconnect(v, gone)
	if _, _, err := tab.Connect("c", &fakeSession{}, "", nil); err != nil {
		t.Errorf("when one is gone: %v", err)
	}
	if len(tab.Snapshot([]string{"gone"})) != 0 {
		t.Error("it is still known")
	}
}

// At the limit of sessions a VM may still replace its own.
func TestSessionsAreBounded(t *testing.T) {
	tab := New(Options{ReachableWithin: time.Minute, SessionTimeout: time.Minute, MaxSessions: 1})
	if _, _, err := tab.Connect("a", &fakeSession{token: "1"}, "", nil); err != nil {
		t.Fatal(err)
	}
	if _, _, err := tab.Connect("b", &fakeSession{}, "", nil); !errors.Is(err, ErrTooManySessions) {
		t.Errorf("another VM: %v", err)
	}
	if _, old, err := tab.Connect("a", &fakeSession{token: "2"}, "", nil); err != nil || old == nil {
		t.Errorf("the same VM: %v, %v", old, err)
	}
}

func TestForgottenGoesWithItsSession(t *testing.T) {
	tab, s := table(), &fakeSession{}
	tab.Know("web1")
	v, _, err := tab.Connect("web1", s, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	tab.Forget("web1")
	if len(tab.Snapshot(nil)) != 1 {
		t.Error("forgotten with a live session")
	}
	tab.Disconnect(v, s)
	if len(tab.Snapshot(nil)) != 0 {
		t.Error("still known when the session has ended")
	}
}

// What is heard of a VM is written down again and again, and not too often.
func TestUnrecorded(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		const period = 30 * time.Second
		tab := table()
		time.Sleep(time.Second) // its clock is past its beginning
		var vms []*VM
		for _, name := range []string{"beats", "silent", "gone"} {
			v, _, err := tab.Connect(name, &fakeSession{}, "", nil)
			if err != nil {
				t.Fatal(err)
			}
			tab.Record(name)
			vms = append(vms, v)
		}
		tab.Disconnect(vms[2], vms[2].session)
		var at []time.Duration // when there was something to be written
		began := time.Now()
		for range 100 {
			time.Sleep(time.Second)
			vms[0].Heard()
			for _, name := range tab.Unrecorded(period) {
				if name != "beats" {
					t.Errorf("after %v %s is to be written", time.Since(began), name)
				}
				at = append(at, time.Since(began))
			}
		}
		if want := []time.Duration{period, 2 * period, 3 * period}; !slices.Equal(at, want) {
			t.Errorf("it was written at %v, want %v", at, want)
		}
		if next := time.Duration(tab.nextRecord - tab.now()); next > 0 { // the silent one may speak
			t.Errorf("nothing is looked for in the next %v", next)
		}
		tab.Disconnect(vms[1], vms[1].session)
		tab.Record("beats")
		_ = tab.Unrecorded(period)
		if next := time.Duration(tab.nextRecord - tab.now()); next != period {
			t.Errorf("nothing is looked for in the next %v", next)
		}
		late, _, err := tab.Connect("gone", &fakeSession{}, "", nil) // recorded long ago
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		late.Heard()
		if got := tab.Unrecorded(period); !slices.Equal(got, []string{"gone"}) {
			t.Errorf("one who comes back has %v written", got)
		}
	})
}

// One more heartbeat alone is written down with the next, and not left for long.
func TestUnrecordedHeartbeat(t *testing.T) {
	for name, c := range map[string]struct {
		beats   func(second int) bool
		publish int // the second; 0: never
		want    []int
	}{
		"every 15 s":  {beats: func(s int) bool { return s%15 == 0 }, want: []int{30, 60, 90, 120}},
		"every 25 s":  {beats: func(s int) bool { return s%25 == 0 }, want: []int{30, 75, 125}},
		"two":         {beats: func(s int) bool { return s == 10 || s == 45 }, want: []int{30, 90}},
		"and publish": {beats: func(s int) bool { return s == 10 || s == 45 }, publish: 50, want: []int{30, 60}},
		"publish":     {beats: func(int) bool { return false }, publish: 10, want: []int{30}},
	} {
		t.Run(name, func(t *testing.T) {
			bubble.Test(t, func(t *testing.T) {
				tab := table()
				time.Sleep(time.Second) // its clock is past its beginning
				v, _, err := tab.Connect("web1", &fakeSession{}, "", nil)
				if err != nil {
					t.Fatal(err)
				}
				tab.Record("web1")
				var at []int
				for second := 1; second <= 130; second++ {
					time.Sleep(time.Second)
					if c.beats(second) {
						v.Heard()
						v.Heartbeat()
					}
					if second == c.publish {
						v.Heard()
						v.Published(1)
					}
					for range tab.Unrecorded(30 * time.Second) {
						at = append(at, second)
						tab.Record("web1")
					}
				}
				if !slices.Equal(at, c.want) {
					t.Errorf("it was written at %v, want %v", at, c.want)
				}
			})
		})
	}
}

// A table in which no deadline can pass is looked at less often, and whoever comes in
// the meantime is still found silent in time.
func TestIdleInterval(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		tab := table()
		if got := tab.Interval(); got != time.Second {
			t.Errorf("at first %v", got)
		}
		tab.Know("web1")
		tab.Sweep()
		if got := tab.Interval(); got != idleInterval {
			t.Errorf("with nobody there %v", got)
		}
		asleep := tab.Interval()
		s := &fakeSession{token: "sess-1"}
		v, _, err := tab.Connect("web1", s, "127.0.0.1:1", nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := tab.Interval(); got != time.Second {
			t.Errorf("with a session %v", got)
		}
		time.Sleep(asleep)
		tab.Sweep()
		sweepFor(tab, 46*time.Second-asleep)
		if got := states(tab); !slices.Equal(got, []string{"web1 up handshake", "web1 down silent"}) {
			t.Errorf("after 46 s: %v", got)
		}
		tab.Disconnect(v, s)
		tab.Attend("web2", "127.0.0.1:2", nil)
		tab.Sweep()
		if got := tab.Interval(); got != time.Second {
			t.Errorf("with a handshake-only guest %v", got)
		}
		sweepFor(tab, 47*time.Second)
		if got := tab.Interval(); got != idleInterval {
			t.Errorf("when it has expired %v", got)
		}
	})
}

// Guests that beat are looked at when the first of them could be silent, and not before.
// Whatever brings a deadline nearer is seen all the same.
func TestNextDeadline(t *testing.T) {
	opts := Options{ReachableWithin: 10 * time.Second, SessionTimeout: time.Minute}
	connect := func(tab *Table, name string) *VM {
		v, _, err := tab.Connect(name, &fakeSession{}, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	for name, c := range map[string]struct {
		do   func(tab *Table) // after five seconds
		late time.Duration    // how soon somebody is found silent then
	}{
		"nothing":           {func(*Table) {}, 5 * time.Second},
		"a heartbeat":       {func(tab *Table) { tab.vms["beats"].Heard() }, 10 * time.Second},
		"shorter deadlines": {func(tab *Table) { tab.Configure(Options{ReachableWithin: time.Second, SessionTimeout: time.Minute}) }, 0},
		"another one, silent": {func(tab *Table) {
			silent := 8 * time.Second
			tab.vms["beats"].Heard()
			tab.Resume(&Carried{VM: "old", Reachable: true, Handshake: &silent, Frame: &silent}, &fakeSession{}, 0)
		}, 2 * time.Second},
		"the silent one speaks": {func(tab *Table) {
			sweepFor(tab, 7*time.Second)
			tab.vms["beats"].Heard()
			tab.Changes()
		}, 10 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			bubble.Test(t, func(t *testing.T) {
				tab := New(opts)
				time.Sleep(time.Second)
				connect(tab, "beats")
				tab.Sweep()
				if next := time.Duration(tab.nextDeadline - tab.now()); next != opts.ReachableWithin {
					t.Errorf("the next deadline is in %v", next)
				}
				tab.Changes()
				time.Sleep(5 * time.Second)
				c.do(tab)
				began := time.Now()
				for len(states(tab)) == 0 {
					sweepFor(tab, time.Second/10)
				}
				if late := time.Since(began) - c.late; late < 0 || late > 1100*time.Millisecond {
					t.Errorf("after %v, want %v", time.Since(began), c.late)
				}
			})
		})
	}
}
