package e2e

import (
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/wire"
)

// proofAttacks are about keys: each is somebody without the victim's who wants its
// name, or with its old one.
var proofAttacks = map[string]func(t *testing.T, s *siege){
	"a proof of zeros": func(t *testing.T, s *siege) {
		s.refusesProof(t, func(_ *guestConn, _, _ string) string { return strings.Repeat("0", 64) })
	},
	"a proof by another's key": func(t *testing.T, s *siege) {
		s.refusesProof(t, func(_ *guestConn, nonce, sn string) string {
			return hex.EncodeToString(wire.ClientMAC(s.keys["mallory"], "victim", proveCaps, nonce, sn))
		})
	},
	"a proof for another's name": func(t *testing.T, s *siege) {
		s.refusesProof(t, func(_ *guestConn, nonce, sn string) string {
			return hex.EncodeToString(wire.ClientMAC(s.keys["victim"], "mallory", proveCaps, nonce, sn))
		})
	},
	"a proof for other capabilities": func(t *testing.T, s *siege) {
		s.refusesProof(t, func(_ *guestConn, nonce, sn string) string {
			return hex.EncodeToString(wire.ClientMAC(s.keys["victim"], "victim", proveCaps+",x", nonce, sn))
		})
	},
	"the broker's proof in place of the guest's": func(t *testing.T, s *siege) {
		s.refusesProof(t, func(_ *guestConn, nonce, sn string) string {
			return hex.EncodeToString(wire.ServerProof(s.keys["victim"], "victim", proveCaps, nonce, sn, ""))
		})
	},
	"a truncated proof": func(t *testing.T, s *siege) {
		s.refusesProof(t, func(_ *guestConn, nonce, sn string) string {
			return hex.EncodeToString(wire.ClientMAC(s.keys["victim"], "victim", proveCaps, nonce, sn))[:62]
		})
	},
	"a proof and more": func(t *testing.T, s *siege) {
		s.refusesProof(t, func(_ *guestConn, nonce, sn string) string {
			return hex.EncodeToString(wire.ClientMAC(s.keys["victim"], "victim", proveCaps, nonce, sn)) + " x=y"
		})
	},
	"a replayed proof": func(t *testing.T, s *siege) {
		g, err := s.dial()
		if err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		fmt.Fprintf(g, "hello vm:guest-replayed capabilities=%s nonce=%s\n", proveCaps, someNonce)
		if line, _ := g.line(); line != "error: unknown-vm" {
			t.Fatalf("answered %q", line)
		}
		key := s.add("guest-replayed")
		// What somebody who listens sees of an honest handshake...
		h, err := s.dial()
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		fmt.Fprintf(h, "hello vm:guest-replayed capabilities=%s nonce=%s\n", proveCaps, someNonce)
		challenge, _ := h.line()
		mac, first, err := answerTo(key, "guest-replayed", someNonce, challenge)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(h, "auth mac=%s\n", mac)
		if line, err := h.line(); !strings.HasPrefix(line, "ok session=") {
			t.Fatalf("the honest one was answered %q, %v", line, err)
		}
		// ... and says again, byte for byte.
		second := ""
		s.refuses(t, "guest-replayed", func(_ *guestConn, _, sn string) string {
			second = sn
			return mac
		})
		if first == second {
			t.Error("the same nonce twice")
		}
	},
	"a reflected challenge": func(t *testing.T, s *siege) {
		// The broker's own nonce as the guest's on another connection: were the two
		// sides' proofs made alike, it would answer for the attacker.
		s.refusesProof(t, func(_ *guestConn, _, sn string) string {
			h, err := s.dial()
			if err != nil {
				t.Error(err)
				return ""
			}
			defer h.Close()
			fmt.Fprintf(h, "hello vm:victim capabilities=%s nonce=%s\n", proveCaps, sn)
			line, _ := h.line()
			sn2, err := wire.ParseChallenge([]byte(line))
			if err != nil || sn2 == sn {
				t.Errorf("challenged with %q", line)
			}
			fmt.Fprintf(h, "auth mac=%s%s\n", sn, sn2)
			if line, _ := h.line(); line != "error: auth-failed" {
				t.Errorf("the reflection is answered %q", line)
			}
			return sn2 + sn2
		})
	},
	"frames in place of a proof": func(t *testing.T, s *siege) {
		g := s.challenged(t)
		defer g.Close()
		_ = g.frame(`{"type":"publish","topic":"vm:victim"}`, `{"type":"heartbeat"}`)
		_, _ = io.WriteString(g, "\n")
		if line, _ := g.line(); line != "error: auth-failed" {
			t.Errorf("answered %q", line)
		}
	},
	"another hello in place of a proof": func(t *testing.T, s *siege) {
		g := s.challenged(t)
		defer g.Close()
		_, _ = io.WriteString(g, "hello vm:open capabilities=bus-v1\n")
		if line, _ := g.line(); line != "error: auth-failed" {
			t.Errorf("answered %q", line)
		}
	},
	"an overlong proof": func(t *testing.T, s *siege) {
		g := s.challenged(t)
		defer g.Close()
		_, _ = io.WriteString(g, "auth mac="+strings.Repeat("0", 600)+"\n")
		if line, _ := g.line(); line != "error: auth-failed" {
			t.Errorf("answered %q", line)
		}
	},
	"frames behind a wrong proof": func(t *testing.T, s *siege) {
		g := s.challenged(t)
		defer g.Close()
		_, _ = io.WriteString(g, "auth mac="+strings.Repeat("0", 64)+"\n")
		_ = g.frame(`{"type":"publish","topic":"a.smuggled","payload":1}`)
		if line, _ := g.line(); line != "error: auth-failed" {
			t.Errorf("answered %q", line)
		}
		_, _ = io.ReadAll(g.r)
		if out, err := s.tryCastractl("bus", "tail", "--topic", "a.smuggled", "-n", "all", "--no-follow"); out != "" || err != nil {
			t.Errorf("stored: %s, %v", out, err)
		}
	},
	"another's name after its session": func(t *testing.T, s *siege) {
		key := s.add("guest-after")
		g, _, err := s.join("guest-after", key)
		if err != nil {
			t.Fatal(err)
		}
		_ = g.Close()
		s.refuses(t, "guest-after", func(_ *guestConn, _, _ string) string { return strings.Repeat("ab", 32) })
		if _, _, err := s.join("guest-after", nil); err == nil || !strings.Contains(err.Error(), "auth-required") {
			t.Errorf("without a proof: %v", err)
		}
		wait(t, "it is unreachable", func() error {
			st, err := s.status("guest-after")
			if err == nil && (len(st.VMs) != 1 || st.VMs[0].Reachable) {
				err = fmt.Errorf("it is %+v", st.VMs)
			}
			return err
		})
		if g, _, err = s.join("guest-after", key); err != nil {
			t.Errorf("who has the key: %v", err)
		} else {
			_ = g.Close()
		}
	},
	"a key that was replaced": func(t *testing.T, s *siege) {
		old := s.add("guest-rekeyed")
		g, _, err := s.join("guest-rekeyed", old)
		if err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		s.castractl("vm", "rekey", "guest-rekeyed", "--key-out", "new.key")
		if f, err := g.receive(); !strings.Contains(f, `"code":"forbidden"`) {
			t.Errorf("the old key's session was told %s, %v", f, err)
		}
		if _, _, err := s.join("guest-rekeyed", old); err == nil || !strings.Contains(err.Error(), "auth-failed") {
			t.Errorf("the old key: %v", err)
		}
		h, _, err := s.join("guest-rekeyed", s.key("new.key"))
		if err != nil {
			t.Fatalf("the new key: %v", err)
		}
		_ = h.Close()
	},
	"a key file that is there": func(t *testing.T, s *siege) {
		s.write("guest-kept.castra-key", "the only copy")
		if out, err := s.tryCastractl("vm", "add", "guest-kept"); err == nil || !strings.Contains(err.Error(), "never overwritten") {
			t.Errorf("%s, %v", out, err)
		}
		if data, _ := os.ReadFile(s.path("guest-kept.castra-key")); string(data) != "the only copy" {
			t.Errorf("it holds %q now", data)
		}
		if st, err := os.Stat(s.path("victim.castra-key")); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("a key file has the mode %v, %v", st.Mode(), err)
		}
		out := s.castractl("vm", "args", "victim")
		if strings.Contains(out, keyText(s.keys["victim"])) || !strings.Contains(out, "type=11,path=") {
			t.Errorf("the arguments are %s", out)
		}
		if st, err := os.Stat(s.path("state/vms/victim.json")); err != nil || st.Mode().Perm()&0o077 != 0 {
			t.Errorf("castrad's copy has the mode %v, %v", st.Mode(), err)
		}
	},
}

// challenged has said hello as the victim.
func (s *siege) challenged(t *testing.T) *guestConn {
	t.Helper()
	g, err := s.dial()
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(g, "hello vm:victim capabilities=%s nonce=%s\n", proveCaps, someNonce)
	if line, err := g.line(); !strings.HasPrefix(line, "challenge ") {
		t.Fatalf("answered %q, %v", line, err)
	}
	return g
}

func (s *siege) refusesProof(t *testing.T, mac func(g *guestConn, nonce, sn string) string) {
	t.Helper()
	s.refuses(t, "victim", mac)
}

// refuses answers a challenge with what mac gives, to be refused.
func (s *siege) refuses(t *testing.T, vm string, mac func(g *guestConn, nonce, sn string) string) {
	t.Helper()
	g, err := s.dial()
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	fmt.Fprintf(g, "hello vm:%s capabilities=%s nonce=%s\n", vm, proveCaps, someNonce)
	line, _ := g.line()
	sn, err := wire.ParseChallenge([]byte(line))
	if err != nil {
		t.Fatalf("answered %q", line)
	}
	fmt.Fprintf(g, "auth mac=%s\n", mac(g, someNonce, sn))
	if line, err := g.line(); line != "error: auth-failed" {
		t.Errorf("answered %q, %v", line, err)
	}
	if rest, err := io.ReadAll(g.r); len(rest) > 0 || err != nil {
		t.Errorf("and then %q, %v", rest, err)
	}
	me := g.LocalAddr().String()
	s.recorded(t, handshakeEvents, "of "+me, func(e event) bool {
		return e.Remote == me && e.VM == vm && e.Outcome == "denied" && e.Reason == "auth-failed"
	})
	wait(t, "status tells of "+vm, func() error {
		st, err := s.status()
		for _, r := range st.Refused {
			if r.VM == vm {
				return nil
			}
		}
		return fmt.Errorf("it lists %+v, %w", st.Refused, err)
	})
}

// slowAttacks take as long as castrad lets them.
var slowAttacks = map[string]func(t *testing.T, s *siege){
	"one byte a second": func(t *testing.T, s *siege) {
		s.timesOut(t, func(g *guestConn) {
			for _, c := range []byte("hello vm:victim capabilities=bus-v1") {
				if _, err := g.Write([]byte{c}); err != nil {
					return
				}
				time.Sleep(time.Second) // the attack itself
			}
		})
	},
	"one byte a second as the answer to a challenge": func(t *testing.T, s *siege) {
		s.timesOut(t, func(g *guestConn) {
			fmt.Fprintf(g, "hello vm:victim capabilities=%s nonce=%s\n", proveCaps, someNonce)
			for range 64 {
				if _, err := g.Write([]byte("a")); err != nil {
					return
				}
				time.Sleep(time.Second)
			}
		})
	},
	"silence": func(t *testing.T, s *siege) { s.timesOut(t, func(*guestConn) {}) },
	"a closed side before hello": func(t *testing.T, s *siege) {
		g, err := s.dial()
		if err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		_ = halfClose(g)
		if rest, err := io.ReadAll(g.r); len(rest) > 0 || err != nil {
			t.Errorf("answered %q, %v", rest, err)
		}
	},
	"a closed side in a session": func(t *testing.T, s *siege) {
		key := s.add("guest-half")
		g, _, err := s.join("guest-half", key)
		if err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		_ = g.frame(`{"type":"publish","topic":"a.half","payload":1}`)
		_ = halfClose(g)
		if f, err := g.receive(); !strings.Contains(f, `"status":"ok"`) {
			t.Errorf("what was sent before is answered %s, %v", f, err)
		}
		if _, err := g.receive(); err == nil {
			t.Error("the session lives on")
		}
		wait(t, "it is unreachable", func() error {
			st, err := s.status("guest-half")
			if err == nil && st.VMs[0].Reachable {
				err = fmt.Errorf("it is %+v", st.VMs)
			}
			return err
		})
	},
	"half a frame": func(t *testing.T, s *siege) {
		key := s.add("guest-torn")
		g, _, err := s.join("guest-torn", key)
		if err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		_, _ = io.WriteString(g, "\x00\x00\xff\xff{")
		for {
			if _, err := g.Write([]byte(" ")); err != nil {
				break
			}
			time.Sleep(time.Second) // the attack: a byte is no frame, and keeps nothing alive
		}
		s.recorded(t, busEvents, "of it", func(e event) bool { return e.VM == "guest-torn" && e.Reason == "heartbeat_timeout" })
	},
	"never reading": func(t *testing.T, s *siege) {
		s.castractl("vm", "add", "guest-deaf", "--no-key")
		g, _, err := s.join("guest-deaf", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		// Or the kernel would take megabytes for him.
		if err := g.Conn.(*net.TCPConn).SetReadBuffer(32 << 10); err != nil {
			t.Fatal(err)
		}
		payload := s.write("large.json", "%q", strings.Repeat("x", 50_000))
		for range 12 {
			s.castractl("bus", "publish", "--topic", "a.large", "@"+payload)
		}
		for i := range 16 { // each of them is all of it
			_ = g.frame(fmt.Sprintf(`{"type":"subscribe","topic":"a.large","sub":"s%d","from":"start"}`, i))
		}
		for {
			if err := g.frame(`{"type":"heartbeat"}`); err != nil {
				break
			}
			time.Sleep(time.Second)
			if all, _ := s.events(busEvents); has(all, func(e event) bool { return e.VM == "guest-deaf" && e.Action == "disconnect" }) {
				break
			}
		}
		for _, action := range []string{"throttle", "disconnect"} {
			s.recorded(t, busEvents, "of it", func(e event) bool {
				return e.VM == "guest-deaf" && e.Reason == "slow_consumer" && e.Action == action &&
					strings.Contains(e.Detail, `"a.large"`) && strings.Contains(e.Detail, "lags by") && strings.Contains(e.Detail, "bytes")
			})
		}
		s.limited(t, "unsent_bytes", 1)
	},
}

func has(all []event, pred func(event) bool) bool {
	for _, e := range all {
		if pred(e) {
			return true
		}
	}
	return false
}

func halfClose(g *guestConn) error {
	return g.Conn.(interface{ CloseWrite() error }).CloseWrite()
}

// timesOut does something that never finishes the handshake.
func (s *siege) timesOut(t *testing.T, attack func(g *guestConn)) {
	t.Helper()
	g, err := s.dial()
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	go attack(g) // ends when writing fails
	line, err := g.line()
	for strings.HasPrefix(line, "challenge ") {
		line, err = g.line()
	}
	if line != "error: read-timeout" {
		t.Errorf("answered %q, %v", line, err)
	}
	me := g.LocalAddr().String()
	s.recorded(t, handshakeEvents, "of "+me, func(e event) bool {
		return e.Remote == me && e.Outcome == "timeout" && e.Reason == "read-timeout"
	})
}
