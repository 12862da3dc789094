package cli

import (
	"errors"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bubble"
	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/dbusclient"
)

// at is a fake whose VMs' state depends on the time since it was made.
func at(state func(elapsed time.Duration) ([]bus.VM, error)) *fakeClient {
	start := time.Now()
	return &fakeClient{
		changed: make(chan struct{}, 1),
		status: func([]string) (bus.Status, error) {
			vms, err := state(time.Since(start))
			return bus.Status{VMs: vms}, err
		},
	}
}

func TestWait(t *testing.T) {
	up := func(name string) bus.VM { return bus.VM{VM: name, Reachable: true} }
	sub := func(name string) bus.VM { return bus.VM{VM: name, Reachable: true, BusSubscribed: true} }
	down := func(name string) bus.VM { return bus.VM{VM: name} }
	for name, c := range map[string]struct {
		args  []string
		state func(time.Duration) ([]bus.VM, error)
		event time.Duration // when a change is signalled; 0: never
		code  int
		err   string
		took  time.Duration
	}{
		"there already": {
			args:  []string{"web1"},
			state: func(time.Duration) ([]bus.VM, error) { return []bus.VM{up("web1")}, nil },
		},
		"a signal wakes it": {
			args: []string{"web1", "web2"}, event: 700 * time.Millisecond, took: 700 * time.Millisecond,
			state: func(e time.Duration) ([]bus.VM, error) {
				if e < 700*time.Millisecond {
					return []bus.VM{up("web1")}, nil // web2 has not been seen yet
				}
				return []bus.VM{up("web1"), up("web2")}, nil
			},
		},
		"a lost signal": {
			args: []string{"web1"}, took: reread,
			state: func(e time.Duration) ([]bus.VM, error) {
				if e < time.Second {
					return []bus.VM{down("web1")}, nil
				}
				return []bus.VM{up("web1")}, nil
			},
		},
		"one deadline names the missing": {
			args: []string{"web1", "web2", "web3", "--timeout", "5s"}, took: 5 * time.Second,
			state: func(time.Duration) ([]bus.VM, error) { return []bus.VM{up("web1"), down("web2")}, nil },
			code:  ExitUnreachable, err: "not reachable within 5s: web2, web3;",
		},
		"the last moment counts": {
			args: []string{"web1", "--timeout", "5s"}, took: 5 * time.Second,
			state: func(e time.Duration) ([]bus.VM, error) {
				if e < 5*time.Second {
					return nil, nil
				}
				return []bus.VM{up("web1")}, nil
			},
		},
		"once": {
			args:  []string{"web1", "--timeout", "0"},
			state: func(time.Duration) ([]bus.VM, error) { return []bus.VM{down("web1")}, nil },
			code:  ExitUnreachable, err: "web1",
		},
		"subscribed": {
			args: []string{"web1", "web2", "--for", "subscribed", "--timeout=1s"}, took: time.Second,
			state: func(time.Duration) ([]bus.VM, error) { return []bus.VM{sub("web1"), up("web2")}, nil },
			code:  ExitUnreachable, err: "not subscribed within 1s: web2;",
		},
		"unreachable, and never seen is that": {
			args:  []string{"web1", "web2", "--for", "unreachable"},
			state: func(time.Duration) ([]bus.VM, error) { return []bus.VM{down("web1")}, nil },
		},
		"all": {
			args: []string{"--all", "--timeout=1s"}, took: time.Second,
			state: func(time.Duration) ([]bus.VM, error) { return []bus.VM{up("web1"), down("web2")}, nil },
			code:  ExitUnreachable, err: "web2;",
		},
		"all of none": {
			args: []string{"--all", "--timeout=1s"}, took: time.Second,
			state: func(time.Duration) ([]bus.VM, error) { return nil, nil },
			code:  ExitUnreachable, err: "any VM;",
		},
		"castrad restarts": {
			args: []string{"web1", "--timeout=9s"}, took: 4 * time.Second,
			state: func(e time.Duration) ([]bus.VM, error) {
				switch {
				case e == 0:
					return []bus.VM{down("web1")}, nil
				case e < 3*time.Second:
					return nil, dbusclient.ErrNotRunning
				}
				return []bus.VM{up("web1")}, nil
			},
		},
		"castrad stays away": {
			args: []string{"web1", "--timeout=9s"}, took: 9 * time.Second,
			state: func(e time.Duration) ([]bus.VM, error) {
				if e == 0 {
					return nil, nil
				}
				return nil, dbusclient.ErrNotRunning
			},
			code: ExitNoCastrad, err: "daemon not running",
		},
		"no castrad at all": {
			args:  []string{"web1"},
			state: func(time.Duration) ([]bus.VM, error) { return nil, dbusclient.ErrNotRunning },
			code:  ExitNoCastrad, err: "daemon not running",
		},
		"another error": {
			args:  []string{"web1"},
			state: func(time.Duration) ([]bus.VM, error) { return nil, errors.New("odd") },
			code:  ExitFailed, err: "odd",
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble.Test(t, func(t *testing.T) {
				client := at(c.state)
				if c.event > 0 {
					time.AfterFunc(c.event, func() { client.changed <- struct{}{} })
				}
				began := time.Now()
				r := run(t, client, append([]string{"wait"}, c.args...))
				r.want(t, c.code, "", c.err)
				if took := time.Since(began); took != c.took {
					t.Errorf("took %v, want %v", took, c.took)
				}
			})
		})
	}
}

func TestWaitUsage(t *testing.T) {
	for _, args := range [][]string{
		{"wait"},
		{"wait", "--all", "web1"},
		{"wait", "web1", "--for", "lunch"},
		{"wait", "web1", "--timeout", "-1s"},
		{"wait", "a b"},
	} {
		run(t, &fakeClient{}, args).want(t, ExitUsage, "", "see: castractl wait --help")
	}
}
