package sdnotify

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// manager is the service manager's end: a datagram socket that is only ever looked
// into, so that a test under synctest does not block in it.
type manager int

func newManager(t *testing.T) manager {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	path := filepath.Join(t.TempDir(), "notify")
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	t.Setenv("NOTIFY_SOCKET", path)
	return manager(fd)
}

// told gives what has arrived since it was last asked, a string a datagram.
func (m manager) told(t *testing.T) []string {
	t.Helper()
	var all []string
	b := make([]byte, 4096)
	for {
		n, _, err := unix.Recvfrom(int(m), b, 0)
		if err == unix.EAGAIN {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, string(b[:n]))
	}
}

func TestNotify(t *testing.T) {
	m := newManager(t)
	for _, states := range [][]string{{Ready}, {Stopping, "STATUS=Ending"}} {
		if err := Notify(states...); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := m.told(t), []string{"READY=1", "STOPPING=1\nSTATUS=Ending"}; !slices.Equal(got, want) {
		t.Errorf("told %q, want %q", got, want)
	}
}

func TestNotifyWithoutManager(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	var s Status
	if err := Notify(Ready); err != nil {
		t.Error(err)
	}
	if err := s.Set("idle"); err != nil {
		t.Error(err)
	}
	// One that was promised and is not there is an error.
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "gone"))
	if err := Notify(Ready); err == nil {
		t.Error("a message that went nowhere is no error")
	}
}

func TestReloadingCarriesTheMonotonicTime(t *testing.T) {
	m := newManager(t)
	var before, after unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &before); err != nil {
		t.Fatal(err)
	}
	if err := Reloading(); err != nil {
		t.Fatal(err)
	}
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &after); err != nil {
		t.Fatal(err)
	}
	got := strings.Join(m.told(t), "|")
	match := regexp.MustCompile(`^RELOADING=1\nMONOTONIC_USEC=(\d+)$`).FindStringSubmatch(got)
	if match == nil {
		t.Fatalf("told %q", got)
	}
	if usec, err := strconv.ParseInt(match[1], 10, 64); err != nil || usec < before.Nano()/1000 || usec > after.Nano()/1000 {
		t.Errorf("the time is %s, which is not between %v and %v: %v", match[1], before, after, err)
	}
}

func TestStatusIsSentOnChangeOnly(t *testing.T) {
	m := newManager(t)
	var s Status
	set := func(line string) {
		t.Helper()
		if err := s.Set(line); err != nil {
			t.Fatal(err)
		}
	}
	set("one")
	set("one")
	set("two")
	set("a guest says: x\nMAINPID=1\x1b[31m")
	want := []string{"STATUS=one", "STATUS=two", "STATUS=a guest says: xMAINPID=1[31m"}
	if got := m.told(t); !slices.Equal(got, want) {
		t.Errorf("told %q, want %q", got, want)
	}

	// What did not arrive is sent again, though it is no change.
	socket := os.Getenv("NOTIFY_SOCKET")
	t.Setenv("NOTIFY_SOCKET", socket+"-gone")
	if err := s.Set("three"); err == nil {
		t.Error("a status that went nowhere is no error")
	}
	t.Setenv("NOTIFY_SOCKET", socket)
	set("three")
	if got := m.told(t); !slices.Equal(got, []string{"STATUS=three"}) {
		t.Errorf("told %q", got)
	}
}

func TestWatchdogInterval(t *testing.T) {
	own, other := strconv.Itoa(os.Getpid()), strconv.Itoa(os.Getppid())
	tests := []struct {
		usec, pid string
		want      time.Duration
		ok        bool
	}{
		{"30000000", own, 30 * time.Second, true},
		{"30000000", "", 30 * time.Second, true},
		{"30000000", other, 0, false},
		{"", own, 0, false},
		{"0", own, 0, false},
		{"soon", own, 0, false},
	}
	for _, tt := range tests {
		t.Setenv("WATCHDOG_USEC", tt.usec)
		t.Setenv("WATCHDOG_PID", tt.pid)
		if got, ok := WatchdogInterval(); got != tt.want || ok != tt.ok {
			t.Errorf("%q for process %q: %v, %v; want %v, %v", tt.usec, tt.pid, got, ok, tt.want, tt.ok)
		}
	}
}
