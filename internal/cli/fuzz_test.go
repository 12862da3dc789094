package cli

import (
	"strings"
	"testing"
)

// FuzzForward reads what --forward may be given.
func FuzzForward(f *testing.F) {
	for _, text := range []string{"tcp:2222:22", "udp:1:1", "tcp:0:1", "tcp:1", "tcp::", "x:1:2", "tcp:99999:1"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		_, _ = parseForward(text)
		if word := shellQuote(text); !strings.Contains(text, "'") && strings.Trim(word, "'") != strings.Trim(text, "'") {
			t.Errorf("%q is quoted as %q", text, word)
		}
	})
}
