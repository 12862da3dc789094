package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// profileDir is the variable that names a directory for profiles of castrad while
// benchmarks measure it: look at one with `go tool pprof -top FILE`.
const profileDir = "CASTRA_BENCH_PROFILE"

// profiledCastrad is startCastrad, with the pprof socket passed in if there are to be
// profiles: without it castrad samples nothing.
func (l *lab) profiledCastrad(name string) *exec.Cmd {
	l.Helper()
	if os.Getenv(profileDir) == "" {
		return l.startCastrad(name)
	}
	_ = os.Remove(l.path("pprof")) // the one of a castrad before
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: l.path("pprof")})
	if err != nil {
		l.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	defer ln.Close()
	f, err := ln.File()
	if err != nil {
		l.Fatal(err)
	}
	defer f.Close()
	env := []string{"DBUS_SYSTEM_BUS_ADDRESS=" + l.hostBus, "LISTEN_FDS=1", "LISTEN_FDNAMES=pprof"}
	return l.startWith(name, env, []*os.File{f}, "sh", "-c", `LISTEN_PID=$$ exec "$@"`, "sh", bin(l.TB, "castrad"), "--config", l.path("castrad.toml"))
}

// profile takes one of what castrad does in the next d, if there are to be any; done
// waits for it. what says of what it is.
func (l *lab) profile(what string, d time.Duration) (done func()) {
	return l.fetchProfile(what+".cpu", fmt.Sprintf("profile?seconds=%d", max(1, int(d.Seconds()))))
}

// heapProfile takes one of what castrad has in use, if there are to be any.
func (l *lab) heapProfile() { l.fetchProfile("heap", "heap?gc=1")() }

// fetchProfile writes what net/http/pprof answers into a file, in the background.
func (l *lab) fetchProfile(what, query string) (done func()) {
	dir := os.Getenv(profileDir)
	if dir == "" {
		return func() {}
	}
	name := filepath.Join(dir, strings.ReplaceAll(l.Name(), "/", "-")+"-"+what+".pb.gz")
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", l.path("pprof"))
	}}}
	ended := make(chan error, 1) // for the one result
	go func() {
		answer, err := client.Get("http://castrad/debug/pprof/" + query)
		if err == nil {
			defer answer.Body.Close()
			var all []byte
			if all, err = io.ReadAll(answer.Body); err == nil {
				err = os.WriteFile(name, all, 0o644)
			}
		}
		ended <- err
	}()
	return func() {
		if err := <-ended; err != nil {
			l.Errorf("no profile: %v", err)
		}
	}
}
