package wire

import (
	"fmt"
	"slices"
	"strings"
)

// The reasons for which a handshake is refused or ends, as they stand in an
// "error:" line and in the handshake events.
const (
	ReasonMissingCapability = "missing-capability"
	ReasonReservedIdentity  = "reserved-identity"
	ReasonUnknownVM         = "unknown-vm"
	ReasonInvalidName       = "invalid-name"
	ReasonForbidden         = "forbidden"
	ReasonAuthRequired      = "auth-required"
	ReasonAuthFailed        = "auth-failed"
	ReasonProtocolError     = "protocol-error"
	ReasonReadTimeout       = "read-timeout"
	ReasonIOError           = "io-error"
	ReasonStorageError      = "storage-error"
)

// Refusals for the host's limits, which only a misuse reaches. The handshake
// events, whose reasons are a closed list, have another word for them.
const (
	ReasonTooManyVMs      = "too-many-vms"
	ReasonTooManySessions = "too-many-sessions"
	ReasonRateLimited     = "rate-limited"
)

const (
	nonceDigits = 32 // 16 random bytes in hex
	macDigits   = 64 // an HMAC-SHA256 in hex
	algorithm   = "hmac-sha256"
)

// Hello is what a guest's first line says.
type Hello struct {
	VM    string // the name it goes by, unchecked: see ValidName and Reserved
	HasVM bool   // it gave a name, be it an empty one
	Caps  string // the capabilities as sent, for the proof is computed over them
	Nonce string // 32 hex digits; empty: none
}

// Has reports whether the guest has the capability, in any case.
func (h Hello) Has(capability string) bool {
	for c := range strings.SplitSeq(h.Caps, ",") {
		if strings.EqualFold(c, capability) {
			return true
		}
	}
	return false
}

// Capabilities gives what the guest can do in lower case and in the order sent,
// each once.
func (h Hello) Capabilities() []string {
	var caps []string
	for c := range strings.SplitSeq(strings.ToLower(h.Caps), ",") {
		if c != "" && !slices.Contains(caps, c) {
			caps = append(caps, c)
		}
	}
	return caps
}

// ParseHello takes a guest's first line, without its line end, apart. The name
// may stand first without "vm:", as the oldest guests send it, and is not
// checked: a line whose name is invalid parses, so that it can be refused as
// such. Errors wrap ErrProtocol.
func ParseHello(line []byte) (Hello, error) {
	words, err := splitLine(line)
	if err != nil {
		return Hello{}, err
	}
	if len(words) == 0 || !strings.EqualFold(words[0], "hello") {
		return Hello{}, lineError(`does not begin with "hello"`)
	}
	var h Hello
	var hasCaps bool
	for i, word := range words[1:] {
		if name, ok := cutFold(word, vmPrefix); ok {
			if h.HasVM {
				return Hello{}, lineError("names two VMs")
			}
			h.VM, h.HasVM = name, true
			continue
		}
		key, value, ok := strings.Cut(word, "=")
		switch {
		case !ok && i == 0:
			h.VM, h.HasVM = word, true
		case !plain(word):
			return Hello{}, lineError("holds a byte that is not printable ASCII")
		case !ok:
			return Hello{}, lineError("holds a word that is no key=value")
		case strings.EqualFold(key, "capabilities"):
			if hasCaps {
				return Hello{}, lineError("gives capabilities twice")
			}
			h.Caps, hasCaps = value, true
		case strings.EqualFold(key, "nonce"):
			if h.Nonce != "" {
				return Hello{}, lineError("gives nonce twice")
			}
			if !isHex(value, nonceDigits) {
				return Hello{}, lineError("nonce is not 32 hex digits")
			}
			h.Nonce = value
		}
	}
	return h, nil
}

// AppendHello appends a guest's first line. An empty caps or nonce is left out.
// The line is as valid as its parts.
func AppendHello(dst []byte, vm, caps, nonce string) []byte {
	dst = append(dst, "hello vm:"...)
	dst = append(dst, vm...)
	dst = appendWord(dst, " capabilities=", caps)
	dst = appendWord(dst, " nonce=", nonce)
	return append(dst, '\n')
}

// AppendOK appends the line that grants a session. With an empty token it is the
// bare "ok" of a guest without CapBus, which gets no session; an empty proof is
// left out.
func AppendOK(dst []byte, token, proof string) []byte {
	dst = append(dst, "ok"...)
	dst = appendWord(dst, " session=", token)
	dst = appendWord(dst, " proof=", proof)
	return append(dst, '\n')
}

// AppendRefusal appends the line that refuses a handshake, with one of the
// Reason constants.
func AppendRefusal(dst []byte, reason string) []byte {
	dst = append(dst, "error: "...)
	dst = append(dst, reason...)
	return append(dst, '\n')
}

// AppendChallenge appends the line that asks a guest to prove its name.
func AppendChallenge(dst []byte, nonce string) []byte {
	dst = append(dst, "challenge alg="+algorithm+" nonce="...)
	dst = append(dst, nonce...)
	return append(dst, '\n')
}

// AppendAuth appends a guest's answer to a challenge; mac is ClientMAC in hex.
func AppendAuth(dst []byte, mac string) []byte {
	dst = append(dst, "auth mac="...)
	dst = append(dst, mac...)
	return append(dst, '\n')
}

// ParseAuth gives the 64 hex digits of a guest's answer to a challenge as they
// were sent. Whatever is not exactly that answer is an ErrProtocol.
func ParseAuth(line []byte) (mac string, err error) {
	words, err := splitLine(line)
	if err != nil {
		return "", err
	}
	if len(words) != 2 || !strings.EqualFold(words[0], "auth") {
		return "", lineError(`is not "auth mac=<64 hex digits>"`)
	}
	mac, ok := cutFold(words[1], "mac=")
	if !ok || !isHex(mac, macDigits) {
		return "", lineError(`is not "auth mac=<64 hex digits>"`)
	}
	return mac, nil
}

// Reply is what a broker's line in the handshake says: exactly one of OK,
// Challenge and Refusal is set.
type Reply struct {
	OK        bool
	Token     string // with OK; empty: the handshake was recorded, but there is no session
	Proof     string // with OK: 64 hex digits; empty: none, which a guest with a key must refuse
	Challenge string // the broker's nonce, 32 hex digits
	Refusal   string // the reason, mostly one of the Reason constants; whole sentences from older brokers
}

// ParseReply takes a broker's line in the handshake apart. Unknown key=value
// words are ignored. Errors wrap ErrProtocol.
func ParseReply(line []byte) (Reply, error) {
	words, err := splitLine(line)
	if err != nil {
		return Reply{}, err
	}
	if !plain(string(line)) {
		return Reply{}, lineError("holds a byte that is not printable ASCII")
	}
	if len(words) == 0 {
		return Reply{}, lineError("is empty")
	}
	switch strings.ToLower(words[0]) {
	case "ok":
		token, proof, err := pairs(words[1:], "session", "proof")
		if err != nil {
			return Reply{}, err
		}
		if proof != "" && !isHex(proof, macDigits) {
			return Reply{}, lineError("proof is not 64 hex digits")
		}
		return Reply{OK: true, Token: token, Proof: proof}, nil
	case "challenge":
		nonce, err := ParseChallenge(line)
		return Reply{Challenge: nonce}, err
	case "error:":
		if len(words) == 1 {
			return Reply{}, lineError("refuses without a reason")
		}
		return Reply{Refusal: strings.Join(words[1:], " ")}, nil
	}
	return Reply{}, lineError("is none of ok, challenge and error:")
}

// ParseChallenge gives the broker's nonce, 32 hex digits as sent. A challenge by
// any other algorithm than hmac-sha256 is an ErrProtocol, as is any other line.
func ParseChallenge(line []byte) (nonce string, err error) {
	words, err := splitLine(line)
	if err != nil {
		return "", err
	}
	if len(words) == 0 || !strings.EqualFold(words[0], "challenge") {
		return "", lineError("is no challenge")
	}
	alg, nonce, err := pairs(words[1:], "alg", "nonce")
	if err != nil {
		return "", err
	}
	if !strings.EqualFold(alg, algorithm) {
		return "", lineError("asks for another algorithm than " + algorithm)
	}
	if !isHex(nonce, nonceDigits) {
		return "", lineError("nonce is not 32 hex digits")
	}
	return nonce, nil
}

// pairs takes the values of two keys from key=value words, of which it ignores
// the others.
func pairs(words []string, first, second string) (a, b string, err error) {
	for _, word := range words {
		key, value, ok := strings.Cut(word, "=")
		var at *string
		switch {
		case !ok || !plain(word):
			return "", "", lineError("holds a word that is no key=value of printable ASCII")
		case strings.EqualFold(key, first):
			at = &a
		case strings.EqualFold(key, second):
			at = &b
		default:
			continue
		}
		if *at != "" || value == "" {
			return "", "", lineError(strings.ToLower(key) + " is empty or given twice")
		}
		*at = value
	}
	return a, b, nil
}

// splitLine gives the words of a line, which are parted by one or more spaces.
func splitLine(line []byte) ([]string, error) {
	if len(line) >= MaxLine {
		return nil, lineError(fmt.Sprintf("is longer than %d bytes", MaxLine))
	}
	words := strings.Split(string(line), " ")
	return slices.DeleteFunc(words, func(w string) bool { return w == "" }), nil
}

func lineError(what string) error {
	return fmt.Errorf("%w: handshake line %s", ErrProtocol, what)
}

func appendWord(dst []byte, key, value string) []byte {
	if value == "" {
		return dst
	}
	dst = append(dst, key...)
	return append(dst, value...)
}

// cutFold is strings.CutPrefix without regard to case.
func cutFold(s, prefix string) (rest string, ok bool) {
	if len(s) < len(prefix) || !strings.EqualFold(s[:len(prefix)], prefix) {
		return s, false
	}
	return s[len(prefix):], true
}

// plain reports whether s is printable ASCII: what may stand in a log, and what
// no two programs read differently.
func plain(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

func isHex(s string, digits int) bool {
	if len(s) != digits {
		return false
	}
	for i := range len(s) {
		if unhex[s[i]] > 15 {
			return false
		}
	}
	return true
}
