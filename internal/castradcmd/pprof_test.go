package castradcmd

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/sdnotify"
)

// profiled serves profiles on a Unix socket that everybody may connect to.
func profiled(t *testing.T) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "pprof")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	for p := path; p != os.TempDir() && p != "/"; p = filepath.Dir(p) {
		if err := os.Chmod(p, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1) // one value, whenever it is looked for
	go func() {
		done <- servePages(ctx, sdnotify.Passed{Use: sdnotify.SocketPprof, Listener: ln}, func() bus.Status { return bus.Status{} })
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return path
}

// ask sends a request over conn and gives the answer.
func ask(t *testing.T, conn net.Conn, page string) (code int, body []byte) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(context.Context, string, string) (net.Conn, error) { return conn, nil },
	}}
	resp, err := client.Get("http://castrad" + page)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, body
}

func TestProfiles(t *testing.T) {
	path := profiled(t)
	gzip := []byte{0x1f, 0x8b} // RFC 1952; a profile is compressed
	for page, begins := range map[string][]byte{
		"/debug/pprof/":                  []byte("<html>"),
		"/debug/pprof/heap":              gzip,
		"/debug/pprof/goroutine":         gzip,
		"/debug/pprof/profile?seconds=1": gzip,
		"/debug/pprof/trace?seconds=0.1": []byte("go 1."),
	} {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		if code, body := ask(t, conn, page); code != http.StatusOK || !bytes.HasPrefix(body, begins) {
			t.Errorf("%s: %d %.40q", page, code, body)
		}
	}
}

// Whoever may connect to the socket may not look into memory for that.
func TestProfilesAreNotForOthers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to be somebody else")
	}
	path := profiled(t)
	type dialled struct {
		conn net.Conn
		err  error
	}
	done := make(chan dialled) // unbuffered: somebody waits
	go func() {
		runtime.LockOSThread() // and it ends with the goroutine: it is nobody's from here on
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, 65534, 65534, 65534); errno != 0 {
			done <- dialled{err: errno}
			return
		}
		conn, err := net.Dial("unix", path)
		done <- dialled{conn, err}
	}()
	d := <-done
	if d.err != nil {
		t.Fatal(d.err)
	}
	if code, body := ask(t, d.conn, "/debug/pprof/heap"); code != http.StatusForbidden || !strings.Contains(string(body), "root") {
		t.Errorf("nobody gets %d %.80q", code, body)
	}
}

// The other pages, which anybody may have, hold no profile, and without the socket
// there is nothing to take one from.
func TestProfilesAreOff(t *testing.T) {
	for _, use := range []string{sdnotify.SocketHealth, sdnotify.SocketMetrics} {
		if _, body := get(t, use, bus.Status{Broker: bus.Broker{State: "running"}}); strings.Contains(body, "pprof") || strings.Contains(body, "goroutine") {
			t.Errorf("%s: %.200q", use, body)
		}
	}
	defer func(rate int) { runtime.MemProfileRate = rate }(runtime.MemProfileRate)
	noProfiles()
	if runtime.MemProfileRate != 0 {
		t.Error("allocations are sampled")
	}
}
