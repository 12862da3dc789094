package wire

import (
	"encoding/hex"
	"errors"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
)

const (
	testNonce = "000102030405060708090a0b0c0d0e0f"
	testMAC   = "000102030405060708090a0b0c0d0e0f000102030405060708090A0B0C0D0E0F"
)

var helloTests = []struct {
	line string
	want Hello
}{
	{"hello vm:web1 capabilities=bus-v1", Hello{VM: "web1", HasVM: true, Caps: "bus-v1"}},
	{"HELLO VM:Web1 Capabilities=Bus-V1", Hello{VM: "Web1", HasVM: true, Caps: "Bus-V1"}},
	{"hello web1 capabilities=bus-v1", Hello{VM: "web1", HasVM: true, Caps: "bus-v1"}},
	{"hello web1", Hello{VM: "web1", HasVM: true}},
	{"hello", Hello{}},
	{"hello capabilities=bus-v1", Hello{Caps: "bus-v1"}},
	{"hello capabilities=bus-v1 vm:web1", Hello{VM: "web1", HasVM: true, Caps: "bus-v1"}},
	{"hello vm:", Hello{HasVM: true}},
	{"  hello   vm:web1  capabilities=a,b  ", Hello{VM: "web1", HasVM: true, Caps: "a,b"}},
	{"hello vm:web1 capabilities=", Hello{VM: "web1", HasVM: true}},
	{"hello vm:web1 color=blue capabilities=bus-v1 x= x=y=z", Hello{VM: "web1", HasVM: true, Caps: "bus-v1"}},
	{
		"hello vm:web1 capabilities=bus-v1,auth-hmac-v1 nonce=" + testNonce,
		Hello{VM: "web1", HasVM: true, Caps: "bus-v1,auth-hmac-v1", Nonce: testNonce},
	},
	// An invalid name is refused for what it is, not as a broken line.
	{"hello vm:../etc capabilities=bus-v1", Hello{VM: "../etc", HasVM: true, Caps: "bus-v1"}},
	{"hello vm:wéb\x00\t capabilities=bus-v1", Hello{VM: "wéb\x00\t", HasVM: true, Caps: "bus-v1"}},
	{"hello wéb\x00 capabilities=bus-v1", Hello{VM: "wéb\x00", HasVM: true, Caps: "bus-v1"}},
	{"hello vm:a=b", Hello{VM: "a=b", HasVM: true}},
	{"hello vm:vm:a", Hello{VM: "vm:a", HasVM: true}},
}

var badHellos = []string{
	"", " ", "helo vm:web1", "hellovm:web1", "GET / HTTP/1.1", "hello\tvm:web1", "\x16\x03\x01\x02\x00",
	"hello vm:web1 vm:web1", "hello web1 vm:web1", "hello vm:web1 web2", "hello capabilities=a web1",
	"hello vm:web1 capabilities=a capabilities=b", "hello vm:web1 capabilities=a CAPABILITIES=",
	"hello vm:web1 capabilities=bus\x00-v1", "hello vm:web1 capabilities=büs", "hello vm:web1\r x=\r", "hello w\xffb=1",
	"hello vm:web1 nonce=", "hello vm:web1 nonce=" + testNonce[1:], "hello vm:web1 nonce=" + testNonce + "0",
	"hello vm:web1 nonce=" + testNonce[1:] + "g", "hello vm:web1 nonce=" + testNonce + " nonce=" + testNonce,
	"hello vm:web1 x=" + strings.Repeat("y", MaxLine),
}

func TestParseHello(t *testing.T) {
	for _, tt := range helloTests {
		if got, err := ParseHello([]byte(tt.line)); err != nil || got != tt.want {
			t.Errorf("ParseHello(%q) = %+v, %v", tt.line, got, err)
		}
	}
	for _, line := range badHellos {
		if got, err := ParseHello([]byte(line)); !errors.Is(err, ErrProtocol) {
			t.Errorf("ParseHello(%q) = %+v, %v", line, got, err)
		}
	}
	const head = "hello vm:web1 x="
	if _, err := ParseHello([]byte(head + strings.Repeat("y", MaxLine-1-len(head)))); err != nil {
		t.Errorf("a hello that fills its line: %v", err)
	}
}

func TestHelloCapabilities(t *testing.T) {
	h := Hello{Caps: "Bus-V1,,x,bus-v1,Auth-Hmac-v1,X"}
	if got, want := h.Capabilities(), []string{"bus-v1", "x", "auth-hmac-v1"}; !slices.Equal(got, want) {
		t.Errorf("Capabilities = %q", got)
	}
	for capability, want := range map[string]bool{CapBus: true, CapAuth: true, "BUS-v1": true, CapHostBus: false, "bus": false} {
		if h.Has(capability) != want {
			t.Errorf("Has(%q) = %v", capability, !want)
		}
	}
	if got := (Hello{}).Capabilities(); len(got) != 0 {
		t.Errorf("no capabilities give %q", got)
	}
}

var replyTests = []struct {
	line string
	want Reply
}{
	{"ok", Reply{OK: true}},
	{"ok session=sess-1", Reply{OK: true, Token: "sess-1"}},
	{"OK Session=sess-1 x=y", Reply{OK: true, Token: "sess-1"}},
	{"ok session=sess-1 proof=" + testMAC, Reply{OK: true, Token: "sess-1", Proof: testMAC}},
	{"error: unknown-vm", Reply{Refusal: ReasonUnknownVM}},
	{"error: handshake identity must not be empty", Reply{Refusal: "handshake identity must not be empty"}},
	{"challenge alg=hmac-sha256 nonce=" + testNonce, Reply{Challenge: testNonce}},
	{"challenge nonce=" + testNonce + " alg=HMAC-SHA256 x=y", Reply{Challenge: testNonce}},
}

var badReplies = []string{
	"", " ", "okay", "ok sess-1", "ok session=", "ok session=a session=b", "ok session=a\x00", "ok session=ä",
	"ok session=a proof=00", "ok session=a proof=" + testMAC + "0", "ok session=a proof=" + testMAC[1:] + "x",
	"error", "error:", "error: ", "error: \x1b[31m", "error: pas autorisé", Greeting,
	"challenge", "challenge alg=hmac-sha256", "challenge nonce=" + testNonce, "challenge alg=hmac-md5 nonce=" + testNonce,
	"challenge alg=hmac-sha256 nonce=" + testNonce[1:], "challenge alg=hmac-sha256 nonce=" + testNonce + " nonce=" + testNonce,
	"ok session=" + strings.Repeat("y", MaxLine),
}

func TestParseReply(t *testing.T) {
	for _, tt := range replyTests {
		if got, err := ParseReply([]byte(tt.line)); err != nil || got != tt.want {
			t.Errorf("ParseReply(%q) = %+v, %v", tt.line, got, err)
		}
	}
	for _, line := range badReplies {
		if got, err := ParseReply([]byte(line)); !errors.Is(err, ErrProtocol) || got != (Reply{}) {
			t.Errorf("ParseReply(%q) = %+v, %v", line, got, err)
		}
		if nonce, err := ParseChallenge([]byte(line)); !errors.Is(err, ErrProtocol) || nonce != "" {
			t.Errorf("ParseChallenge(%q) = %q, %v", line, nonce, err)
		}
	}
}

func TestParseAuth(t *testing.T) {
	for _, line := range []string{"auth mac=" + testMAC, "AUTH MAC=" + testMAC, " auth  mac=" + testMAC + " "} {
		if mac, err := ParseAuth([]byte(line)); err != nil || mac != testMAC {
			t.Errorf("ParseAuth(%q) = %q, %v", line, mac, err)
		}
	}
	for _, line := range []string{
		"", "auth", "auth " + testMAC, "auth mac=", "auth mac=" + testMAC[1:], "auth mac=" + testMAC + "0",
		"auth mac=" + testMAC[1:] + "g", "auth mac=" + testMAC + " x=y", "auth x=y mac=" + testMAC, "hello vm:web1",
		"auth mac=" + testMAC + "\t", "auth mac=" + testMAC + strings.Repeat(" ", MaxLine),
	} {
		if mac, err := ParseAuth([]byte(line)); !errors.Is(err, ErrProtocol) {
			t.Errorf("ParseAuth(%q) = %q, %v", line, mac, err)
		}
	}
}

func TestHandshakeLines(t *testing.T) {
	keep := slices.Clip([]byte("kept ")) // so that no two appends share memory
	for want, got := range map[string][]byte{
		"hello vm:web1 capabilities=bus-v1\n":                         AppendHello(keep, "web1", "bus-v1", ""),
		"hello vm:web1\n":                                             AppendHello(keep, "web1", "", ""),
		"hello vm:web1 capabilities=bus-v1 nonce=" + testNonce + "\n": AppendHello(keep, "web1", "bus-v1", testNonce),
		"ok\n":                AppendOK(keep, "", ""),
		"ok session=sess-1\n": AppendOK(keep, "sess-1", ""),
		"ok session=sess-1 proof=" + testMAC + "\n":           AppendOK(keep, "sess-1", testMAC),
		"error: unknown-vm\n":                                 AppendRefusal(keep, ReasonUnknownVM),
		"challenge alg=hmac-sha256 nonce=" + testNonce + "\n": AppendChallenge(keep, testNonce),
		"auth mac=" + testMAC + "\n":                          AppendAuth(keep, testMAC),
	} {
		if string(got) != "kept "+want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// The vector was computed with another implementation of HMAC. docs/PROTOCOL.md
// shows it to whoever writes a guest in another language.
func TestProofVector(t *testing.T) {
	key := make([]byte, 32)
	for i := range key {
		key[i] = byte(i)
	}
	const (
		name, caps  = "web1", "bus-v1,auth-hmac-v1"
		clientNonce = "00112233445566778899aabbccddeeff"
		serverNonce = "ffeeddccbbaa99887766554433221100"
		token       = "sess-0123456789abcdef0123456789abcdef"
		wantMAC     = "be634d957982fc7f8550b532f6426c597c918d33daab8b5d8c321395d7eacdcc"
		wantProof   = "ace50ffc81299fcaeb35aeb36e5fe455b8bcfaf12e375175140cc75ae667c0b7"
	)
	if got := hex.EncodeToString(ClientMAC(key, name, caps, clientNonce, serverNonce)); got != wantMAC {
		t.Errorf("ClientMAC = %s", got)
	}
	if got := hex.EncodeToString(ServerProof(key, name, caps, clientNonce, serverNonce, token)); got != wantProof {
		t.Errorf("ServerProof = %s", got)
	}

	doc, err := os.ReadFile("../../docs/PROTOCOL.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range [][]byte{
		AppendHello(nil, name, caps, clientNonce),
		AppendChallenge(nil, serverNonce),
		AppendAuth(nil, wantMAC),
		AppendOK(nil, token, wantProof),
		[]byte(hex.EncodeToString(key)),
	} {
		if !strings.Contains(string(doc), string(line)) {
			t.Errorf("docs/PROTOCOL.md lacks %q", line)
		}
	}
}

func FuzzParseHello(f *testing.F) {
	for _, tt := range helloTests {
		f.Add([]byte(tt.line))
	}
	for _, line := range badHellos {
		f.Add([]byte(line))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		before := string(line)
		h, err := ParseHello(line)
		if string(line) != before {
			t.Fatal("ParseHello changed the line")
		}
		if err != nil {
			if !errors.Is(err, ErrProtocol) || h != (Hello{}) {
				t.Fatalf("%+v, %v", h, err)
			}
			return
		}
		if len(line) >= MaxLine || !plain(h.Caps) || strings.Contains(h.VM+h.Caps, " ") || !h.HasVM && h.VM != "" {
			t.Fatalf("%+v", h)
		}
		for _, c := range h.Capabilities() {
			if !h.Has(c) || !h.Has(strings.ToUpper(c)) {
				t.Fatalf("%q is in Capabilities but Has denies it", c)
			}
		}
		if !h.HasVM {
			return
		}
		again := AppendHello(nil, h.VM, h.Caps, h.Nonce)
		if len(again) > MaxLine {
			return // "vm:" was not spelled out
		}
		if got, err := ParseHello(again[:len(again)-1]); err != nil || got != h {
			t.Fatalf("%q: %+v, then %+v, %v", again, h, got, err)
		}
	})
}

func FuzzParseReply(f *testing.F) {
	for _, tt := range replyTests {
		f.Add([]byte(tt.line))
	}
	for _, line := range badReplies {
		f.Add([]byte(line))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		r, err := ParseReply(line)
		if err != nil {
			if !errors.Is(err, ErrProtocol) || r != (Reply{}) {
				t.Fatalf("%+v, %v", r, err)
			}
			return
		}
		var again []byte
		switch {
		case r.OK:
			again = AppendOK(nil, r.Token, r.Proof)
		case r.Challenge != "":
			again = AppendChallenge(nil, r.Challenge)
		default:
			again = AppendRefusal(nil, r.Refusal)
		}
		if got, err := ParseReply(again[:len(again)-1]); err != nil || !reflect.DeepEqual(got, r) {
			t.Fatalf("%q: %+v, then %+v, %v", again, r, got, err)
		}
	})
}
