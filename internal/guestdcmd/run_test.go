package guestdcmd

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/dbusclient"
	"github.com/castrabus/castra/internal/reserve"
	"github.com/castrabus/castra/internal/wire"
)

// hang bounds every wait of these tests; none should come near it.
const hang = 30 * time.Second

// asDaemon in the environment makes this test binary castra-guestd.
const asDaemon = "CASTRA_TEST_AS_GUESTD"

func TestMain(m *testing.M) {
	if os.Getenv(asDaemon) != "" {
		os.Exit(Main("test", os.Args[1:], os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

func TestArguments(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := write("good.toml", "[bus]\nsubscribe = [\"vm:self\", \"a.>\"]\n")
	unknown := write("unknown.toml", "[bus]\n\nspool = 1\n")
	pattern := write("pattern.toml", "[bus]\nsubscribe = [\"a*\"]\n")
	forbidden := write("forbidden.toml", "[bus]\nsubscribe = [\"a\", \"castra.presence\"]\n")
	nameless := write("nameless.toml", "[identity]\nvm = \"-x\"\n")
	reserved := write("reserved.toml", "[identity]\nvm = \"host\"\n")
	for _, tt := range []struct {
		args   []string
		status int
		stdout string
		stderr string // part of it
	}{
		{[]string{"--version"}, 0, "castra-guestd test\n", ""},
		{[]string{"--help"}, 0, "", "-check-config"},
		{[]string{"--check-config", "--config", good}, 0, good + ": the configuration is good\n", ""},
		{[]string{"--check-config", "--config", unknown}, 1, "", unknown + ", line 3: bus.spool: unknown key"},
		{[]string{"--config", pattern, "--check-config"}, 1, "", "bus.subscribe"},
		{[]string{"--config", forbidden, "--check-config"}, 1, "", forbidden + ", line 2: bus.subscribe: topics beginning castra. are heard by the host alone"},
		{[]string{"--config", nameless, "--check-config"}, 1, "", nameless + `: vm under [identity] gives "-x", which is no VM's name`},
		{[]string{"--config", reserved, "--check-config"}, 1, "", reserved + `: vm under [identity] gives "host", which is the host's own name`},
		{[]string{"--check-config", "--config", dir + "/none"}, 1, "", "castra-guestd: reading the configuration"},
		{[]string{"--nonsense"}, 2, "", "nonsense"},
		{[]string{"start"}, 2, "", `unexpected argument "start"`},
	} {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			status := Main("test", tt.args, &stdout, &stderr)
			if status != tt.status || stdout.String() != tt.stdout || !strings.Contains(stderr.String(), tt.stderr) {
				t.Errorf("status %d\n%s%s", status, &stdout, &stderr)
			}
		})
	}
}

// lab is a directory with what a daemon needs: a configuration, a service manager
// to notify, and a host's address at which nobody listens at first.
type lab struct {
	t       *testing.T
	dir     string
	address string
	manager *net.UnixConn
	env     []string
}

func newLab(t *testing.T) *lab {
	t.Helper()
	dir, err := os.MkdirTemp("", "castra") // short: a socket's path has 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	l := &lab{t: t, dir: dir, address: fmt.Sprint("127.0.0.1:", reserve.Port(t))}
	l.manager, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: dir + "/notify", Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.manager.Close() })
	l.env = append(os.Environ(), asDaemon+"=1", "NOTIFY_SOCKET="+dir+"/notify", "DBUS_SYSTEM_BUS_ADDRESS=unix:path="+dir+"/bus")
	l.configure("")
	return l
}

func (l *lab) configure(more string) {
	l.t.Helper()
	text := fmt.Sprintf("[broker]\naddress = %q\n[identity]\nvm = \"web1\"\n[bus]\nsocket = %q\nspool_dir = %q\n%s", l.address, l.dir+"/bus.sock", l.dir+"/spool", more)
	if err := os.WriteFile(l.dir+"/guestd.toml", []byte(text), 0o600); err != nil {
		l.t.Fatal(err)
	}
}

// message gives the next notification in which part stands.
func (l *lab) message(part string) string {
	l.t.Helper()
	if err := l.manager.SetReadDeadline(time.Now().Add(hang)); err != nil {
		l.t.Fatal(err)
	}
	b := make([]byte, 4096)
	for {
		n, err := l.manager.Read(b)
		if err != nil {
			l.t.Fatalf("waiting for %q: %v", part, err)
		}
		if s := string(b[:n]); strings.Contains(s, part) {
			return s
		}
	}
}

// process is a running castra-guestd.
type process struct {
	t   *testing.T
	cmd *exec.Cmd
	mu  sync.Mutex
	log bytes.Buffer
}

func (d *process) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.log.Write(p)
}

func (d *process) said() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.log.String()
}

func (l *lab) start(env ...string) *process {
	l.t.Helper()
	d := &process{t: l.t, cmd: exec.Command(os.Args[0], "--config", l.dir+"/guestd.toml")}
	d.cmd.Env = slices.Concat(l.env, env)
	d.cmd.Stderr = d
	if err := d.cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		if d.cmd.ProcessState == nil {
			_ = d.cmd.Process.Kill()
			_ = d.cmd.Wait()
		}
		if l.t.Failed() {
			l.t.Logf("castra-guestd said:\n%s", d.said())
		}
	})
	return d
}

func (d *process) signal(sig os.Signal) {
	d.t.Helper()
	if err := d.cmd.Process.Signal(sig); err != nil {
		d.t.Fatal(err)
	}
}

// wantEnd waits for the process and compares its exit status.
func (d *process) wantEnd(status int) {
	d.t.Helper()
	err := d.cmd.Wait()
	if got := d.cmd.ProcessState.ExitCode(); got != status {
		d.t.Errorf("exit status %d (%v), want %d", got, err, status)
	}
}

func (d *process) wantSaid(part string) {
	d.t.Helper()
	for end := time.Now().Add(hang); !strings.Contains(d.said(), part); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			d.t.Fatalf("it did not say %q", part)
		}
	}
}

// host takes one guest in at an address and gives its connection.
func (l *lab) host(address string) (net.Conn, *bufio.Reader) {
	l.t.Helper()
	ln, err := net.Listen("tcp", address)
	if err != nil {
		l.t.Fatal(err)
	}
	defer ln.Close()
	_ = ln.(*net.TCPListener).SetDeadline(time.Now().Add(hang))
	conn, err := ln.Accept()
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(hang))
	r := bufio.NewReader(conn)
	_, _ = io.WriteString(conn, wire.Greeting+"\n")
	if hello, err := r.ReadString('\n'); err != nil || hello != "hello vm:web1 capabilities=bus-v1,ordered-v1\n" {
		l.t.Fatalf("hello is %q, %v", hello, err)
	}
	_, _ = io.WriteString(conn, "ok session=sess-test\n")
	return conn, r
}

func TestDaemonWithoutMessageBus(t *testing.T) {
	l := newLab(t)
	d := l.start(fmt.Sprintf("WATCHDOG_USEC=%d", 200_000))
	l.message("READY=1") // with neither host nor message bus
	if s := l.message("STATUS=connecting to " + l.address); !strings.Contains(s, "serving the socket alone") {
		t.Errorf("%q says nothing of D-Bus", s)
	}
	d.wantSaid("no message bus: serving the socket alone")
	l.message("WATCHDOG=1")

	conn, err := net.Dial("unix", l.dir+"/bus.sock")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, `{"type":"publish","id":"1"}`+"\n")
	if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil || !strings.Contains(line, `"queued":true`) {
		t.Fatalf("answer %q, %v", line, err)
	}
	host, r := l.host(l.address)
	if frame, err := wire.ReadFrame(r, nil); err != nil || string(frame) != `{"type":"publish","topic":"broadcast","id":"1","payload":null}` {
		t.Fatalf("frame %s, %v", frame, err)
	}
	if _, err := host.Write(wire.AppendAckFrame(nil, &wire.Ack{Kind: "publish", ID: []byte("1"), Seq: 1})); err != nil {
		t.Fatal(err)
	}
	l.message("STATUS=connected to " + l.address + " as web1, session sess-test; serving")

	// A reload goes to another address and subscribes; a broken one changes nothing.
	l.configure("nonsense = 1\n")
	d.signal(syscall.SIGHUP)
	l.message("RELOADING=1")
	l.message("READY=1")
	d.wantSaid("the configuration is kept as it was")
	l.address = "127.0.0.2:" + l.address[strings.LastIndexByte(l.address, ':')+1:]
	l.configure("subscribe = [\"vm:self\"]\n")
	d.signal(syscall.SIGHUP)
	_, r = l.host(l.address)
	if frame, err := wire.ReadFrame(r, nil); err != nil || !bytes.Contains(frame, []byte(`"topic":"vm:web1"`)) {
		t.Fatalf("frame %s, %v", frame, err)
	}
	l.message("STATUS=connected to " + l.address)

	d.signal(syscall.SIGTERM)
	l.message("STOPPING=1")
	d.wantEnd(0)
	if _, err := os.Lstat(l.dir + "/bus.sock"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

func TestDaemonServesDBus(t *testing.T) {
	l := newLab(t)
	l.messageBus()
	began := time.Now()
	d := l.start()
	l.message("READY=1") // and the name is owned by then, unless that took too long
	late := time.Since(began) > busPatience
	ctx, cancel := context.WithTimeout(t.Context(), hang)
	defer cancel()
	client, err := dbusclient.Dial(ctx, dbusclient.Options{Address: "unix:path=" + l.dir + "/bus"})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	st, err := client.Describe(ctx)
	for late && errors.Is(err, dbusclient.ErrNotRunning) {
		time.Sleep(5 * time.Millisecond)
		st, err = client.Describe(ctx)
	}
	if err != nil || st.Broker.Kind != "guest" || len(st.VMs) != 1 || st.VMs[0].VM != "web1" {
		t.Fatalf("%+v, %v", st, err)
	}
	if seq, err := client.Publish(ctx, bus.PublishRequest{Topic: "vm:self", Payload: []byte("1")}); seq != 0 || err != nil {
		t.Fatalf("published as %d, %v", seq, err)
	}
	if _, _, err := client.AddVM(ctx, bus.AddVMRequest{Name: "x"}); err == nil {
		t.Error("a guest registered a VM")
	}

	// Another daemon on the same bus serves its socket alone.
	l.configure("")
	second := *l
	second.dir = l.dir + "/2"
	if err := os.Mkdir(second.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	second.configure("")
	other := second.start()
	l.message("READY=1")
	other.wantSaid("org.castra.Bus1 is owned by another process")
	l.message("serving the socket alone: org.castra.Bus1 is owned")
	other.signal(syscall.SIGTERM)
	other.wantEnd(0)
	d.signal(syscall.SIGTERM)
	d.wantEnd(0)
	if strings.Contains(d.said(), "lost") {
		t.Error("a message on disk was said to be lost")
	}
	// The host has not had it: the next daemon has it for him.
	l.start().wantSaid("the spool holds messages from before; they go to the host first")
	host, r := l.host(l.address)
	if frame, err := wire.ReadFrame(r, nil); err != nil || !bytes.Contains(frame, []byte(`"topic":"vm:web1","id":"`)) {
		t.Errorf("frame %s, %v", frame, err)
	}
	_ = host.Close()
}

func TestDaemonRefusesToStart(t *testing.T) {
	l := newLab(t)
	if err := os.WriteFile(l.dir+"/castra.vm", []byte("not a name"), 0o600); err != nil {
		t.Fatal(err)
	}
	d := l.start("CREDENTIALS_DIRECTORY=" + l.dir)
	d.wantEnd(1)
	if !strings.Contains(d.said(), "the credential castra.vm gives") {
		t.Error(d.said())
	}
	l.configure("subscribe = [\"vm:web2\"]\n")
	d = l.start()
	d.wantEnd(1)
	if !strings.Contains(d.said(), "belongs to another VM") {
		t.Error(d.said())
	}
}

// messageBus starts a message bus on which everybody may do everything.
func (l *lab) messageBus() {
	l.t.Helper()
	text := `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><listen>unix:path=` + l.dir + `/bus</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/><allow user="*"/></policy></busconfig>`
	if err := os.WriteFile(l.dir+"/bus.conf", []byte(text), 0o600); err != nil {
		l.t.Fatal(err)
	}
	cmd := exec.Command("dbus-daemon", "--nofork", "--nopidfile", "--print-address", "--config-file="+l.dir+"/bus.conf")
	out, err := cmd.StdoutPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		l.t.Fatalf("starting a message bus: %v (apt-get install dbus-daemon)", err)
	}
	l.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		l.t.Fatalf("starting a message bus: %v", err)
	}
}
