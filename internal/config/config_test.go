package config

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"
)

func anyTopic(string) error { return nil }

// write makes a configuration file with drop-ins and gives its path.
func write(t *testing.T, main string, dropins ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c.toml")
	if err := os.WriteFile(path, []byte(main), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path+".d", 0o700); err != nil {
		t.Fatal(err)
	}
	for i, d := range dropins {
		if err := os.WriteFile(filepath.Join(path+".d", string(rune('a'+i))+".toml"), []byte(d), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

func TestDropInsOverrideKeyByKey(t *testing.T) {
	cfg, err := LoadHost(write(t, `
[broker]
listen = ["127.0.0.1:1", "127.0.0.1:2"]
unknown_vms = "accept"
[store]
segment_size = 65536
`, "[broker]\nlisten = [\"127.0.0.1:3\"]\n", "[store]\nsync = \"1s\"\nretention_age = \"1h\"\n"), anyTopic)
	if err != nil {
		t.Fatal(err)
	}
	want := DefaultHost()
	want.Broker.Listen, want.Broker.UnknownVMs = []string{"127.0.0.1:3"}, "accept"
	want.Store.SegmentSize, want.Store.Sync, want.Store.RetentionAge = 64<<10, "1s", Duration(time.Hour)
	if !reflect.DeepEqual(cfg, want) {
		t.Errorf("got %+v\nwant %+v", cfg, want)
	}
	if cfg.Store.Sync.Every() != time.Second || SyncAlways.Every() != 0 || SyncNever.Every() >= 0 {
		t.Error("sync modes")
	}
}

func TestPublishBytesFollowsTheRate(t *testing.T) {
	for text, want := range map[string]Size{
		"":                                  4 << 20,
		"[limits]\npublish_rate = 10\n":     4 << 20,
		"[limits]\npublish_rate = 100000\n": 100000 << 12,
		"[limits]\npublish_rate = 100000\npublish_bytes = \"64KiB\"\n": 64 << 10,
	} {
		cfg, err := LoadHost(write(t, text), anyTopic)
		if err != nil || cfg.Limits.PublishBytes != want {
			t.Errorf("%q: %d, %v; want %d", text, cfg.Limits.PublishBytes, err, want)
		}
	}
}

func TestMistakesAreNamed(t *testing.T) {
	for text, want := range map[string]string{
		"\n[broker]\nlissten = []\n":              "line 3: unknown key broker.lissten",
		"[nonsense]\nx = 1\n":                     "unknown key nonsense",
		"[store]\n\nsegment_size = \"64 pounds\"": "line 3",
		"[store]\nsegment_size = 100\n":           "store.segment_size is too small",
		"[store]\nsync = \"often\"\n":             "line 2",
		"[broker]\nunknown_vms = \"maybe\"\n":     "broker.unknown_vms",
		"[broker]\nlisten = [\"7070\"]\n":         "broker.listen",
		"[broker]\nhandshake_timeout = \"0s\"\n":  "broker.handshake_timeout",
		"[broker]\nhandshake_timeout = 5\n":       "line 2",
		"[limits]\npublish_rate = -1\n":           "limits.publish_rate",
		"[broker\n":                               "end table name",
	} {
		if _, err := LoadHost(write(t, text), anyTopic); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want it to say %q", text, err, want)
		}
	}
	if _, err := LoadHost(filepath.Join(t.TempDir(), "none.toml"), anyTopic); err == nil {
		t.Error("a missing file that was asked for is no error")
	}
}

// The shipped files name every key, at its default.
func TestShippedFiles(t *testing.T) {
	uncomment := regexp.MustCompile(`(?m)^#([a-z_]+ *=)`)
	for _, c := range []struct {
		file      string
		got, want any
	}{
		{"castrad.toml", &Host{}, DefaultHost()},
		{"guestd.toml", &Guest{}, DefaultGuest()},
	} {
		data, err := os.ReadFile(filepath.Join("..", "..", "configs", c.file))
		if err != nil {
			t.Fatal(err)
		}
		set := map[string]bool{}
		if err := decode(c.file, uncomment.ReplaceAllString(string(data), "$1"), c.got, set); err != nil {
			t.Fatal(err)
		}
		if got := reflect.ValueOf(c.got).Elem().Interface(); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: got %+v\nwant %+v", c.file, got, c.want)
		}
		for _, key := range keys("", reflect.TypeOf(c.want)) {
			if !set[key] {
				t.Errorf("%s does not name %s", c.file, key)
			}
		}
	}
}

// keys lists the dotted names of a struct's keys.
func keys(prefix string, typ reflect.Type) []string {
	var all []string
	for i := range typ.NumField() {
		f := typ.Field(i)
		name := prefix + f.Tag.Get("toml")
		if f.Type.Kind() == reflect.Struct {
			all = append(all, keys(name+".", f.Type)...)
		} else {
			all = append(all, name)
		}
	}
	return all
}
