package castradcmd

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sirupsen/logrus/hooks/test"
)

// State and log may be in one directory, and it still belongs to one castrad.
func TestOneDirectory(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "castrad.toml")
	text := "[store]\nstate_dir = \"" + dir + "/all\"\nlog_dir = \"" + dir + "/all/\"\n[broker]\nvms_dir = \"\"\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := load(path)
	if err != nil {
		t.Fatal(err)
	}
	log, _ := test.NewNullLogger()
	d := &daemon{path: path, cfg: cfg, log: log}
	unlock, err := d.open()
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	defer d.broker.Close()
	if _, err := (&daemon{path: path, cfg: cfg, log: log}).open(); err == nil || !strings.Contains(err.Error(), "in use by another castrad") {
		t.Errorf("a second one: %v", err)
	}
}
