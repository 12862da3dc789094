package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// edited are what somebody may make of a file that castrad keeps.
var edited = map[string]func(path string) error{
	"garbage": func(path string) error { return os.WriteFile(path, []byte("\x00\xff{]garbage\n\x1b[31m"), 0o600) },
	"empty":   func(path string) error { return os.WriteFile(path, nil, 0o600) },
	"huge":    func(path string) error { return os.WriteFile(path, bytes.Repeat([]byte("[1,"), 1<<20), 0o600) },
	"deep":    func(path string) error { return os.WriteFile(path, bytes.Repeat([]byte("["), 60_000), 0o600) },
	"negative": func(path string) error {
		return os.WriteFile(path, []byte(`{"c":{"topic":"t","next":-1},"seq":-5,"vm":-1}`), 0o600)
	},
	"far": func(path string) error {
		return os.WriteFile(path, []byte(`{"c":{"topic":"t","next":18446744073709551615},"seq":18446744073709551615}`), 0o600)
	},
	"directory": func(path string) error { return os.Mkdir(path, 0o700) },
	"dangling":  func(path string) error { return os.Symlink("/nowhere/at/all", path) },
	"link": func(path string) error {
		lab, _, _ := strings.Cut(path, "/state/")
		return os.Symlink(lab+"/precious", path)
	},
	"pipe": func(path string) error { return syscall.Mkfifo(path, 0o600) },
}

// TestEdited puts each of them in the place of each file under state_dir. castrad
// starts, says which file it cannot use, serves guests, and keeps what was there.
func TestEdited(t *testing.T) {
	for name, edit := range edited {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := &siege{lab: newLab(t), keys: make(map[string][]byte)}
			s.loadedConfig("")
			first := s.startCastrad("castrad")
			s.answers()
			s.castractl("vm", "add", "g", "--no-key")
			s.castractl("vm", "add", "other", "--no-key")
			use := func(cursor string) (string, error) {
				g, _, err := s.join("g", nil)
				if err != nil {
					return "", err
				}
				defer g.Close()
				_ = g.frame(`{"type":"publish","topic":"t","id":"i","payload":1}`)
				ack, err := g.receive()
				if err != nil || !strings.Contains(ack, `"status":"ok"`) {
					return "", fmt.Errorf("a publish is answered %s, %w", ack, err)
				}
				_ = g.frame(`{"type":"subscribe","topic":"t"` + cursor + `}`)
				return g.receive()
			}
			if f, err := use(`,"cursor":"c"`); err != nil || !strings.Contains(f, `"status":"ok"`) {
				t.Fatalf("a subscription is answered %s, %v", f, err)
			}
			s.stop("castrad", first)

			s.write("precious", "not castrad's\n")
			files := []string{
				"reachable.json", "vm-streams.json", "cursors/g.json", "ids/g.ids", "vms/other.json",
				"handshakes/g.json", "handshakes/handshake-events.jsonl", "handshakes/bus-events.jsonl",
			}
			for _, file := range files {
				path := s.path("state/" + file)
				if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
					t.Fatal(err)
				}
				if err := edit(path); err != nil {
					t.Fatal(err)
				}
			}
			s.startCastrad("castrad2")
			s.answers()
			if f, err := use(""); err != nil || !strings.Contains(f, `"status":"ok"`) {
				t.Errorf("a subscription is answered %s, %v", f, err)
			}
			if f, err := use(`,"cursor":"c"`); err != nil || !strings.Contains(f, `"ack":"subscribe"`) {
				t.Errorf("a subscription with a cursor is answered %s, %v", f, err)
			}
			if data, err := os.ReadFile(s.path("precious")); string(data) != "not castrad's\n" {
				t.Errorf("a file that a link leads to holds %q, %v", data, err)
			}
			log, err := os.ReadFile(s.path("castrad2.log"))
			if err != nil {
				t.Fatal(err)
			}
			if bytes.ContainsAny(log, "\x1b\x00") {
				t.Errorf("the log holds control characters: %q", log)
			}
			// What could be meant cannot be told from what is not: nothing of it is lost.
			for _, file := range []string{"cursors/g.json", "vms/other.json"} {
				if kept, _ := filepath.Glob(s.path("state/" + file + "*")); len(kept) == 0 {
					t.Errorf("%s is gone", file)
				}
				if name != "far" && name != "empty" && !bytes.Contains(log, []byte(filepath.Base(file))) {
					t.Errorf("the log does not name %s", file)
				}
			}
		})
	}
}
