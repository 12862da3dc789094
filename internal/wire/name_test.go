package wire

import (
	"strings"
	"testing"
)

func TestValidName(t *testing.T) {
	for name, want := range map[string]bool{
		"web1": true, "W": true, "0": true, "a.b_c-d": true, "9lives": true, "host": true, "a..": true,
		strings.Repeat("a", 128): true,
		strings.Repeat("a", 129): false,
		"":                       false, ".": false, "..": false, "-a": false, "_a": false, ".a": false,
		"a/b": false, "a b": false, "a:b": false, "wéb": false, "a\x00": false, "a\n": false, "a*": false, "../etc": false,
	} {
		if got := ValidName(name); got != want {
			t.Errorf("ValidName(%q) = %v", name, got)
		}
	}
}

func TestReserved(t *testing.T) {
	for name, want := range map[string]bool{"host": true, "HOST": true, "hOsT": true, "host1": false, "hos": false, "": false} {
		if got := Reserved(name); got != want {
			t.Errorf("Reserved(%q) = %v", name, got)
		}
	}
}

func TestValidSubName(t *testing.T) {
	for name, want := range map[string]bool{
		"s": true, "a.b-c_d": true, strings.Repeat("a", 64): true,
		strings.Repeat("a", 65): false, "": false, "-": false, "vm:web1": false, "a/b": false,
	} {
		if got := ValidSubName(name); got != want {
			t.Errorf("ValidSubName(%q) = %v", name, got)
		}
		if got := ValidSubName([]byte(name)); got != want {
			t.Errorf("ValidSubName of the bytes %q = %v", name, got)
		}
	}
}

func TestValidID(t *testing.T) {
	for id, want := range map[string]bool{
		"x": true, " ": true, "größe": true, "\x00": true, strings.Repeat("a", 128): true,
		"": false, strings.Repeat("a", 129): false, strings.Repeat("ö", 65): false, "\xff": false,
	} {
		if got := ValidID(id); got != want {
			t.Errorf("ValidID(%q) = %v", id, got)
		}
		if got := ValidID([]byte(id)); got != want {
			t.Errorf("ValidID of the bytes %q = %v", id, got)
		}
	}
}

func TestValidTopic(t *testing.T) {
	for topic, want := range map[string]bool{
		"broadcast": true, "a": true, "A.b_c/d:e-f": true, ".": true, "a..b": true, "/": true, "castra.presence": true,
		"vm": true, "vmx:": true, "VM:": true, "x.vm:": true,
		"vm:web1": true, "vm:host": true, "vm:web1/x": true, "vm:web.1/a/b:c.d": true, "vm:web1//": true,
		"vm:" + strings.Repeat("a", 128) + "/x": true,
		strings.Repeat("a", 255):                true,
		strings.Repeat("a", 256):                false,
		"vm:" + strings.Repeat("a", 129):        false,
		"":                                      false, "a b": false, "a*": false, "*": false, ">": false, "ä": false, "a\n": false, "a\x00": false,
		"vm:": false, "vm:/x": false, "vm:web1/": false, "vm:-a": false, "vm:a:b": false, "vm:.": false,
	} {
		if got := ValidTopic(topic); got != want {
			t.Errorf("ValidTopic(%q) = %v", topic, got)
		}
		if got := ValidTopic([]byte(topic)); got != want {
			t.Errorf("ValidTopic of the bytes %q = %v", topic, got)
		}
	}
}

func TestTopicVM(t *testing.T) {
	for topic, want := range map[string]struct {
		name string
		ok   bool
	}{
		"vm:web1": {"web1", true}, "vm:web1/x": {"web1", true}, "vm:web1/>": {"web1", true}, "vm:web.1/a/b": {"web.1", true},
		"vm:*": {"", true}, "vm:>": {"", true}, "vm:*/x": {"", true}, "vm:": {"", true},
		"broadcast": {}, "castra.presence": {}, ">": {}, "VM:web1": {}, "x.vm:web1": {}, "": {},
	} {
		if name, ok := TopicVM(topic); name != want.name || ok != want.ok {
			t.Errorf("TopicVM(%q) = %q, %v", topic, name, ok)
		}
	}
}
