package presence

import (
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bubble"
)

// replace has a newcomer replace the session of a VM and gives how long he waited.
func replace(t *testing.T, tab *Table, name string) (wait time.Duration, begun bool) {
	t.Helper()
	wait, ok, begun := tab.Contend(name, 2500*time.Millisecond)
	if !ok {
		t.Fatal("he may not at all")
	}
	time.Sleep(wait)
	if _, _, err := tab.Connect(name, &fakeSession{}, "", nil); err != nil {
		t.Fatal(err)
	}
	return wait, begun
}

// Clones are noticed at the fifth replacement in a row and wait twice as long each
// time; nobody waits longer than he can.
func TestClonesAreSlowedDown(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		tab := table()
		if _, _, err := tab.Connect("web1", &fakeSession{}, "", nil); err != nil {
			t.Fatal(err)
		}
		const ms = time.Millisecond
		for i, want := range []time.Duration{0, 0, 0, 0, 250 * ms, 500 * ms, 1000 * ms, 2000 * ms, 2500 * ms, 2500 * ms} {
			if wait, begun := replace(t, tab, "web1"); wait != want || begun != (i == freeReplacements) {
				t.Errorf("replacement %d waits %v, begun: %t; want %v", i+1, wait, begun, want)
			}
		}
		vm := tab.Snapshot(nil)[0]
		if !vm.Contended || vm.Superseded != 10 {
			t.Errorf("%+v", vm)
		}
		// Of those who wait at once only one can have it next.
		if _, ok, _ := tab.Contend("web1", 2500*ms); !ok {
			t.Error("nobody may")
		}
		if _, ok, _ := tab.Contend("web1", 2500*ms); ok {
			t.Error("two may at once")
		}
		time.Sleep(calmAfter)
		tab.Sweep()
		if vm := tab.Snapshot(nil)[0]; vm.Contended {
			t.Errorf("%+v", vm)
		}
		if wait, _ := replace(t, tab, "web1"); wait != 0 {
			t.Errorf("after the fight one waits %v", wait)
		}
	})
}

// A VM that is reset now and then is no clone.
func TestRestartsAreNoFight(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		tab := table()
		for range 20 {
			if _, _, err := tab.Connect("web1", &fakeSession{}, "", nil); err != nil {
				t.Fatal(err)
			}
			time.Sleep(youngFor)
			if wait, begun := replace(t, tab, "web1"); wait != 0 || begun {
				t.Fatalf("it waits %v", wait)
			}
		}
	})
}

// A registered VM displaces the stranger heard of longest ago, and no other VM.
func TestMakeWay(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		tab := New(Options{ReachableWithin: 45 * time.Second, SessionTimeout: time.Minute, MaxSessions: 3})
		sessions := make(map[string]*fakeSession)
		connect := func(name string) error {
			sessions[name] = &fakeSession{token: name}
			_, _, err := tab.Connect(name, sessions[name], "", nil)
			time.Sleep(time.Second)
			return err
		}
		for _, name := range []string{"known", "late", "more"} {
			tab.Know(name)
		}
		for _, name := range []string{"known", "stranger1", "stranger2"} {
			if err := connect(name); err != nil {
				t.Fatal(err)
			}
		}
		if s := tab.MakeWay("stranger3"); s != nil || connect("stranger3") == nil {
			t.Error("a stranger finds room")
		}
		for _, want := range []string{"stranger1", "stranger2"} {
			name := map[string]string{"stranger1": "late", "stranger2": "more"}[want]
			if s, ok := tab.MakeWay(name).(*fakeSession); !ok || s != sessions[want] {
				t.Errorf("%+v makes way for %s, want %s", s, name, want)
			}
			if err := connect(name); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		tab.Know("last")
		if s := tab.MakeWay("last"); s != nil || connect("last") == nil {
			t.Error("registered VMs make way for each other")
		}
	})
}

// Any number that wait at once come one by one, and none waits longer than it may.
func TestReserve(t *testing.T) {
	var b Bucket
	r, now := Rate{Records: 10, Burst: 2, Bytes: 1}, time.Now()
	var waits []time.Duration
	for range 100 {
		wait, ok := b.Reserve(r, 500*time.Millisecond, now)
		if !ok {
			break
		}
		waits = append(waits, wait.Round(time.Millisecond))
	}
	if len(waits) != 7 || waits[1] != 0 || waits[2] != 100*time.Millisecond || waits[6] != 500*time.Millisecond {
		t.Errorf("%v", waits)
	}
	if rest := b.Spend(r, 10, now); rest != 1500*time.Millisecond {
		t.Errorf("a debt of fifteen is rested off in %v", rest)
	}
	if rest := b.Spend(r, 1, now.Add(time.Hour)); rest != 0 {
		t.Errorf("an hour later one rests %v", rest)
	}
}

// A flood of made-up names pushes out neither a registered VM nor one that keeps
// trying.
func TestRefusedOutlast(t *testing.T) {
	tab := table()
	tab.Know("known")
	tab.Refuse("known", "auth-failed", false)
	for range 3 {
		tab.Refuse("trying", "unknown-vm", false)
	}
	for i := range 1000 {
		tab.Refuse(string(rune('a'+i%26))+time.Duration(i).String(), "unknown-vm", false)
	}
	found := make(map[string]bool)
	for _, r := range tab.Refused() {
		found[r.VM] = true
	}
	if len(found) != maxRefused || !found["known"] || !found["trying"] {
		t.Errorf("%d are listed: %v", len(found), found)
	}
}

// A fight is over in time where no session's deadline has it looked at before.
func TestContendedEndsInTime(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		tab := New(Options{ReachableWithin: time.Hour, SessionTimeout: time.Hour})
		if _, _, err := tab.Connect("web1", &fakeSession{}, "127.0.0.1:1", nil); err != nil {
			t.Fatal(err)
		}
		tab.Sweep()
		for range freeReplacements + 1 {
			tab.Contend("web1", time.Second)
		}
		tab.Changes()
		sweepFor(tab, calmAfter+time.Second)
		if _, touched := tab.Changes(); len(touched) == 0 || tab.Snapshot(nil)[0].Contended {
			t.Errorf("%v changed, and it is contended: %v", touched, tab.Snapshot(nil)[0].Contended)
		}
	})
}
