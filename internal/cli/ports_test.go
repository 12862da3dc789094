package cli

import (
	"encoding/json"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/castrabus/castra/internal/bus"
)

// The heading and two lines of each table as Linux writes them.
const (
	procTCP = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1B9E 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1505 1 00000000d3d937c0 100 0 0 10 0
   1: 00000000:08AE 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1506 1 00000000d3d937c0 100 0 0 10 0
   2: 0100007F:08AF 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 1507 1 00000000d3d937c0 100 0 0 10 0
`
	procTCP6 = `  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000000000000:1F90 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1508 1 00000000d3d937c0 100 0 0 10 0
`
	procUDP = `   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops
  100: 00000000:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 1509 2 00000000d3d937c0 0
`
)

func procFS() fstest.MapFS {
	return fstest.MapFS{
		"net/tcp":  {Data: []byte(procTCP)},
		"net/tcp6": {Data: []byte(procTCP6)},
		"net/udp":  {Data: []byte(procUDP)}, // no udp6: IPv6 may be switched off
	}
}

func TestOpenPorts(t *testing.T) {
	open, err := openPorts(procFS())
	if err != nil {
		t.Fatal(err)
	}
	for at, want := range map[socketPort]bool{
		{"tcp", 7070}: true, {"tcp", 2222}: true, {"tcp", 8080}: true, {"udp", 53}: true,
		{"tcp", 2223}: false, // a connection, no listener
		{"tcp", 53}:   false, {"udp", 7070}: false,
	} {
		if open[at] != want {
			t.Errorf("%v is open: %v, want %v", at, open[at], want)
		}
	}
	for _, bad := range []string{"heading\nshort line\n", "heading\n 0: 0100007F:XYZ 0:0 0A\n", "heading\n 0: nothing 0:0 0A\n", "heading\n 0: 0:12345 0:0 0A\n"} {
		if _, err := openPorts(fstest.MapFS{"net/tcp": {Data: []byte(bad)}}); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

func FuzzScanSockets(f *testing.F) {
	f.Add(procTCP)
	f.Add(procTCP6)
	f.Fuzz(func(_ *testing.T, table string) {
		_ = scanSockets(strings.NewReader(table), func(uint16, string) {})
	})
}

func TestParseForward(t *testing.T) {
	got, err := parseForward("tcp:2222:22")
	if err != nil || got.Proto != "tcp" || got.Host != 2222 || got.Guest != 22 {
		t.Errorf("tcp:2222:22 is %+v, %v", got, err)
	}
	for _, bad := range []string{"", "tcp", "tcp:1", "tcp:1:2:3", "sctp:1:2", "tcp:0:1", "tcp:1:0", "tcp:65536:1", "tcp:-1:1", "tcp:a:1", "TCP:1:2"} {
		if _, err := parseForward(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

// portsClient is a host with a forward in each state.
func portsClient() *fakeClient {
	return &fakeClient{status: func([]string) (bus.Status, error) {
		return bus.Status{
			Broker: bus.Broker{Kind: "host", Listen: []string{"127.0.0.1:7070", "/run/castra/bus.sock"}},
			VMs: []bus.VM{
				{VM: "db1", Reachable: true, Forwards: []string{"tcp:2222:22", "tcp:5432:5432", "udp:53:53"}},
				{VM: "old1", Forwards: []string{"tcp:8080:80", "tcp:8081:80"}},
				{VM: "web1", Reachable: true, Forwards: []string{"tcp:7070:80", "tcp:9000:80"}},
				{VM: "web2", Forwards: []string{"tcp:9000:80", "vsock:1:2"}},
			},
			Refused: []bus.Refused{},
		}, nil
	}}
}

func TestPorts(t *testing.T) {
	withProc := func(f *Factory) { f.Proc, f.IO.Width = procFS(), 80 }
	for name, args := range map[string][]string{
		"ports.txt":        {"ports"},
		"ports-active.txt": {"ports", "--active", "--no-legend"},
	} {
		r := run(t, portsClient(), args, withProc)
		if r.code != 0 || r.err != "" {
			t.Fatalf("exit code %d, stderr %q", r.code, r.err)
		}
		golden(t, name, r.out)
	}

	r := run(t, portsClient(), []string{"ports", "--json"}, withProc)
	var got struct {
		Broker  *bus.Broker
		VMs     []bus.VM
		Refused []bus.Refused
		Ports   []port
	}
	if err := json.Unmarshal([]byte(r.out), &got); err != nil || got.Broker == nil || len(got.VMs) != 4 || len(got.Ports) != 11 {
		t.Fatalf("%v: %s", err, r.out)
	}
	if p := got.Ports[2]; p != (port{VM: "db1", Host: 2222, Guest: 22, Proto: "tcp", Status: "active"}) {
		t.Errorf("the first forward is %+v", p)
	}
}
