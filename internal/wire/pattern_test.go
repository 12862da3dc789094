package wire

import (
	"regexp"
	"strings"
	"testing"
)

var badPatterns = []string{
	"", strings.Repeat("a", 256), "a b", "a?", "ä", "a\x00", // length and bytes
	"a*", "*a", "a.b*", "**", "*>", "a.*b.c", "castra.a*", "castra.>a", // a wildcard is a whole token
	">.a", "a.>.b", "castra.>.a", "vm:web1/>.a", "vm:>/x", // ">" comes last
	"vm:", "vm:/", "vm:web1/", "vm:*/", "vm:a*", "vm:*a", "vm:web.*", "vm:web1.>", "vm:-", // a "vm:" pattern's name
}

func TestParsePatternRefuses(t *testing.T) {
	for _, s := range badPatterns {
		if p, err := ParsePattern(s); err == nil {
			t.Errorf("ParsePattern(%q) gave %+v", s, p)
		}
	}
}

var patternTests = []struct {
	pattern  string
	literal  bool
	vm       string
	ofVM     bool
	matches  string // topics, parted by spaces
	excludes string
}{
	{"broadcast", true, "", false, "broadcast", "broadcast.x Broadcast broadcas"},
	{"a.b", true, "", false, "a.b", "a a.b.c a.c"},
	{"a..b", true, "", false, "a..b", "a.b"},
	{"*", false, "", false, "broadcast a castra vm x:y a/b", "a.b vm:web1 vm:web1/x castra.presence"},
	{">", false, "", false, "broadcast a.b a.b.c castra vm .", "vm:web1 vm:web.1 vm:web1/x castra.presence castra."},
	{"*.*", false, "", false, "a.b castrax.b .", "a a.b.c castra.presence vm:web.1 vm:web1/a.b"},
	{"*.>", false, "", false, "a.b a.b.c", "a castra.presence vm:web.1 vm:web.1/x"},
	{"a.*", false, "", false, "a.b a. a.*x", "a a.b.c b.a ab"},
	{"a.*.c", false, "", false, "a.b.c a..c", "a.c a.b a.b.c.d"},
	{"a.>", false, "", false, "a.b a.b.c a.", "a b.a ab"},
	{"*.presence", false, "", false, "a.presence", "castra.presence"},
	{"castra.presence", true, "", false, "castra.presence", "castra.x"},
	{"castra.*", false, "", false, "castra.presence castra.", "castra castra.a.b a.b"},
	{"castra.>", false, "", false, "castra.presence castra.a.b", "castra a.b vm:web1"},
	{"castra.*.b", false, "", false, "castra.a.b", "castra.a castra.a.c a.a.b"},
	{"vm:web1", true, "web1", true, "vm:web1", "vm:web2 vm:web1/x web1"},
	{"vm:web1/cmd", true, "web1", true, "vm:web1/cmd", "vm:web1 vm:web1/cmd.x"},
	{"vm:web1/*", false, "web1", true, "vm:web1/x vm:web1/x/y", "vm:web1 vm:web1/x.y vm:web2/x"},
	{"vm:web1/>", false, "web1", true, "vm:web1/x vm:web1/x.y", "vm:web1 vm:web2/x vm:web11/x x"},
	{"vm:web1/cmd.*", false, "web1", true, "vm:web1/cmd.start", "vm:web1/cmd vm:web1/cmd.a.b vm:web2/cmd.start cmd.start"},
	{"vm:web.1/>", false, "web.1", true, "vm:web.1/x", "vm:web.1 vm:web.2/x"},
	{"vm:*", false, "", true, "vm:web1 vm:web.1 vm:host", "vm:web1/x broadcast"},
	{"vm:*/x", false, "", true, "vm:web1/x vm:web.1/x", "vm:web1 vm:web1/y vm:web1/x.y"},
	{"vm:*/*.>", false, "", true, "vm:web1/a.b vm:web1/a.b.c", "vm:web1 vm:web1/a a.b"},
	{"vm:>", false, "", true, "vm:web1 vm:web.1 vm:web1/x vm:web1/x.y", "broadcast castra.presence"},
}

func TestPattern(t *testing.T) {
	for _, tt := range patternTests {
		p, err := ParsePattern(tt.pattern)
		if err != nil {
			t.Errorf("ParsePattern: %v", err)
			continue
		}
		if p.String() != tt.pattern || p.Literal() != tt.literal {
			t.Errorf("%q: String %q, Literal %v", tt.pattern, p.String(), p.Literal())
		}
		if vm, ok := p.VM(); vm != tt.vm || ok != tt.ofVM {
			t.Errorf("%q: VM %q, %v", tt.pattern, vm, ok)
		}
		for topic := range strings.FieldsSeq(tt.matches) {
			if !p.Match(topic) {
				t.Errorf("%q does not match %q", tt.pattern, topic)
			}
		}
		for topic := range strings.FieldsSeq(tt.excludes) {
			if p.Match(topic) {
				t.Errorf("%q matches %q", tt.pattern, topic)
			}
		}
	}
	if (Pattern{}).Match("") {
		t.Error("the zero pattern matches")
	}
}

// patternRegexp says in other words what a pattern selects.
func patternRegexp(pattern string) *regexp.Regexp {
	guard, prefix := "", ""
	switch {
	case strings.HasPrefix(pattern, vmPrefix):
		name, rest, ok := strings.Cut(pattern[len(vmPrefix):], "/")
		if name == ">" {
			return regexp.MustCompile(`^vm:`)
		}
		if name == "*" {
			prefix = `vm:[^/]*`
		} else {
			prefix = regexp.QuoteMeta(vmPrefix + name)
		}
		if !ok {
			return regexp.MustCompile(`^` + prefix + `$`)
		}
		prefix, pattern = prefix+"/", rest
	case strings.HasPrefix(pattern, BrokerPrefix):
		prefix, pattern = `castra\.`, pattern[len(BrokerPrefix):]
	default:
		guard = `vm:|castra\.`
	}
	var tokens []string
	for token := range strings.SplitSeq(pattern, ".") {
		switch token {
		case "*":
			tokens = append(tokens, `[^.]*`)
		case ">":
			tokens = append(tokens, `.*`)
		default:
			tokens = append(tokens, regexp.QuoteMeta(token))
		}
	}
	expr := `^` + prefix + strings.Join(tokens, `\.`) + `$`
	if guard != "" { // a leading alternative that the caller reads as "no"
		expr = `^(?:` + guard + `)()|` + expr
	}
	return regexp.MustCompile(expr)
}

func FuzzPattern(f *testing.F) {
	for _, tt := range patternTests {
		for topic := range strings.FieldsSeq(tt.matches + " " + tt.excludes) {
			f.Add(tt.pattern, topic)
		}
	}
	for _, s := range badPatterns {
		f.Add(s, s)
	}
	f.Fuzz(func(t *testing.T, pattern, topic string) {
		p, err := ParsePattern(pattern)
		if err != nil {
			if ValidTopic(pattern) {
				t.Fatalf("the topic %q is no pattern: %v", pattern, err)
			}
			p.Match(topic)
			return
		}
		if p.Literal() && !ValidTopic(pattern) {
			t.Fatalf("the literal pattern %q is no topic", pattern)
		}
		if !ValidTopic(topic) {
			p.Match(topic)
			return
		}
		found := patternRegexp(pattern).FindStringSubmatchIndex(topic)
		want := found != nil && (len(found) == 2 || found[2] < 0)
		if got := p.Match(topic); got != want {
			t.Fatalf("%q matches %q: %v", pattern, topic, got)
		}
		if own, ok := p.VM(); p.Match(topic) {
			vm, isVM := TopicVM(topic)
			if ok != isVM || own != "" && own != vm {
				t.Fatalf("%q of the VM %q matches %q", pattern, own, topic)
			}
		}
	})
}
