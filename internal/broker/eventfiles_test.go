package broker

import (
	"os"
	"path/filepath"
	"testing"
)

// Somebody removes the file to make room, or its directory, has logrotate rename it, or
// empties it: what comes next is found under the file's name, and nothing else is there.
func TestEventFileThatGoesAway(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "handshakes")
	r := &rotated{path: filepath.Join(dir, "events.jsonl")}
	defer r.close()
	for name, away := range map[string]func() error{
		"nothing is done":          func() error { return nil },
		"the file is removed":      func() error { return os.Remove(r.path) },
		"the file is renamed":      func() error { return os.Rename(r.path, r.path+".old") },
		"the file is emptied":      func() error { return os.Truncate(r.path, 0) },
		"the directory is removed": func() error { return os.RemoveAll(dir) },
	} {
		t.Run(name, func(t *testing.T) {
			if err := r.write([]byte("before\n")); err != nil {
				t.Fatal(err)
			}
			before, err := os.ReadFile(r.path)
			if err != nil {
				t.Fatal(err)
			}
			if err := away(); err != nil {
				t.Fatal(err)
			}
			if err := r.write([]byte("after\n")); err != nil {
				t.Fatal(err)
			}
			want := "after\n"
			if name == "nothing is done" {
				want = string(before) + want
			}
			if got, err := os.ReadFile(r.path); err != nil || string(got) != want {
				t.Errorf("the file has %q, %v, want %q", got, err, want)
			}
			if r.size != int64(len(want)) {
				t.Errorf("it is taken for %d bytes long, and has %d", r.size, len(want))
			}
		})
	}
}
