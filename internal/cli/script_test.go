package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/rogpeppe/go-internal/testscript"
	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/dbusapi"
)

func TestMain(m *testing.M) {
	// The runtime's own goroutine for signals, which the first to be told of one starts,
	// must not be started in a bubble.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	testscript.Main(m, map[string]func(){
		"castractl":    func() { os.Exit(Main(os.Args[1:], "0.1.0")) },
		"fake-castrad": fakeCastrad,
	})
}

// fakeCastrad is what the message bus starts when a script lets it: a castrad of
// its own process, until the bus has gone.
func fakeCastrad() {
	gone := make(chan struct{})
	server, err := dbusapi.Start(context.Background(), dbusapi.Options{
		Log: quietLog(), Bus: newScriptBus("host"),
		OnState: func(owned bool, _ error) {
			if !owned {
				close(gone)
			}
		},
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	end := make(chan os.Signal, 1) // one is enough
	signal.Notify(end, syscall.SIGTERM)
	select {
	case <-gone:
		os.Exit(0) // Close would wait for a bus that is no more
	case <-end:
		server.Close()
	}
}

func quietLog() *logrus.Entry {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return logrus.NewEntry(log)
}

// world is what one script has: a message bus, and perhaps a castrad on it.
type world struct {
	dir     string
	address string
	process *exec.Cmd
	bus     *scriptBus
	server  *dbusapi.Server
	systemd *dbus.Conn
}

type worldKey struct{}

func TestScript(t *testing.T) {
	if _, err := exec.LookPath("dbus-daemon"); err != nil {
		t.Fatalf("%v (apt-get install dbus-daemon)", err)
	}
	testscript.Run(t, testscript.Params{
		Dir:             filepath.Join("testdata", "script"),
		UpdateScripts:   *update,
		ContinueOnError: false,
		Setup: func(env *testscript.Env) error {
			w, err := newWorld(env)
			if err != nil {
				return err
			}
			env.Values[worldKey{}] = w
			env.Defer(w.close)
			env.Setenv("DBUS_SYSTEM_BUS_ADDRESS", w.address)
			env.Setenv("TZ", "UTC")
			env.Setenv("TERM", "xterm")
			env.Setenv("COLUMNS", "80")
			// Built with the race detector, each castractl would sleep a second at its end.
			env.Setenv("GORACE", "atexit_sleep_ms=0")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"code":    cmdCode,
			"castrad": cmdCastrad,
			"systemd": cmdSystemd,
			"await":   cmdAwait,
		},
	})
}

func newWorld(env *testscript.Env) (*world, error) {
	dir, err := os.MkdirTemp("", "castractl") // short: a socket's path has 107 bytes
	if err != nil {
		return nil, err
	}
	w := &world{dir: dir, address: "unix:path=" + filepath.Join(dir, "bus")}
	env.Defer(func() { os.RemoveAll(dir) })
	return w, errors.Join(w.configure(""), os.Mkdir(filepath.Join(dir, "services"), 0o755), w.start())
}

// configure writes the message bus's configuration, with a rule of its own.
func (w *world) configure(rule string) error {
	config := `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><listen>` + w.address + `</listen><auth>EXTERNAL</auth><servicedir>` + w.dir + `/services</servicedir>
<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/><allow user="*"/>` + rule + `</policy>
</busconfig>`
	return os.WriteFile(filepath.Join(w.dir, "config"), []byte(config), 0o644)
}

// start runs the message bus.
func (w *world) start() error {
	w.process = exec.Command("dbus-daemon", "--nofork", "--nopidfile", "--print-address", "--config-file="+filepath.Join(w.dir, "config"))
	w.process.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS="+w.address)
	out, err := w.process.StdoutPipe()
	if err != nil {
		return err
	}
	if err := w.process.Start(); err != nil {
		return err
	}
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		return fmt.Errorf("the message bus gave no address: %w", err)
	}
	return nil
}

func (w *world) close() {
	if w.server != nil {
		w.server.Close()
	}
	if w.systemd != nil {
		w.systemd.Close()
	}
	_ = w.process.Process.Kill()
	_ = w.process.Wait()
}

func worldOf(ts *testscript.TestScript) *world { return ts.Value(worldKey{}).(*world) }

// cmdCode: code N program [args…], which is to end with exit code N.
func cmdCode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: code N program [args…]")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		exit, ok := errors.AsType[*exec.ExitError](err)
		if !ok {
			ts.Fatalf("running %s: %v", args[1], err)
		}
		got = exit.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// cmdCastrad runs and steers the script's castrad:
//
//	castrad start [guest]
//	castrad stop
//	castrad activatable                 the message bus starts one when asked
//	castrad vm NAME reachable|subscribed|unreachable
//	castrad record VM TOPIC PAYLOAD     a guest publishes
//	castrad gap FROM TO
//	castrad refuse CODE REASON          of every publish from here on
//	castrad answer TOPIC PAYLOAD        its VM answers each request with it
//	castrad listen ADDRESS              it says that it listens there
//	castrad turned-away NAME REASON
//	castrad forbid METHOD               the message bus lets nobody call it
//	castrad asked NAME                  wait until it was asked for NAME's state
func cmdCastrad(ts *testscript.TestScript, neg bool, args []string) {
	w := worldOf(ts)
	if neg || len(args) == 0 {
		ts.Fatalf("usage: castrad COMMAND")
	}
	switch args[0] {
	case "start":
		if w.bus == nil {
			w.bus = newScriptBus("host")
		}
		opts := dbusapi.Options{Address: w.address, Log: quietLog(), Bus: w.bus, Registry: w.bus}
		if len(args) > 1 {
			w.bus.kind, opts.Registry = args[1], nil
		}
		server, err := dbusapi.Start(context.Background(), opts)
		ts.Check(err)
		w.server = server
	case "stop":
		w.server.Close()
		w.server = nil
	case "activatable":
		program, err := exec.LookPath("fake-castrad")
		ts.Check(err)
		text := "[D-BUS Service]\nName=" + dbusapi.BusName + "\nExec=" + program + "\n"
		ts.Check(os.WriteFile(filepath.Join(w.dir, "services", dbusapi.BusName+".service"), []byte(text), 0o644))
	case "vm":
		w.bus.set(args[1], args[2])
	case "record":
		w.bus.mu.Lock()
		w.bus.record(args[1], bus.PublishRequest{Topic: args[2], Payload: []byte(args[3])})
		w.bus.mu.Unlock()
	case "gap":
		from, err := strconv.ParseUint(args[1], 10, 64)
		ts.Check(err)
		to, err := strconv.ParseUint(args[2], 10, 64)
		ts.Check(err)
		w.bus.gap(from, to)
	case "refuse":
		w.bus.mu.Lock()
		w.bus.refusal = bus.Errorf(bus.Code(args[1]), "%s", args[2])
		w.bus.mu.Unlock()
	case "listen":
		w.bus.mu.Lock()
		w.bus.listen = args[1]
		w.bus.mu.Unlock()
	case "answer":
		w.bus.mu.Lock()
		w.bus.answers[args[1]] = args[2]
		w.bus.mu.Unlock()
	case "turned-away":
		w.bus.mu.Lock()
		w.bus.refused = append(w.bus.refused, bus.Refused{VM: args[1], Reason: args[2], AgeMS: 4000})
		w.bus.mu.Unlock()
	case "forbid":
		ts.Check(w.configure(`<deny send_interface="` + dbusapi.ManagerInterface + `" send_member="` + args[1] + `"/>`))
		conn, err := dbus.Connect(w.address)
		ts.Check(err)
		defer conn.Close()
		ts.Check(conn.BusObject().Call("org.freedesktop.DBus.ReloadConfig", 0).Err)
	case "asked":
		eventually(ts, "castrad is asked for "+args[1], func() bool {
			w.bus.mu.Lock()
			defer w.bus.mu.Unlock()
			return slices.Contains(w.bus.asked, args[1])
		})
	default:
		ts.Fatalf("castrad cannot %q", args[0])
	}
}

// fakeSystemd tells that castrad's socket listens, and castrad's own state.
type fakeSystemd struct{ state string }

func (fakeSystemd) LoadUnit(name string) (dbus.ObjectPath, *dbus.Error) {
	_, kind, _ := strings.Cut(name, ".")
	return dbus.ObjectPath("/" + kind), nil
}

func (s fakeSystemd) Get(m dbus.Message, _, _ string) (dbus.Variant, *dbus.Error) {
	if m.Headers[dbus.FieldPath].Value() == dbus.ObjectPath("/socket") {
		return dbus.MakeVariant("active"), nil
	}
	return dbus.MakeVariant(s.state), nil
}

// cmdSystemd: systemd STATE puts on the message bus a systemd that gives castrad
// this state.
func cmdSystemd(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: systemd STATE")
	}
	w := worldOf(ts)
	const name = "org.freedesktop.systemd1"
	if w.systemd != nil {
		// The message bus sees a connection end at any time, and has the name by then.
		_, err := w.systemd.ReleaseName(name)
		ts.Check(errors.Join(err, w.systemd.Close()))
	}
	conn, err := dbus.Connect(w.address)
	ts.Check(err)
	w.systemd = conn
	ts.Check(conn.Export(fakeSystemd{args[0]}, "/org/freedesktop/systemd1", name+".Manager"))
	for _, path := range []dbus.ObjectPath{"/socket", "/service"} {
		ts.Check(conn.Export(fakeSystemd{args[0]}, path, "org.freedesktop.DBus.Properties"))
	}
	got, err := conn.RequestName(name, dbus.NameFlagDoNotQueue)
	ts.Check(err)
	if got != dbus.RequestNameReplyPrimaryOwner {
		ts.Fatalf("the message bus answers %d: somebody has %s still", got, name)
	}
}

// cmdAwait: await FILE TEXT, until the file, which a background command writes,
// holds the text.
func cmdAwait(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: await FILE TEXT")
	}
	eventually(ts, args[0]+" holds "+args[1], func() bool {
		text, err := os.ReadFile(ts.MkAbs(args[0]))
		return err == nil && strings.Contains(string(text), args[1])
	})
}

// eventually waits until cond holds. The bound asserts nothing: it turns a hang
// into a failure.
func eventually(ts *testscript.TestScript, what string, cond func() bool) {
	for end := time.Now().Add(30 * time.Second); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			ts.Fatalf("never: %s", what)
		}
	}
}
