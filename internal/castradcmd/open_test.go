package castradcmd

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sirupsen/logrus/hooks/test"
)

// opened is a daemon with the configuration at path that has opened what is on disk, until
// the test ends, and what it logs.
func opened(t *testing.T, path string) (*daemon, *test.Hook) {
	t.Helper()
	cfg, err := load(path)
	if err != nil {
		t.Fatal(err)
	}
	log, hook := test.NewNullLogger()
	d := &daemon{path: path, cfg: cfg, log: log}
	unlock, err := d.open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(unlock)
	t.Cleanup(func() { _ = d.broker.Close() })
	return d, hook
}

// State and log may be in one directory, and it still belongs to one castrad.
func TestOneDirectory(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "castrad.toml")
	text := "[store]\nstate_dir = \"" + dir + "/all\"\nlog_dir = \"" + dir + "/all/\"\n[broker]\nvms_dir = \"\"\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	d, _ := opened(t, path)
	if _, err := (&daemon{path: path, cfg: d.cfg, log: d.log}).open(); err == nil || !strings.Contains(err.Error(), "in use by another castrad") {
		t.Errorf("a second one: %v", err)
	}
}
