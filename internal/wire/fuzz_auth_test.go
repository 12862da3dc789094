package wire

import (
	"encoding/hex"
	"strings"
	"testing"
)

// FuzzParseAuth takes whatever line as a guest's answer to a challenge: what is one
// is the word, one space or more, and 64 hex digits, and nothing else.
func FuzzParseAuth(f *testing.F) {
	mac := strings.Repeat("0fA", 21) + "0"
	for _, line := range []string{
		"auth mac=" + mac, "AUTH  MAC=" + mac, "auth mac=" + mac + " x=y", "auth mac=" + mac[1:], "auth mac=" + mac + "0", "auth\tmac=" + mac, "auth mac=" + mac + "\r",
		"auth", "mac=" + mac, "auth mac=" + mac + " mac=" + mac, "auth mac=" + strings.Repeat("\u017f", 32),
	} {
		f.Add([]byte(line))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		mac, err := ParseAuth(line)
		if err != nil {
			if mac != "" {
				t.Errorf("%q gives %q beside %v", line, mac, err)
			}
			return
		}
		if raw, err := hex.DecodeString(mac); err != nil || len(raw) != 32 || !strings.HasSuffix(strings.TrimRight(string(line), " "), mac) || len(line) >= MaxLine {
			t.Errorf("%q gives %q", line, mac)
		}
	})
}
