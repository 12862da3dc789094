package config

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// FuzzHost reads whatever text as castrad's configuration: it is refused with
// errors that fit a line each, or gives values within their bounds.
func FuzzHost(f *testing.F) {
	for _, text := range []string{
		"[limits]\nmax_sessions = 1\npublish_bytes = \"64KiB\"\n", "[store]\nsegment_size = \"9223372036854775807\"\nsync = \"1s\"\n",
		"[broker]\nlisten = [\"[::1]:7070\"]\nhandshake_timeout = \"5s\"\n", "[broker]\nListen = []\n", "a.b.c = 1", "[[broker]]\n", "x = 1979-05-27T07:32:00Z",
		"[store]\nsegment_size = -1\n", "[limits]\npublish_rate = 1e400\n", "\x00", "[broker]\nguest_topics = [\"a.>\", 7]\n",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		cfg := DefaultHost()
		err := Decode("castrad.toml", text, &cfg)
		if err != nil {
			checkErrors(t, err)
			return
		}
		c := checker{path: "castrad.toml", from: make(origins)}
		cfg.Broker.check(&c, func(string) error { return nil })
		cfg.Store.check(&c)
		cfg.Limits.check(&c)
		if err := join(c.errs); err != nil {
			checkErrors(t, err)
			return
		}
		cfg.Warnings()
		if cfg.Limits.MaxSessions < 1 || cfg.Limits.PublishBytes < leastSize || cfg.Store.SegmentSize < leastSize || cfg.Broker.HandshakeTimeout <= 0 || cfg.Store.RetentionAge < 0 {
			t.Errorf("%q gives %+v", text, cfg)
		}
	})
}

func checkErrors(t *testing.T, err error) {
	t.Helper()
	errs := []error{err}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		errs = joined.Unwrap()
	}
	for _, e := range errs {
		if _, ok := errors.AsType[*Error](e); !ok {
			t.Errorf("%T: %v", e, e)
		}
	}
}

// FuzzSize reads sizes and durations: what is taken is written so that it reads back
// as the same.
func FuzzSize(f *testing.F) {
	for _, text := range []string{"0", "64KiB", "9223372036854775807", "8388608TiB", "8388607TiB", "-1", "1 KiB", "1kib", "0x10", "1_000", "٣KiB", "5s", "720h", "-5s", "1e3s"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var s, again Size
		if s.UnmarshalTOML(text) == nil {
			if s < 0 {
				t.Errorf("%q is %d", text, s)
			}
			if err := again.UnmarshalTOML(s.String()); err != nil || again != s {
				t.Errorf("%q is written as %q, which is %d, %v", text, s, again, err)
			}
		}
		var d Duration
		if d.UnmarshalTOML(text) == nil && d < 0 {
			t.Errorf("%q is %v", text, d.Std())
		}
		var sync Sync
		if sync.UnmarshalTOML(text) == nil && sync.Every() < 0 && sync != SyncNever || sync.Every() > 0 && sync.Every() < time.Nanosecond || strings.Contains(string(sync), "\n") {
			t.Errorf("%q is %v", text, sync.Every())
		}
	})
}

// FuzzGuest reads whatever text as castra-guestd's configuration.
func FuzzGuest(f *testing.F) {
	for _, text := range []string{
		"[broker]\naddress = \"10.0.2.2:7070\"\n[bus]\nsubscribe = [\"a.>\"]\n", "[broker]\naddress = \":7070\"\n", "[broker]\naddress = \"h:99999\"\n",
		"[bus]\nspool_size = \"1KiB\"\n", "[bus]\nspool_size = -1\n", "[identity]\nvm = 7\n", "[identity]\nVM = \"a\"\n", "[bus]\nsubscribe = [1]\n", "\x00",
	} {
		f.Add(text)
	}
	path := filepath.Join(f.TempDir(), "guestd.toml")
	f.Fuzz(func(t *testing.T, text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		cfg, err := LoadGuest(path, func(string) error { return nil })
		if err != nil {
			checkErrors(t, err)
			return
		}
		if host, _, err := net.SplitHostPort(cfg.Broker.Address); err != nil || host == "" || cfg.Bus.SpoolSize < leastSpool {
			t.Errorf("%q gives %+v", text, cfg)
		}
	})
}
