package sdnotify

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// asService makes this test binary behave as a service that has just been started.
const asService = "CASTRA_TEST_AS_SERVICE"

func TestMain(m *testing.M) {
	if pid := os.Getenv(asService); pid != "" {
		serve(pid)
		return
	}
	os.Exit(m.Run())
}

// serve takes the passed sockets over and prints what it got and what is left.
func serve(pid string) {
	if pid == "own" { // systemd writes the service's, which a test does not know yet
		pid = strconv.Itoa(os.Getpid())
	}
	os.Setenv("LISTEN_PID", pid)
	passed, err := Listeners()
	if err != nil {
		fmt.Println("error:", err)
	}
	for _, p := range passed {
		if p.Stored != nil {
			fmt.Println(p.Use)
			continue
		}
		fmt.Println(p.Use, p.Listener.Addr().Network(), p.Listener.Addr())
	}
	for _, v := range os.Environ() {
		if strings.HasPrefix(v, "LISTEN_") {
			fmt.Println("left in the environment:", v)
		}
	}
	for fd := range 100 {
		if err != nil { // a service that ends has no children
			break
		}
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if _, nerr := unix.Getsockname(fd); err == nil && nerr == nil && flags&unix.FD_CLOEXEC == 0 {
			fmt.Println("left to children:", fd)
		}
	}
	for _, p := range passed {
		p.Close()
	}
}

// sockets are open files as systemd might pass them, by what they are.
func sockets(t *testing.T) map[string]*os.File {
	t.Helper()
	all := make(map[string]*os.File)
	add := func(name string, s any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		f, err := s.(interface{ File() (*os.File, error) }).File()
		if err != nil {
			t.Fatal(err)
		}
		all[name] = f
		t.Cleanup(func() { f.Close() })
	}
	dir := t.TempDir()
	tcp, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	add("tcp", tcp, err)
	stream, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "stream"), Net: "unix"})
	add("unix", stream, err)
	packets, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: filepath.Join(dir, "packet"), Net: "unixpacket"})
	add("seqpacket", packets, err)
	udp, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	add("udp", udp, err)
	client, err := net.DialTCP("tcp4", nil, tcp.Addr().(*net.TCPAddr))
	add("connected", client, err)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	all["file"] = null
	t.Cleanup(func() { null.Close() })
	return all
}

// TestListeners starts this test binary as systemd would start a service.
func TestListeners(t *testing.T) {
	open := sockets(t)
	tests := []struct {
		pass, names string
		fds, pid    string // empty: as many as are passed; the service's own
		want        string // the beginnings of the lines that it prints
	}{
		{pass: "tcp unix", names: "bus:health", want: "bus tcp 127.0.0.1:|health unix /"},
		{pass: "unix tcp tcp", names: "metrics:bus:bus", want: "metrics unix /|bus tcp 127.0.0.1:|bus tcp 127.0.0.1:"},
		{pass: "unix", names: "pprof", want: "pprof unix /"},
		{pass: "tcp", names: "castrad.socket", want: "bus tcp "},
		{pass: "unix", names: "castra-guestd.socket", want: "bus unix "},
		{pass: "tcp", names: "unknown", want: "bus tcp "},
		{pass: "tcp unix", names: "", want: "bus tcp |bus unix "},
		{pass: "tcp", names: "bus", pid: "1", want: ""},
		{pass: "", names: "", want: ""},
		{pass: "file tcp", names: "handover:bus", want: "handover|bus tcp "}, // whatever it is: it is judged elsewhere
		{pass: "seqpacket", names: "handover", want: "handover"},

		{pass: "tcp unix", names: "bus:buss", want: `error: socket 4, passed in as "buss": nothing is known`},
		{pass: "tcp", names: "connection", want: `error: socket 3, passed in as "connection": nothing is known`},
		{pass: "tcp unix", names: "bus", want: `error: LISTEN_FDNAMES has 1 names ("bus") for 2 sockets`},
		{pass: "file", names: "bus", want: `error: socket 3, passed in as "bus": it cannot be used`},
		{pass: "tcp", names: "pprof", want: `error: socket 3, passed in as "pprof": profiles are served on a Unix socket alone`},
		{pass: "udp", names: "bus", want: `error: socket 3, passed in as "bus": it is no stream socket`},
		{pass: "seqpacket", names: "bus", want: `error: socket 3, passed in as "bus": it is no stream socket`},
		{pass: "connected", names: "bus", want: `error: socket 3, passed in as "bus": it does not listen`},
		{pass: "tcp", names: "bus:bus", fds: "2", want: `error: socket 4, passed in as "bus": it cannot be used`},
		{pass: "tcp", names: "bus", fds: "one", want: `error: LISTEN_FDS is "one"`},
		{pass: "tcp", names: "bus", fds: "-1", want: `error: LISTEN_FDS is "-1"`},
		{pass: "tcp", names: "bus", pid: "me", want: `error: LISTEN_PID is "me"`},
	}
	for _, tt := range tests {
		t.Run(tt.pass+" as "+tt.names+tt.fds+tt.pid, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), os.Args[0])
			for _, name := range strings.Fields(tt.pass) {
				cmd.ExtraFiles = append(cmd.ExtraFiles, open[name])
			}
			if tt.fds == "" {
				tt.fds = strconv.Itoa(len(cmd.ExtraFiles))
			}
			if tt.pid == "" {
				tt.pid = "own"
			}
			cmd.Env = append(os.Environ(), asService+"="+tt.pid, "GORACE=atexit_sleep_ms=0", "LISTEN_FDS="+tt.fds, "LISTEN_FDNAMES="+tt.names, "LISTEN_PIDFDID=1")
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			lines := strings.FieldsFunc(string(out), func(r rune) bool { return r == '\n' })
			want := strings.FieldsFunc(tt.want, func(r rune) bool { return r == '|' })
			if tt.pid == "1" { // sockets that are not its own, it leaves alone
				want = []string{"left to children: 3"}
			}
			match := len(lines) == len(want)
			for i := range min(len(lines), len(want)) {
				match = match && strings.HasPrefix(lines[i], want[i])
			}
			if !match {
				t.Errorf("it said %q, want %q", lines, want)
			}
		})
	}
}

// Sockets that nobody announced are nobody's mistake.
func TestNoListeners(t *testing.T) {
	for _, v := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		t.Setenv(v, "")
	}
	if got, err := Listeners(); len(got) > 0 || err != nil {
		t.Errorf("got %v, %v", got, err)
	}
}
