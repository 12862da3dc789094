package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// lower stands for the check of patterns that the callers bring.
func lower(topic string) error {
	if topic != strings.ToLower(topic) {
		return fmt.Errorf("%q is no pattern", topic)
	}
	return nil
}

// write makes a configuration file with drop-ins a.toml, b.toml, … and gives its path.
func write(t *testing.T, text string, dropins ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "[c]*.toml")
	put(t, path, text)
	for i, d := range dropins {
		put(t, filepath.Join(path+".d", string(rune('a'+i))+".toml"), d)
	}
	return path
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestDropInsOverrideKeyByKey(t *testing.T) {
	path := write(t, `
[broker]
listen = ["127.0.0.1:1", "127.0.0.1:2"]
unknown_vms = "accept"
[store]
segment_size = 65536
`, "[broker]\nlisten = [\"127.0.0.1:3\"]\n", "store.sync = \"1s\"\n[broker]\nvms_dir = \"\"\n", "[store]\nretention_age = \"0s\"\n")
	put(t, path+".d/.hidden.toml", "nonsense")
	put(t, path+".d/a.toml~", "nonsense")
	cfg, err := LoadHost(path, lower)
	if err != nil {
		t.Fatal(err)
	}
	want := DefaultHost()
	want.Broker.Listen, want.Broker.UnknownVMs, want.Broker.VMsDir = []string{"127.0.0.1:3"}, "accept", ""
	want.Store.SegmentSize, want.Store.Sync, want.Store.RetentionAge = 64<<10, "1s", 0
	if !reflect.DeepEqual(cfg, want) {
		t.Errorf("got %+v\nwant %+v", cfg, want)
	}
}

func TestGuest(t *testing.T) {
	cfg, err := LoadGuest(write(t, `
[broker]
address = "broker.example:1"
[identity]
vm = "web1"
key_file = "/k"
[bus]
subscribe = ["vm:self", "a.*"]
socket = ""
`, "[bus]\nspool_size = \"128KiB\"\nspool_dir = \"\"\n"), lower)
	want := Guest{
		GuestBroker{"broker.example:1"},
		Identity{"web1", "/k"},
		GuestBus{Subscribe: []string{"vm:self", "a.*"}, SpoolSize: 128 << 10},
	}
	if err != nil || !reflect.DeepEqual(cfg, want) {
		t.Errorf("got %+v, %v\nwant %+v", cfg, err, want)
	}
}

func TestMissingFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "none.toml")
	if _, err := LoadHost(path, lower); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), path) {
		t.Errorf("a missing file that was asked for: %v", err)
	}
	if _, err := LoadGuest(path, lower); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing file that was asked for: %v", err)
	}
	// The default file may be missing; its drop-ins count all the same.
	put(t, path+".d/a.toml", "[limits]\nmax_vms = 7\n")
	cfg := DefaultHost()
	if from, err := load(path, true, &cfg); err != nil || cfg.Limits.MaxVMs != 7 || len(from) != 1 {
		t.Errorf("max_vms is %d, set are %v, %v", cfg.Limits.MaxVMs, from, err)
	}
	if err := os.RemoveAll(path + ".d"); err != nil {
		t.Fatal(err)
	}
	put(t, path+".d", "no directory")
	if _, err := load(path, true, &cfg); err == nil {
		t.Error("drop-ins that cannot be listed are no error")
	}
}

func TestPublishBytesFollowsTheRate(t *testing.T) {
	for text, want := range map[string]Size{
		"":                         4 << 20,
		"publish_rate = 10":        4 << 20,
		"publish_rate = 1024":      4 << 20,
		"publish_rate = 1025":      4<<20 + 4<<10,
		"publish_rate = 100000":    100000 * 4 << 10,
		"publish_bytes = \"1MiB\"": 1 << 20,
		"publish_rate = 100000\npublish_bytes = \"64KiB\"": 64 << 10,
		"publish_rate = 9223372036854775807":               1 << 50,
	} {
		cfg, err := LoadHost(write(t, "[limits]\n"+text+"\n"), lower)
		if err != nil || cfg.Limits.PublishBytes != want {
			t.Errorf("%q: %d, %v; want %d", text, cfg.Limits.PublishBytes, err, want)
		}
	}
}

// A mistake is told with its file, line and key, and with what is allowed.
func TestMistakesAreNamed(t *testing.T) {
	host := func(path string) error { _, err := LoadHost(path, lower); return err }
	guest := func(path string) error { _, err := LoadGuest(path, lower); return err }
	tests := []struct {
		load func(path string) error
		text string
		line int
		key  string
		want string
	}{
		{host, "\n[broker]\nlissten = []\n", 3, "broker.lissten", `"listen"`},
		{host, "[broker]\n\nListen = []\n", 3, "broker.Listen", "unknown key"},
		{host, "[nonsense]\nx = 1\n", 1, "nonsense", `"broker" "limits" "store"`},
		{host, "\n[nonsense.deep]\nx = 1\n", 2, "nonsense", "unknown key"},
		{host, "\nx = 1\n", 2, "x", "unknown key"},
		{host, "store.sync = \"1s\"\nstore.sink = 1\n", 2, "store.sink", "unknown key"},
		{host, "[limits]\nmax_vms = 1\n[store]\nmax_vms = 1\n", 4, "store.max_vms", "unknown key"},
		{host, "limits = {max_vms = 1, \"max vms\" = 2}\n", 1, `limits."max vms"`, "unknown key"},
		{host, "\"\" = 1\n", 1, `""`, "unknown key"},
		{host, "broker = 5\n", 1, "broker", "[broker]"},
		{host, "[[broker]]\nlisten = []\n", 1, "broker", "[broker]"},
		{host, "[broker]\nvms_dir.x = 1\n", 2, "broker.vms_dir", "a string in quotes"},
		{host, "\n[broker]x\n", 2, "", "expected"},
		{host, "[store]\nsync = \"1s\"\nsync = \"2s\"\n", 3, "", "already been defined"},
		{host, "[store]\n\nsegment_size = \"64 pounds\"", 3, "store.segment_size", `"64MiB"`},
		{host, "[store]\nsegment_size = \"64 MiB\"", 2, "store.segment_size", `"64MiB"`},
		{host, "[store]\nsegment_size = \"-64MiB\"", 2, "store.segment_size", `"64MiB"`},
		{host, "[store]\nsegment_size = -1", 2, "store.segment_size", `"64MiB"`},
		{host, "[store]\nsegment_size = 1.5", 2, "store.segment_size", "1.5"},
		{host, "[store]\nsegment_size = \"8388608TiB\"", 2, "store.segment_size", `"64MiB"`},
		{host, "[store]\nsegment_size = \"16777217TiB\"", 2, "store.segment_size", `"64MiB"`}, // 1TiB in 64 bits
		{host, "[store]\nsegment_size = 65535\n", 2, "store.segment_size", `"64KiB"`},
		{host, "[store]\nhost_retention_size = 1\n", 2, "store.host_retention_size", `"64KiB"`},
		{host, "[store]\nvm_retention_size = 1\n", 2, "store.vm_retention_size", `"64KiB"`},
		{host, "[store]\nretention_age = \"-1h\"\n", 2, "store.retention_age", `"720h"`},
		{host, "[store]\nsync = \"often\"\n", 2, "store.sync", `"always"`},
		{host, "[store]\nsync = \"0s\"\n", 2, "store.sync", `"always"`},
		{host, "[store]\nsync = 1\n", 2, "store.sync", `"always"`},
		{host, "[store]\nstate_dir = \"\"\n", 2, "store.state_dir", "a directory"},
		{host, "[store]\nlog_dir = \"\"\n", 2, "store.log_dir", "a directory"},
		{host, "[broker]\nunknown_vms = \"maybe\"\n", 2, "broker.unknown_vms", `"reject" or "accept"`},
		{host, "[broker]\nunknown_vms = true\n", 2, "broker.unknown_vms", "a string in quotes"},
		{host, "[broker]\nlisten = \"127.0.0.1:7070\"\n", 2, "broker.listen", "a list of strings"},
		{host, "[broker]\nlisten = [7070]\n", 2, "broker.listen", "a list of strings"},
		{host, "[broker]\nlisten = [\"7070\"]\n", 2, "broker.listen", `"127.0.0.1:7070"`},
		{host, "[broker]\nlisten = [\"127.0.0.1:65536\"]\n", 2, "broker.listen", "65535"},
		{host, "[broker]\nlisten = [\"127.0.0.1:http\"]\n", 2, "broker.listen", "65535"},
		{host, "[broker]\nlisten = [\"::1:7070\"]\n", 2, "broker.listen", `"[::1]:7070"`},
		{host, "[broker]\nlisten = [\"a b:1\"]\n", 2, "broker.listen", `"127.0.0.1:7070"`},
		{host, "[broker]\nguest_topics = [\"ok\", \"BAD\"]\n", 2, "broker.guest_topics", `"BAD" is no pattern`},
		{host, "[broker]\nhandshake_timeout = \"0s\"\n", 2, "broker.handshake_timeout", "above 0"},
		{host, "[broker]\nsession_timeout = \"0s\"\n", 2, "broker.session_timeout", "above 0"},
		{host, "[broker]\nreachable_within = \"0s\"\n", 2, "broker.reachable_within", "above 0"},
		{host, "[broker]\nhandshake_timeout = 5\n", 2, "broker.handshake_timeout", `"5s"`},
		{host, "[limits]\npublish_rate = -1\n", 2, "limits.publish_rate", "at least 1"},
		{host, "[limits]\npublish_burst = 0\n", 2, "limits.publish_burst", "at least 1"},
		{host, "[limits]\npublish_bytes = 1000\n", 2, "limits.publish_bytes", `"64KiB"`},
		{host, "[limits]\nmax_sessions = 0\n", 2, "limits.max_sessions", "at least 1"},
		{host, "[limits]\nmax_handshakes = 0\n", 2, "limits.max_handshakes", "at least 1"},
		{host, "[limits]\nmax_vms = 0\n", 2, "limits.max_vms", "at least 1"},
		{host, "[limits]\nmax_subscriptions = 0\n", 2, "limits.max_subscriptions", "at least 1"},
		{host, "[limits]\nmax_vms = \"7\"\n", 2, "limits.max_vms", "a whole number"},
		{host, "[limits]\nmax_vms = 2026-11-23\n", 2, "limits.max_vms", "a whole number"},
		{guest, "[broker]\nlisten = []\n", 2, "broker.listen", `"address"`},
		{guest, "[broker]\naddress = \"\"\n", 2, "broker.address", `"127.0.0.1:7070"`},
		{guest, "[broker]\naddress = \":7070\"\n", 2, "broker.address", "name the host"},
		{guest, "[broker]\naddress = \"10.0.2.2:0\"\n", 2, "broker.address", "from 1 to"},
		{guest, "[bus]\nsubscribe = [\"BAD\"]\n", 2, "bus.subscribe", `"BAD" is no pattern`},
		{guest, "[bus]\nspool_size = \"127KiB\"\n", 2, "bus.spool_size", `"128KiB"`},
	}
	for _, tt := range tests {
		t.Run(strings.TrimSpace(tt.text), func(t *testing.T) {
			path := write(t, "# nothing\n", tt.text)
			err := tt.load(path)
			e, ok := errors.AsType[*Error](err)
			if !ok || e.File != path+".d/a.toml" || e.Line != tt.line || e.Key != tt.key || !strings.Contains(e.Reason, tt.want) {
				t.Errorf("got %v\nwant line %d, key %s and %q", err, tt.line, tt.key, tt.want)
			}
		})
	}
}

// Whoever has made two mistakes learns of both, from the top.
func TestEveryMistakeIsTold(t *testing.T) {
	path := write(t, "[store]\nsink = 1\nsync = 2\n[broker]\nlisten = 3\n", "nonsense = 4")
	_, err := LoadHost(path, lower)
	want := []string{
		path + `, line 2: store.sink: unknown key; in the place of "sink" there may be `,
		path + `, line 3: store.sync: is 2; it must be "always", "never" or a duration like "1s"`,
		path + `, line 5: broker.listen: is 3; it must be a list of strings like ["a", "b"]`,
		path + `.d/a.toml, line 1: nonsense: unknown key; in the place of "nonsense" there may be ["broker" "limits" "store"]`,
	}
	got := strings.Split(fmt.Sprint(err), "\n")
	if !slices.EqualFunc(got, want, strings.HasPrefix) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestValues(t *testing.T) {
	for text, want := range map[string]Size{
		"0": 0, "1": 1, "1023": 1023, "1KiB": 1 << 10, "1025": 1025, "64KiB": 64 << 10, "1025KiB": 1025 << 10,
		"64MiB": 64 << 20, "4GiB": 4 << 30, "3TiB": 3 << 40, "8388607TiB": 8388607 << 40,
	} {
		var s Size
		if err := s.UnmarshalTOML(text); err != nil || s != want || s.String() != text {
			t.Errorf("%q: %d (%v), %v; want %d", text, int64(s), s, err, want)
		}
	}
	if Size(1024<<10).String() != "1MiB" || Size(-1).String() != "-1" {
		t.Errorf("%v, %v", Size(1024<<10), Size(-1))
	}
	for sync, want := range map[Sync]time.Duration{SyncAlways: 0, SyncNever: -1, "1s": time.Second, "250ms": 250 * time.Millisecond, "broken": 0} {
		if got := sync.Every(); got != want {
			t.Errorf("%q: %v, want %v", sync, got, want)
		}
	}
	if d := Duration(time.Hour); d.Std() != time.Hour {
		t.Error(d.Std())
	}
}

func TestWarnings(t *testing.T) {
	tests := []struct {
		change func(*Host)
		want   []string
	}{
		{func(*Host) {}, nil},
		{func(h *Host) {
			h.Broker.Listen = []string{"localhost:1", "[::1]:1", "127.9.9.9:1"}
			h.Broker.VMsDir = ""
		}, nil},
		{func(h *Host) { h.Broker.Listen = []string{":1", "10.0.0.1:1"} }, []string{"broker.listen: :1 ", "broker.listen: 10.0.0.1:1 "}},
		{func(h *Host) { h.Broker.SessionTimeout = Duration(time.Second) }, []string{"broker.reachable_within"}},
		{func(h *Host) { h.Store.HostRetentionSize = 1 << 20 }, []string{"store.host_retention_size"}},
		{func(h *Host) { h.Broker.VMsDir, h.Store.StateDir, h.Store.LogDir = "a", "b", "c" }, []string{"broker.vms_dir: a ", "store.state_dir: b ", "store.log_dir: c "}},
	}
	for _, tt := range tests {
		h := DefaultHost()
		tt.change(&h)
		if got := h.Warnings(); !slices.EqualFunc(got, tt.want, strings.HasPrefix) {
			t.Errorf("got %q, want %q", got, tt.want)
		}
	}
}

// The shipped files name and explain every key, at its default.
func TestShippedFiles(t *testing.T) {
	key := regexp.MustCompile(`(?m)^#([a-z_]+ = )`)
	unexplained := regexp.MustCompile(`(?m)^(?:|[^#\n].*|#[a-z_]+ = .*)\n(#[a-z_]+) = `)
	for _, tt := range []struct {
		file      string
		got, want any
	}{
		{"castrad.toml", &Host{}, DefaultHost()},
		{"guestd.toml", &Guest{}, DefaultGuest()},
	} {
		text, err := os.ReadFile(filepath.Join("..", "..", "configs", tt.file))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range unexplained.FindAllSubmatch(text, -1) {
			t.Errorf("%s does not explain %s", tt.file, m[1])
		}
		from := make(origins)
		if err := decode(tt.file, string(text), tt.got, from); err != nil || len(from) > 0 {
			t.Errorf("%s as it is shipped sets %v, %v", tt.file, from, err)
		}
		if err := decode(tt.file, key.ReplaceAllString(string(text), "$1"), tt.got, from); err != nil {
			t.Fatal(err)
		}
		if got := reflect.ValueOf(tt.got).Elem().Interface(); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: got %+v\nwant %+v", tt.file, got, tt.want)
		}
		for _, k := range keys("", reflect.TypeOf(tt.want)) {
			if _, ok := from[k]; !ok {
				t.Errorf("%s does not name %s", tt.file, k)
			}
		}
	}
}

// The manual names every key, in its table, at its default, and no other.
func TestManual(t *testing.T) {
	line := regexp.MustCompile(`(?m)^\.(?:SH (\[[a-z]+\])|BR ([a-z_]+) " = (.*)")$`)
	roff := strings.NewReplacer(`\(dq`, `"`, `\-`, `-`)
	for _, tt := range []struct {
		page      string
		got, want any
	}{
		{"castrad.toml.5", &Host{}, DefaultHost()},
		{"castra-guestd.toml.5", &Guest{}, DefaultGuest()},
	} {
		text, err := os.ReadFile(filepath.Join("..", "..", "docs", "man", tt.page))
		if err != nil {
			t.Fatal(err)
		}
		var toml strings.Builder
		for _, m := range line.FindAllStringSubmatch(string(text), -1) {
			if m[1] != "" {
				fmt.Fprintln(&toml, m[1])
			} else {
				fmt.Fprintln(&toml, m[2], "=", roff.Replace(m[3]))
			}
		}
		from := make(origins)
		if err := decode(tt.page, toml.String(), tt.got, from); err != nil {
			t.Fatalf("what %s says is no configuration: %v\n%s", tt.page, err, &toml)
		}
		if got := reflect.ValueOf(tt.got).Elem().Interface(); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: got %+v\nwant %+v", tt.page, got, tt.want)
		}
		for _, k := range keys("", reflect.TypeOf(tt.want)) {
			if _, ok := from[k]; !ok {
				t.Errorf("docs/man/%s does not name %s; add it as the others are", tt.page, k)
			}
		}
	}
}

// keys lists the dotted names of a struct's keys.
func keys(prefix string, typ reflect.Type) []string {
	var all []string
	for f := range typ.Fields() {
		name := prefix + f.Tag.Get("toml")
		if f.Type.Kind() == reflect.Struct {
			all = append(all, keys(name+".", f.Type)...)
		} else {
			all = append(all, name)
		}
	}
	return all
}

func TestErrorText(t *testing.T) {
	for want, e := range map[string]Error{
		"/f, line 3: a.b: is bad": {"/f", 3, "a.b", "is bad"},
		"/f, line 3: is bad":      {"/f", 3, "", "is bad"},
		"/f: is bad":              {"/f", 0, "", "is bad"},
		"line 3: a.b: is bad":     {"", 3, "a.b", "is bad"},
		"is bad":                  {"", 0, "", "is bad"},
	} {
		if e.Error() != want {
			t.Errorf("%q, want %q", e.Error(), want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add("[broker]\nlisten = [\"a\"]\n[store]\nsync = \"1s\"\n")
	f.Add("a.b.c = {d = [[1], {e = 2}]}\n[[broker]]\n")
	f.Fuzz(func(t *testing.T, text string) {
		cfg := DefaultHost()
		err := Decode("f", text, &cfg)
		for _, line := range strings.Split(fmt.Sprint(err), "\n") {
			if err != nil && !strings.HasPrefix(line, "f") {
				t.Errorf("%q is told as %q", text, line)
			}
		}
	})
}
