package cli

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestEscape(t *testing.T) {
	for text, want := range map[string]string{
		"":                       "",
		"plain ünïcode – 漢字 🙂":   "plain ünïcode – 漢字 🙂",
		"\x1b[31mred":            `\u001b[31mred`,
		"a\nb\tc\r":              `a\u000ab\u0009c\u000d`,
		"\x7f":                   `\u007f`,
		"\u009b31m":              `\u009b31m`,
		"\u0085":                 `\u0085`,
		"\u2028\u2029":           `\u2028\u2029`,
		"user\u202egnp.exe":      `user\u202egnp.exe`,
		"\u2066x\u2069":          `\u2066x\u2069`,
		"bad \xff\xfe utf8 \xc2": `bad \ufffd\ufffd utf8 \ufffd`,
		"\x9b31m":                `\ufffd31m`,
		"said \ufffd":            "said \ufffd",
		`{"a":"back\\slash"}`:    `{"a":"back\\slash"}`,
	} {
		if got := escape(text); got != want {
			t.Errorf("escape(%q) = %q, want %q", text, got, want)
		}
	}
}

func FuzzEscape(f *testing.F) {
	f.Add("x\x1b\x7f\u009b\u202e\xff")
	f.Add(`"a"`)
	f.Fuzz(func(t *testing.T, text string) {
		got := escape(text)
		if strings.IndexFunc(got, unsafe) >= 0 || !utf8.ValidString(got) {
			t.Errorf("escape(%q) = %q", text, got)
		}
		var before, after any
		if json.Unmarshal([]byte(text), &before) != nil || strings.ContainsAny(text, "\t\n\r") {
			return // white space between tokens never reaches escape: records are compact
		}
		if err := json.Unmarshal([]byte(got), &after); err != nil {
			t.Fatalf("%q is JSON, %q is not: %v", text, got, err)
		}
		a, _ := json.Marshal(before)
		b, _ := json.Marshal(after)
		if string(a) != string(b) {
			t.Errorf("%q means %s, %q means %s", text, a, got, b)
		}
	})
}
