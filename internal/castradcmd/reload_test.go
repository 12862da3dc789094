package castradcmd

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A change that only a restart brings is told of at each reload until it is taken back,
// and not when it is.
func TestReloadTellsWhatWaitsForARestart(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "castrad.toml")
	write := func(segment string) {
		text := `[store]
state_dir = "` + filepath.Join(dir, "state") + `"
log_dir = "` + filepath.Join(dir, "log") + `"
segment_size = "` + segment + `"
[broker]
vms_dir = ""
`
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("1MiB")
	d, hook := opened(t, path)
	for _, step := range []struct {
		segment string
		waits   bool
	}{{"1MiB", false}, {"2MiB", true}, {"2MiB", true}, {"1MiB", false}} {
		write(step.segment)
		hook.Reset()
		d.reload()
		said := false
		for _, e := range hook.AllEntries() {
			said = said || strings.Contains(e.Message, "take effect at the next start")
		}
		if said != step.waits {
			t.Errorf("with segments of %s, after a start with 1MiB: told so is %v, want %v", step.segment, said, step.waits)
		}
	}
}
