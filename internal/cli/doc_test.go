package cli

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/castrabus/castra/internal/bus"
)

// docs/SCRIPTING.md names every key that --json prints.
func TestScriptingNamesEveryKey(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join("..", "..", "docs", "SCRIPTING.md"))
	if err != nil {
		t.Fatal(err)
	}
	for row, value := range map[string]any{
		"`broker`": bus.Broker{}, "`vms[]`": bus.VM{}, "`refused[]`": bus.Refused{}, "`ports[]`": port{}, "`args[]`": handover{},
	} {
		_, rest, ok := strings.Cut(string(doc), "\n| "+row+" | ")
		keys, _, _ := strings.Cut(rest, "\n")
		if !ok {
			t.Errorf("SCRIPTING.md has no row for %s", row)
			continue
		}
		typ := reflect.TypeOf(value)
		for i := range typ.NumField() {
			key, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
			if !strings.Contains(keys, "`"+key+"`") {
				t.Errorf("SCRIPTING.md does not name %s of %s", key, row)
			}
		}
	}
}
