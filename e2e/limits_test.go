package e2e

import (
	"fmt"
	"net"
	"os"
	"reflect"
	"strings"
	"sync"
	"testing"

	"github.com/godbus/dbus/v5"

	"github.com/castrabus/castra/internal/config"
	"github.com/castrabus/castra/internal/reserve"
)

// A reachedLimit is what reaches a limit, the name under which it is counted, and what
// bus-events.jsonl tells of it.
type reachedLimit struct {
	reach                   func(t *testing.T, s *siege)
	counted                 string
	reason, action, because string
}

// everyLimit has each key of the configuration that limits guests.
var everyLimit = map[string]reachedLimit{
	"limits.max_sessions": {
		counted: "max_sessions", reason: "queue_full", action: "reject", because: "max_sessions: ",
		reach: func(t *testing.T, s *siege) {
			for i := range 9 {
				if g, _, err := s.join(fmt.Sprint("many", i), nil); err == nil {
					t.Cleanup(func() { _ = g.Close() })
				} else if !strings.Contains(err.Error(), "too-many-sessions") {
					t.Error(err)
				}
			}
		},
	},
	"limits.max_handshakes": {
		counted: "max_handshakes", reason: "queue_full", action: "disconnect", because: "max_handshakes: ",
		reach: func(t *testing.T, s *siege) {
			for range 17 {
				if g, err := s.dial(); err == nil {
					t.Cleanup(func() { _ = g.Close() })
				}
			}
		},
	},
	"limits.max_vms": {
		counted: "max_vms", reason: "queue_full", action: "reject", because: "max_vms: ",
		reach: func(t *testing.T, s *siege) {
			for i := range 4 {
				s.say(t, fmt.Sprintf("hello vm:stranger%d\n", i))
			}
		},
	},
	"limits.max_subscriptions": {
		counted: "max_subscriptions", reason: "queue_full", action: "reject", because: "max_subscriptions: ",
		reach: func(t *testing.T, s *siege) {
			s.speak(t, "subscribes", `{"type":"subscribe","topic":"a"}`, `{"type":"subscribe","topic":"b"}`, `{"type":"subscribe","topic":"c"}`)
		},
	},
	"limits.publish_rate":   publishLimit("rate", 12, 1),
	"limits.publish_burst":  publishLimit("burst", 11, 1),
	"limits.publish_bytes":  publishLimit("bytes", 4, 60_000),
	"limits.handshake_rate": handshakeLimit("rate"), "limits.handshake_burst": handshakeLimit("burst"),
	"limits.unsent_bytes": {
		counted: "unsent_bytes", reason: "slow_consumer", action: "disconnect", because: "lags by",
		reach: func(t *testing.T, s *siege) {
			g, _, err := s.join("deaf", nil)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = g.Close() })
			if err := g.Conn.(*net.TCPConn).SetReadBuffer(32 << 10); err != nil {
				t.Fatal(err)
			}
			payload := s.write("unsent.json", "%q", strings.Repeat("x", 50_000))
			for range 12 {
				s.castractl("bus", "publish", "--topic", "a.large", "@"+payload)
			}
			_ = g.frame(`{"type":"subscribe","topic":"a.large","sub":"a","from":"start"}`, `{"type":"subscribe","topic":"a.large","sub":"b","from":"start"}`)
		},
	},
	"store.vm_retention_size": {
		counted: "vm_retention_size", reason: "queue_full", action: "throttle", because: "vm_retention_size: ",
		reach: func(t *testing.T, s *siege) {
			payload := s.write("full.json", "%q", strings.Repeat("x", 50_000))
			for range 6 {
				s.castractl("bus", "publish", "--vm", "full", "@"+payload)
			}
		},
	},
}

// publishLimit is a guest that publishes n records of so many bytes at once.
func publishLimit(vm string, n, bytes int) (l reachedLimit) {
	l.counted, l.reason, l.action, l.because = "publish_rate", "rate_limited", "throttle", "publish_"+vm
	l.reach = func(t *testing.T, s *siege) {
		var frames []string
		for range n {
			frames = append(frames, `{"type":"publish","topic":"t","payload":"`+strings.Repeat("x", bytes)+`"}`)
		}
		s.speak(t, "publishes-"+vm, frames...)
	}
	return l
}

// handshakeLimit is a VM that connects again and again.
func handshakeLimit(vm string) (l reachedLimit) {
	l.counted, l.reason, l.action, l.because = "handshake_rate", "rate_limited", "reject", "handshake_rate: "
	l.reach = func(t *testing.T, s *siege) {
		var work sync.WaitGroup
		for range 12 {
			work.Go(func() { s.say(t, "hello vm:handshakes-"+vm+"\n") })
		}
		work.Wait()
	}
	return l
}

// say begins a handshake and reads the answer.
func (s *siege) say(t *testing.T, hello string) {
	g, err := s.dial()
	if err != nil {
		t.Log(err) // closed to make room for another
		return
	}
	defer g.Close()
	_, _ = g.Write([]byte(hello))
	_, _ = g.line()
}

// speak says frames in a session of vm, and reads their answers.
func (s *siege) speak(t *testing.T, vm string, frames ...string) {
	g, _, err := s.join(vm, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = g.Close() })
	go func() { _ = g.frame(frames...) }() // ends with the connection
	for range frames {
		if _, err := g.receive(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestEveryLimit reaches each limit that the configuration has, and sees it in
// status, on D-Bus, in bus-events.jsonl and in the journal.
func TestEveryLimit(t *testing.T) {
	for _, field := range reflect.VisibleFields(reflect.TypeFor[config.Limits]()) {
		if key := "limits." + field.Tag.Get("toml"); everyLimit[key].reach == nil {
			t.Errorf("%s is reached by no test", key)
		}
	}
	s := &siege{lab: newLab(t)}
	s.hostBus = s.bus("host")
	s.port = reserve.Port(t)
	s.write("castrad.toml", `[broker]
listen = ["127.0.0.1:%d"]
vms_dir = %q
unknown_vms = "accept"
handshake_timeout = "3s"
session_timeout = "4s"
[store]
state_dir = %q
log_dir = %q
vm_retention_size = "64KiB"
[limits]
max_sessions = 8
max_handshakes = 16
max_vms = 2
max_subscriptions = 2
publish_rate = 1
publish_burst = 10
publish_bytes = "64KiB"
handshake_rate = 1
handshake_burst = 5
unsent_bytes = "64KiB"
`, s.port, s.path("vms.d"), s.path("state"), s.path("log"))
	s.castrad = s.start("castrad", []string{"DBUS_SYSTEM_BUS_ADDRESS=" + s.hostBus}, bin(t, "castrad"), "--config", s.path("castrad.toml"))
	s.answers()
	names := []string{"vm", "add", "--no-key", "deaf", "full", "subscribes", "publishes-rate", "publishes-burst", "publishes-bytes", "handshakes-rate", "handshakes-burst"}
	for i := range 9 {
		names = append(names, fmt.Sprint("many", i))
	}
	s.castractl(names...)
	conn, err := dbus.Connect(s.hostBus)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	counts := func() map[string]uint64 {
		v, err := conn.Object("org.castra.Bus1", "/org/castra/Bus1").GetProperty("org.castra.Bus1.Manager.Limited")
		if err != nil {
			t.Fatal(err)
		}
		counts, ok := v.Value().(map[string]uint64)
		if !ok {
			t.Fatalf("the property Limited is %v", v)
		}
		return counts
	}
	for key, l := range everyLimit {
		t.Run(key, func(t *testing.T) {
			wait(t, "the guests before have left", func() error { // they take the sessions that there may be
				st, err := s.status()
				if err == nil && st.Broker.Sessions > 0 {
					err = fmt.Errorf("%d are there", st.Broker.Sessions)
				}
				return err
			})
			before := counts()[l.counted]
			l.reach(t, s)
			s.limited(t, l.counted, before+1)
			if after := counts(); after[l.counted] <= before {
				t.Errorf("D-Bus counts %v", after)
			}
			s.recorded(t, busEvents, "of "+key, func(e event) bool {
				return e.Reason == l.reason && e.Action == l.action && strings.Contains(e.Detail, l.because)
			})
			if out := s.castractl("status"); !strings.Contains(out, l.counted+" ") {
				t.Errorf("status shows %s", out)
			}
			wait(t, "the journal tells of "+key, func() error {
				log, err := os.ReadFile(s.path("castrad.log"))
				if err == nil && !strings.Contains(string(log), "limit="+l.counted) {
					err = fmt.Errorf("it is\n%s", log)
				}
				return err
			})
		})
	}
}
