package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
)

// stateSignals is castrad's state as D-Bus signals it.
type stateSignals struct {
	*lab
	signals chan *dbus.Signal
}

func (l *lab) states() *stateSignals {
	l.Helper()
	conn, err := dbus.Connect(l.hostBus)
	if err != nil {
		l.Fatal(err)
	}
	l.Cleanup(func() { _ = conn.Close() })
	s := &stateSignals{l, make(chan *dbus.Signal, 64)} // godbus queues what it has no room for
	conn.Signal(s.signals)
	if err := conn.AddMatchSignal(dbus.WithMatchObjectPath("/org/castra/Bus1"), dbus.WithMatchMember("PropertiesChanged")); err != nil {
		l.Fatal(err)
	}
	return s
}

// until waits until the state is signalled, with faults unless all is well.
func (s *stateSignals) until(want string) {
	s.Helper()
	last := "nothing"
	for end := time.After(hang); ; {
		select {
		case got := <-s.signals:
			if len(got.Body) != 3 || got.Body[0] != "org.castra.Bus1.Manager" {
				continue
			}
			changed := got.Body[1].(map[string]dbus.Variant)
			last = fmt.Sprint(changed)
			faults := changed["Faults"].Value()
			if changed["State"].Value() == want && faults != nil && (len(faults.([][]any)) > 0) == (want != "running") {
				return
			}
		case <-end:
			s.Fatalf("D-Bus never signals %q; the last was %s", want, last)
		}
	}
}

// The disk does not answer for longer than castrad lets its guests wait.
func TestFaultStalled(t *testing.T) {
	f := startFaultLab(t, "")
	end := f.inject("fdatasync", "delay_enter=8s")
	f.untilState("degraded: disk stalled")
	f.advised("event-log", "disk stalled", "keeps the disk under "+f.path("log"))
	f.serves()
	f.replays()
	f.until("publishes are refused", func() error {
		if f.load.refusedWith("storage-stalled") == 0 {
			return errors.New("none is")
		}
		return nil
	})
	end()
	f.recovers("storage-stalled")
}

// traced tells whether strace has all of castrad's threads: before, a call passes by it.
func (f *faultLab) traced() bool {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", f.castrad.Process.Pid))
	for _, thread := range threads {
		b, err := os.ReadFile(thread)
		if err == nil && bytes.Contains(b, []byte("TracerPid:\t0\n")) { // else it has ended
			return false
		}
	}
	return len(threads) > 0
}
