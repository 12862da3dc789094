// Package e2e tests the built commands (bin/) as real processes, each daemon with a
// message bus of its own. Its tests run where CASTRA_E2E=1 says so, as `make test`
// does after building and installing what they need.
package e2e

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/reserve"
)

// hang bounds each wait for something that takes a moment at most on an idle machine:
// it ends a test that will never pass, and is no measure of speed.
const hang = 60 * time.Second

// shownLog is how much of what a process said last a failed test shows, in bytes.
const shownLog = 64 << 10

// A lab is a directory with a host's castrad and whatever else a test starts beside
// it. All of it ends with the test, which fails if a process must be killed.
type lab struct {
	testing.TB
	dir     string
	hostBus string // D-Bus address
	port    int    // castrad's, on 127.0.0.1
}

func newLab(t testing.TB) *lab {
	t.Helper()
	endToEnd(t)
	if err := os.MkdirAll("../.run", 0o755); err != nil {
		t.Fatal(err)
	}
	// Not t.TempDir: a /tmp in memory may be too small, a TMPDIR too long for a socket.
	dir, err := os.MkdirTemp("../.run", "e2e.")
	if err != nil {
		t.Fatal(err)
	}
	if dir, err = filepath.Abs(dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return &lab{TB: t, dir: dir}
}

// endToEnd skips what is no unit test where those run.
func endToEnd(t testing.TB) {
	t.Helper()
	if os.Getenv("CASTRA_E2E") != "1" {
		t.Skip("needs a machine of its own: set CASTRA_E2E=1, or run `make test`")
	}
}

// path is a file of the lab's.
func (l *lab) path(name string) string { return filepath.Join(l.dir, name) }

// write makes a file of the lab's and returns its path.
func (l *lab) write(name, format string, args ...any) string {
	l.Helper()
	if err := os.WriteFile(l.path(name), fmt.Appendf(nil, format, args...), 0o644); err != nil {
		l.Fatal(err)
	}
	return l.path(name)
}

// start runs a process in the lab's directory until the test ends, its output kept in
// NAME.log and shown if the test fails. A test that ends it earlier waits for it.
func (l *lab) start(name string, env []string, argv ...string) *exec.Cmd {
	l.Helper()
	return l.startWith(name, env, nil, argv...)
}

// startWith is start for a process that gets files, too, as descriptors 3 and so on.
func (l *lab) startWith(name string, env []string, files []*os.File, argv ...string) *exec.Cmd {
	l.Helper()
	out, err := os.Create(l.path(name + ".log"))
	if err != nil {
		l.Fatal(err)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = l.dir, append(os.Environ(), env...), out, out, files
	// Should the test binary be killed, no clean-up runs.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		l.Fatal(err)
	}
	l.Cleanup(func() {
		defer out.Close()
		l.stop(name, cmd)
		if l.Failed() {
			log, _ := os.ReadFile(out.Name())
			log = log[max(0, len(log)-shownLog):]
			l.Logf("%s: %v, having said:\n%s", name, cmd.ProcessState, log)
		}
	})
	return cmd
}

// stop asks a process to end and waits for it.
func (l *lab) stop(name string, cmd *exec.Cmd) {
	_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended by itself
	kill := time.AfterFunc(hang, func() {
		l.Errorf("%s did not end on SIGTERM", name)
		_ = cmd.Process.Kill()
	})
	defer kill.Stop()
	_ = cmd.Wait() // how it ended is its test's to judge
}

// bus starts a private message bus and returns its address. At the address of the same
// name that is no file, those reach it who may not enter the directory, see asNobody.
func (l *lab) bus(name string) string {
	l.Helper()
	address := "unix:path=" + l.path(name+".bus")
	conf := l.write(name+"-bus.conf", `<busconfig><type>session</type><listen>%s</listen><listen>%s</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy></busconfig>`, address, abstract(address))
	l.start(name+"-bus", nil, "dbus-daemon", "--nofork", "--nopidfile", "--nosyslog", "--config-file="+conf)
	l.until("the message bus is there", func() error {
		_, err := os.Stat(l.path(name + ".bus"))
		return err
	})
	return address
}

// abstract is the abstract address with the name of a file's (unix(7)).
func abstract(address string) string {
	return strings.Replace(address, "unix:path=", "unix:abstract=", 1)
}

// castrad starts the host's daemon, and returns when it answers.
func (l *lab) castrad() {
	l.Helper()
	l.hostBus = l.bus("host")
	l.port = reserve.Port(l.TB)
	l.write("castrad.toml", `[broker]
listen = ["127.0.0.1:%d"]
vms_dir = %q
[store]
state_dir = %q
log_dir = %q
`, l.port, l.path("vms.d"), l.path("state"), l.path("log"))
	l.startCastrad("castrad")
	l.answers()
}

// loadedConfig writes the configuration of a castrad that lets any guest publish
// any amount; store is what else its [store] is to say.
func (l *lab) loadedConfig(store string) {
	l.Helper()
	l.hostBus = l.bus("host")
	l.port = reserve.Port(l.TB)
	l.writeLoaded(store)
}

// writeLoaded is loadedConfig for a lab that has had one.
func (l *lab) writeLoaded(store string) {
	l.Helper()
	l.write("castrad.toml", `[broker]
listen = ["127.0.0.1:%d"]
vms_dir = %q
unknown_vms = "accept"
guest_topics = ["bench.>"]
session_timeout = "10m"
[limits]
publish_rate = 100000000
publish_burst = 100000000
publish_bytes = "1GiB"
[store]
state_dir = %q
log_dir = %q
%s
`, l.port, l.path("vms.d"), l.path("state"), l.path("log"), store)
}

// startCastrad starts castrad with the lab's configuration; its output is in
// NAME.log.
func (l *lab) startCastrad(name string) *exec.Cmd {
	l.Helper()
	return l.start(name, []string{"DBUS_SYSTEM_BUS_ADDRESS=" + l.hostBus}, bin(l.TB, "castrad"), "--config", l.path("castrad.toml"))
}

// answers waits until castrad does.
func (l *lab) answers() {
	l.Helper()
	l.until("castrad answers", func() error {
		_, err := l.tryCastractl("status")
		return err
	})
}

// castractl runs it beside castrad and returns its standard output; it must succeed.
func (l *lab) castractl(args ...string) string {
	l.Helper()
	out, err := l.tryCastractl(args...)
	if err != nil {
		l.Fatal(err)
	}
	return out
}

func (l *lab) tryCastractl(args ...string) (string, error) {
	l.Helper()
	// Beyond every timeout that a test gives to castractl itself.
	ctx, cancel := context.WithTimeout(l.Context(), 10*time.Minute)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, bin(l.TB, "castractl"), args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = l.dir, &stdout, &stderr
	cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS="+l.hostBus)
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("castractl %s: %w: %s", strings.Join(args, " "), err, &stderr)
	}
	return stdout.String(), nil
}

// following starts a castractl bus tail that its caller ends, and gives the
// lines that it prints.
func (l *lab) following(args ...string) (tail *exec.Cmd, lines *bufio.Scanner) {
	l.Helper()
	tail = exec.Command(bin(l.TB, "castractl"), append([]string{"bus", "tail", "-o", "json"}, args...)...)
	tail.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS="+l.hostBus)
	out, err := tail.StdoutPipe()
	if err == nil {
		err = tail.Start()
	}
	if err != nil {
		l.Fatal(err)
	}
	return tail, bufio.NewScanner(out)
}

// until repeats cond until it succeeds.
func (l *lab) until(what string, cond func() error) {
	l.Helper()
	l.within(hang, what, cond)
}

// within is until for what takes longer than hang.
func (l *lab) within(d time.Duration, what string, cond func() error) {
	l.Helper()
	end := time.Now().Add(d)
	for {
		err := cond()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			l.Fatalf("waiting until %s: %v", what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// untilFile waits until a file of the lab's holds text.
func (l *lab) untilFile(name, text string) {
	l.Helper()
	l.until(name+" holds "+text, func() error {
		got, err := os.ReadFile(l.path(name))
		if err == nil && !bytes.Contains(got, []byte(text)) {
			err = fmt.Errorf("it holds %q", got)
		}
		return err
	})
}

// bin is the path of a built command.
func bin(t testing.TB, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("../bin", name))
	if err == nil {
		_, err = os.Stat(path)
	}
	if err != nil {
		t.Fatalf("%v; run `make build` first", err)
	}
	return path
}
