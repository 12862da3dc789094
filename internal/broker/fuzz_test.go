package broker

import (
	"testing"

	"github.com/castrabus/castra/internal/wire"
)

// FuzzCursors reads whatever bytes as a VM's file of cursors.
func FuzzCursors(f *testing.F) {
	for _, text := range []string{
		`{"c":{"topic":"t","next":7}}`, `{}`, `null`, `{"c":null}`, `{"../x":{"topic":"t","next":1}}`, `{"c":{"topic":"t","next":-1}}`,
		`{"c":{"topic":"t","next":18446744073709551616}}`, `{"c":{"next":1,"next":2}}`, `[`, "\xff", `{"c":{"topic":7}}`,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		all, err := parseCursors(data)
		if err == nil && all == nil {
			t.Fatal("a map is awaited")
		}
		for name, cur := range all {
			if cur == nil || !wire.ValidSubName(name) {
				t.Errorf("%q gives %q: %v", data, name, cur)
			}
		}
	})
}

// FuzzReachable reads whatever bytes as the list of those who were reachable.
func FuzzReachable(f *testing.F) {
	for _, text := range []string{`["web1"]`, `[]`, `null`, `["../x","host","web1","web1"]`, `{"a":1}`, `[7]`, `[`, `["\ud800"]`} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		names, err := parseReachable(data)
		if err != nil {
			return
		}
		for i, name := range names {
			if !wire.ValidName(name) || wire.Reserved(name) || i > 0 && names[i-1] >= name {
				t.Errorf("%q gives %q", data, names)
			}
		}
	})
}
