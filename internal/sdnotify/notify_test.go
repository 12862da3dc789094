package sdnotify

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// manager stands where systemd listens and gives what it is told.
func manager(t *testing.T) *net.UnixConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return conn
}

func read(t *testing.T, conn *net.UnixConn) string {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4096)
	n, err := conn.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n])
}

func TestStatusIsSentOnChangeOnly(t *testing.T) {
	conn := manager(t)
	var s Status
	for _, line := range []string{"one", "one", "two"} {
		if err := s.Set(line); err != nil {
			t.Fatal(err)
		}
	}
	if got := read(t, conn) + "," + read(t, conn); got != "STATUS=one,STATUS=two" {
		t.Errorf("got %q", got)
	}
	if err := Reloading(); err != nil {
		t.Fatal(err)
	}
	if got := read(t, conn); !strings.HasPrefix(got, "RELOADING=1\nMONOTONIC_USEC=") {
		t.Errorf("got %q", got)
	}
}

func TestWatchdogStarvesWhenAProbeFails(t *testing.T) {
	conn := manager(t)
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error, 100)
	healthy := make(chan bool, 1)
	healthy <- true
	ok := func(context.Context) error { return nil }
	sick := func(context.Context) error {
		h := <-healthy
		healthy <- h
		if h {
			return nil
		}
		return errors.New("stuck")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		RunWatchdog(ctx, 20*time.Millisecond, func(err error) { failed <- err }, ok, sick)
	}()
	if got := read(t, conn); got != "WATCHDOG=1" {
		t.Errorf("got %q", got)
	}
	<-healthy
	healthy <- false
	if err := <-failed; !strings.Contains(err.Error(), "stuck") {
		t.Errorf("told %v", err)
	}
	<-failed
	cancel()
	<-done
	// Whatever was sent before the probe failed is in the socket by now; nothing
	// may have been sent between the two failures.
}

// TestListeners runs this test binary again as systemd would start a service.
func TestListeners(t *testing.T) {
	if os.Getenv("CASTRA_TEST_PASSED") != "" {
		t.Setenv("LISTEN_PID", "") // replaced below: only now is the pid known
		os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
		passed, err := Listeners()
		if err != nil {
			os.Stdout.WriteString("error: " + err.Error() + "\n")
			return
		}
		for _, p := range passed {
			os.Stdout.WriteString("passed " + p.Use + " " + p.Listener.Addr().Network() + "\n")
		}
		if os.Getenv("LISTEN_FDS") != "" {
			os.Stdout.WriteString("the environment is still there\n")
		}
		return
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	unixl, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	tf, err := tcp.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	uf, err := unixl.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	plain, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		names string
		files []*os.File
		want  []string
	}{
		{"bus:health", []*os.File{tf, uf}, []string{"passed bus tcp", "passed health unix"}},
		{"castrad.socket", []*os.File{tf}, []string{"passed bus tcp"}},
		{"", []*os.File{tf}, []string{"passed bus tcp"}},
		{"buss", []*os.File{tf}, []string{`under the name "buss"`}},
		{"bus", []*os.File{plain}, []string{"no stream socket"}},
	} {
		cmd := exec.Command(os.Args[0], "-test.run=^TestListeners$", "-test.v")
		cmd.Env = append(os.Environ(), "CASTRA_TEST_PASSED=1", "LISTEN_FDS="+strconv.Itoa(len(c.files)), "LISTEN_FDNAMES="+c.names)
		cmd.ExtraFiles = c.files
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for _, want := range c.want {
			if !strings.Contains(string(out), want) || strings.Contains(string(out), "still there") {
				t.Errorf("names %q: got %s\nwant %s", c.names, out, want)
			}
		}
	}
}
