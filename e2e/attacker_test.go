package e2e

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/identity"
	"github.com/castrabus/castra/internal/reserve"
	"github.com/castrabus/castra/internal/wire"
)

// A siege is a castrad with VMs on it, some of which an attacker is root in, and one
// honest guest that must not notice.
type siege struct {
	*lab
	castrad *exec.Cmd
	keys    map[string][]byte // of the VMs that have one
	honest  *honestGuest
}

// besiege starts castrad, by the command wrap if there is one, with limits, the lines
// of that section, and the VMs:
// "honest" and "victim", whose keys the attacker has not, "mallory", whose key he
// has, and "open", which has none.
func besiege(t testing.TB, limits string, wrap ...string) *siege {
	s := &siege{lab: newLab(t), keys: make(map[string][]byte)}
	s.hostBus = s.bus("host")
	s.port = reserve.Port(t)
	s.write("castrad.toml", `[broker]
listen = ["127.0.0.1:%d"]
vms_dir = %q
handshake_timeout = "3s"
session_timeout = "8s"
[store]
state_dir = %q
log_dir = %q
[limits]
%s
`, s.port, s.path("vms.d"), s.path("state"), s.path("log"), limits)
	s.castrad = s.start("castrad", []string{"DBUS_SYSTEM_BUS_ADDRESS=" + s.hostBus},
		append(wrap, bin(t, "castrad"), "--config", s.path("castrad.toml"))...)
	s.answers()
	for _, vm := range []string{"honest", "victim", "mallory"} {
		s.keys[vm] = s.add(vm)
	}
	s.castractl("vm", "add", "open", "--no-key")
	s.honest = s.startHonest()
	return s
}

// add registers a VM and gives its key.
func (s *siege) add(vm string) []byte {
	s.Helper()
	s.castractl("vm", "add", vm)
	return s.key(vm + ".castra-key")
}

// key reads a key file.
func (s *siege) key(name string) []byte {
	s.Helper()
	data, err := os.ReadFile(s.path(name))
	if err != nil {
		s.Fatal(err)
	}
	key, err := identity.ParseKey(data)
	if err != nil {
		s.Fatalf("%s: %v", name, err)
	}
	return key
}

// guestConn is a connection of somebody who may say anything.
type guestConn struct {
	net.Conn
	r *bufio.Reader
}

// dial connects and reads the greeting.
func (s *siege) dial() (*guestConn, error) {
	conn, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", s.port), hang)
	if err != nil {
		return nil, err
	}
	g := &guestConn{conn, bufio.NewReaderSize(conn, 128<<10)}
	_ = conn.SetReadDeadline(time.Now().Add(hang))
	if line, err := g.line(); line != wire.Greeting {
		_ = conn.Close()
		return nil, fmt.Errorf("greeted with %q, %w", line, errors.Join(err, io.ErrUnexpectedEOF))
	}
	return g, nil
}

// line reads a line of the handshake, without its end.
func (g *guestConn) line() (string, error) {
	line, err := g.r.ReadString('\n')
	return strings.TrimSuffix(line, "\n"), err
}

// frame sends frames, and receive reads one.
func (g *guestConn) frame(frames ...string) error {
	var out []byte
	for _, f := range frames {
		out = wire.AppendFrame(out, []byte(f))
	}
	_, err := g.Write(out)
	return err
}

func (g *guestConn) receive() (string, error) {
	f, err := wire.ReadFrame(g.r, nil)
	return string(f), err
}

const proveCaps = "bus-v1,auth-hmac-v1"

// answerTo is the right answer to a challenge.
func answerTo(key []byte, vm, nonce, challenge string) (mac, sn string, err error) {
	sn, err = wire.ParseChallenge([]byte(challenge))
	return hex.EncodeToString(wire.ClientMAC(key, vm, proveCaps, nonce, sn)), sn, err
}

const someNonce = "00112233445566778899aabbccddeeff"

// join gets vm a session, with its key if it is not nil.
func (s *siege) join(vm string, key []byte) (*guestConn, string, error) {
	g, err := s.dial()
	if err != nil {
		return nil, "", err
	}
	token, err := g.join(vm, key)
	if err != nil {
		_ = g.Close()
		return nil, "", err
	}
	return g, token, nil
}

func (g *guestConn) join(vm string, key []byte) (token string, err error) {
	hello := fmt.Sprintf("hello vm:%s capabilities=bus-v1\n", vm)
	if key != nil {
		hello = fmt.Sprintf("hello vm:%s capabilities=%s nonce=%s\n", vm, proveCaps, someNonce)
	}
	if _, err := io.WriteString(g, hello); err != nil {
		return "", err
	}
	line, err := g.line()
	sn := ""
	if err == nil && key != nil {
		var mac string
		if mac, sn, err = answerTo(key, vm, someNonce, line); err != nil {
			return "", fmt.Errorf("answered %q: %w", line, err)
		}
		if _, err = fmt.Fprintf(g, "auth mac=%s\n", mac); err == nil {
			line, err = g.line()
		}
	}
	if err != nil {
		return "", err
	}
	r, err := wire.ParseReply([]byte(line))
	if err != nil || r.Token == "" {
		return "", fmt.Errorf("answered %q", line)
	}
	if key != nil && r.Proof != hex.EncodeToString(wire.ServerProof(key, vm, proveCaps, someNonce, sn, r.Token)) {
		return "", fmt.Errorf("castrad's proof is wrong: %q", line)
	}
	return r.Token, nil
}

// honestGuest publishes, hears what is sent to it, and sends heartbeats, from the
// beginning to the end in one session.
type honestGuest struct {
	s     *siege
	conn  *guestConn
	token string
	acked atomic.Int64
	heard atomic.Int64

	mu   sync.Mutex
	seqs []uint64        // of its records, in order
	took []time.Duration // of each, from its publish to its ack

	enough atomic.Bool
	work   sync.WaitGroup
	pace   time.Duration
}

func (s *siege) startHonest() *honestGuest {
	s.Helper()
	conn, token, err := s.join("honest", s.keys["honest"])
	if err != nil {
		s.Fatal(err)
	}
	h := &honestGuest{s: s, conn: conn, token: token, pace: 10 * time.Millisecond}
	if err := conn.frame(`{"type":"subscribe","topic":"vm:honest"}`); err != nil {
		s.Fatal(err)
	}
	if f, err := conn.receive(); err != nil || !strings.Contains(f, `"status":"ok"`) {
		s.Fatalf("subscribe: %s, %v", f, err)
	}
	h.work.Go(h.run)
	s.Cleanup(h.stop)
	return h
}

func (h *honestGuest) stop() {
	h.enough.Store(true)
	h.work.Wait()
	_ = h.conn.Close()
}

// run publishes one record after the other. Its session must not end.
func (h *honestGuest) run() {
	for i := 0; !h.enough.Load(); i++ {
		_ = h.conn.SetReadDeadline(time.Now().Add(hang))
		begun := time.Now()
		if err := h.conn.frame(fmt.Sprintf(`{"type":"publish","topic":"honest.work","payload":{"n":%d}}`, i)); err != nil {
			h.s.Errorf("the honest guest cannot publish: %v", err)
			return
		}
		for {
			f, err := h.conn.receive()
			if err != nil {
				h.s.Errorf("the honest guest lost its session: %v", err)
				return
			}
			var m struct {
				Type, Ack, Status string
				Seq               uint64
			}
			if err := json.Unmarshal([]byte(f), &m); err != nil || m.Type == "ack" && (m.Ack != "publish" || m.Status != "ok") || m.Type == "error" {
				h.s.Errorf("the honest guest was told %s", f)
				return
			}
			if m.Type != "ack" { // sent to it
				h.heard.Add(1)
				continue
			}
			h.mu.Lock()
			h.seqs = append(h.seqs, m.Seq)
			h.took = append(h.took, time.Since(begun))
			h.mu.Unlock()
			break
		}
		h.acked.Add(1)
		time.Sleep(h.pace)
	}
}

// goesOn waits until the honest guest has published some more, has heard what the
// host sends it, and castractl says that it has its one session.
func (h *honestGuest) goesOn(t testing.TB) {
	t.Helper()
	acked, heard := h.acked.Load(), h.heard.Load()
	if out, err := h.s.tryCastractl("bus", "publish", "--vm", "honest", "--payload", `"for you"`); err != nil {
		t.Errorf("the host cannot publish: %s, %v", out, err)
	}
	wait(t, "the honest guest goes on", func() error {
		if a, d := h.acked.Load()-acked, h.heard.Load()-heard; a < 5 || d < 1 {
			return fmt.Errorf("%d records acknowledged, %d heard", a, d)
		}
		return nil
	})
	st, err := h.s.status("honest")
	if err != nil || len(st.VMs) != 1 || !st.VMs[0].Reachable || st.VMs[0].Session != h.token {
		t.Errorf("status shows of the honest guest %+v, %v; its session is %s", st.VMs, err, h.token)
	}
}

// intact compares what is stored of the honest guest with what it was told.
func (h *honestGuest) intact() {
	h.s.Helper()
	h.stop()
	out := h.s.castractl("bus", "tail", "--topic", "honest.work", "-n", "all", "--no-follow", "-o", "json")
	h.mu.Lock()
	defer h.mu.Unlock()
	n := 0
	for line := range strings.Lines(out) {
		var r struct {
			VM      string
			Seq     uint64
			Payload struct{ N int }
		}
		if err := json.Unmarshal([]byte(line), &r); err != nil || n >= len(h.seqs) || r.VM != "honest" || r.Seq != h.seqs[n] || r.Payload.N != n {
			h.s.Fatalf("record %d of the honest guest is %s (%v)", n, line, err)
		}
		n++
	}
	if n != len(h.seqs) || n == 0 {
		h.s.Errorf("%d records of the honest guest are stored of %d acknowledged", n, len(h.seqs))
	}
	h.s.castractl("bus", "verify")
}

// wait repeats cond until it succeeds.
func wait(t testing.TB, what string, cond func() error) {
	t.Helper()
	end := time.Now().Add(hang)
	for {
		err := cond()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("waiting until %s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// status is what castractl status --json says.
func (s *siege) status(vms ...string) (bus.Status, error) {
	var st bus.Status
	cmd := exec.Command(bin(s.TB, "castractl"), append([]string{"status", "--json"}, vms...)...)
	cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS="+s.hostBus)
	out, err := cmd.Output()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
		return st, err
	}
	return st, json.Unmarshal(out, &st) // a VM that is not reachable makes it end with 3
}

// event is a line of either event file.
type event struct {
	VM         string
	Outcome    string `json:"session_outcome"`
	Reason     string
	Action     string
	Detail     string
	Remote     string `json:"remote_addr"`
	Suppressed int
}

// events reads an event file, of which every line must be one.
func (s *siege) events(name string) ([]event, error) {
	data, err := os.ReadFile(s.path("state/handshakes/" + name))
	if err != nil {
		return nil, err
	}
	data = data[:bytes.LastIndexByte(data, '\n')+1] // one is being written, perhaps
	var all []event
	for line := range bytes.Lines(data) {
		var e event
		if err := json.Unmarshal(line, &e); err != nil {
			return nil, fmt.Errorf("%s holds %q: %w", name, line, err)
		}
		all = append(all, e)
	}
	return all, nil
}

// recorded waits until an event file has a line that pred likes.
func (s *siege) recorded(t testing.TB, name, what string, pred func(event) bool) {
	t.Helper()
	wait(t, name+" tells "+what, func() error {
		all, err := s.events(name)
		if err == nil && !slices.ContainsFunc(all, pred) {
			err = fmt.Errorf("none of its %d lines does", len(all))
		}
		return err
	})
}

const (
	handshakeEvents = "handshake-events.jsonl"
	busEvents       = "bus-events.jsonl"
)

// limited waits until status counts the limit n times at least.
func (s *siege) limited(t testing.TB, limit string, n uint64) {
	t.Helper()
	wait(t, "status counts "+limit, func() error {
		st, err := s.status()
		if err == nil && st.Broker.Limited[limit] < n {
			err = fmt.Errorf("it counts %v", st.Broker.Limited)
		}
		return err
	})
}

// memory is the most memory that castrad ever had, in bytes.
func (s *siege) memory(cmd *exec.Cmd) int64 {
	s.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if err != nil {
		s.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(data), "VmHWM:")
	var kib int64
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		s.Fatal(err)
	}
	return kib << 10
}

// asNobody is how a process runs as a user who is nobody here.
func asNobody() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
}

// keyText is a key as files hold it.
func keyText(key []byte) string { return base64.StdEncoding.EncodeToString(key) }
