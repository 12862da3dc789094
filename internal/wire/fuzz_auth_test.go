package wire

import (
	"encoding/hex"
	"regexp"
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

// FuzzNames judges whatever text as a name: what is one is safe as a file's name and
// on a terminal, and the host's own is no VM's in any spelling.
func FuzzNames(f *testing.F) {
	for _, name := range []string{"web1", "host", "HOST", "ho\u017ft", "..", "a/b", "-a", "a\x00", "vm:a", strings.Repeat("a", 129), "\xff", ""} {
		f.Add(name)
	}
	lawfulName := regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)
	f.Fuzz(func(t *testing.T, name string) {
		want := lawfulName.MatchString(name) && !strings.HasSuffix(name, "\n")
		if got := ValidName(name); got != (want && len(name) <= MaxName) {
			t.Errorf("ValidName(%q) = %v", name, got)
		}
		if got := ValidSubName(name); got != (want && len(name) <= MaxSubName) || got != ValidSubName([]byte(name)) {
			t.Errorf("ValidSubName(%q) = %v", name, got)
		}
		if got := Reserved(name); got != (strings.ToLower(name) == ReservedName && ValidName(name)) {
			t.Errorf("Reserved(%q) = %v", name, got)
		}
		if owner, owned := TopicVM(name); owner != "" && (!owned || !ValidName(owner) || !strings.HasPrefix(name, vmPrefix+owner)) {
			t.Errorf("%q belongs to %q, %v", name, owner, owned)
		}
		if ValidTopic(name) != ValidTopic([]byte(name)) {
			t.Errorf("%q is a topic and is none", name)
		}
	})
}
