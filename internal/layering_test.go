// Package internal holds nothing but tests of the tree as a whole: how the packages
// below may depend on each other, and that docs/SEED.md names tests that there are.
package internal

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"
)

const module = "github.com/castrabus/castra"

// The modules beyond the standard library that some package may use.
const (
	cobra     = "github.com/spf13/cobra"
	godbus    = "github.com/godbus/dbus/v5"
	goSystemd = "github.com/coreos/go-systemd/v22"
	logrus    = "github.com/sirupsen/logrus"
	pflag     = "github.com/spf13/pflag" // cobra's flags
	toml      = "github.com/BurntSushi/toml"
	xsys      = "golang.org/x/sys"
)

// A rule says what one package of internal/ may import: packages of lower layers,
// except those in never, and bus; of other modules, those in uses.
type rule struct {
	layer int
	uses  []string
	never []string
}

// rules is the whole of internal/. A new package is put here, on the lowest layer
// that serves it, before anything else may import it.
var rules = map[string]rule{
	"backoff":   {layer: 0},
	"bubble":    {layer: 0}, // for tests
	"bus":       {layer: 0},
	"config":    {layer: 0, uses: []string{toml}},
	"eventlog":  {layer: 0, uses: []string{xsys}},
	"flags":     {layer: 0},
	"handover":  {layer: 0, uses: []string{xsys}},
	"logging":   {layer: 0, uses: []string{logrus, goSystemd}},
	"reserve":   {layer: 0}, // for tests
	"sdnotify":  {layer: 0, uses: []string{goSystemd, xsys}},
	"statefile": {layer: 0, uses: []string{xsys}},
	"token":     {layer: 0},
	"wire":      {layer: 0},

	// Below layer 2 nothing logs: errors and hooks tell those above.
	"identity": {layer: 1},
	"presence": {layer: 1},
	"session":  {layer: 1},

	"broker": {layer: 2, uses: []string{logrus}},
	"guest":  {layer: 2, uses: []string{logrus}},

	// The service must fit host and guest alike, so it may know neither.
	"dbusapi":    {layer: 3, uses: []string{logrus, godbus, xsys}, never: []string{"broker", "guest"}},
	"dbusclient": {layer: 3, uses: []string{godbus, xsys}, never: []string{"broker", "guest"}},

	"castradcmd": {layer: 4, uses: []string{logrus, xsys}, never: []string{"guest", "dbusclient"}},
	"guestdcmd":  {layer: 4, uses: []string{logrus}, never: []string{"broker", "dbusclient"}},
	// castractl learns everything over D-Bus.
	"cli": {layer: 4, uses: []string{cobra, pflag, xsys}, never: []string{"broker", "guest", "session", "presence", "identity", "dbusapi"}},
}

// mains are the commands, each with the one package it may import.
var mains = map[string]string{"castrad": "castradcmd", "castra-guestd": "guestdcmd", "castractl": "cli"}

func TestLayering(t *testing.T) {
	bad, err := violations(os.DirFS(".."))
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range bad {
		t.Error(v)
	}
	// A rule for a package that has gone would pass for one that is kept.
	for name := range rules {
		if _, err := os.Stat(name); err != nil {
			t.Errorf("the table of layers is out of date: %v", err)
		}
	}
}

// TestViolations shows that each rule can be broken, and that what is allowed is not
// reported.
func TestViolations(t *testing.T) {
	tests := []struct {
		name, file, imports string
		want                string // part of the one violation; empty: none
	}{
		{"standard library", "internal/wire/a.go", "encoding/json", ""},
		{"bus from layer 0", "internal/wire/a.go", module + "/internal/bus", ""},
		{"downward", "internal/broker/a.go", module + "/internal/eventlog", ""},
		{"test file", "internal/wire/a_test.go", module + "/internal/broker", ""},
		{"allowed module", "internal/config/a.go", toml, ""},
		{"package of an allowed module", "internal/logging/a.go", goSystemd + "/journal", ""},
		{"main", "castrad/main.go", module + "/internal/castradcmd", ""},
		{"other module's tree", "tools/a.go", "example.org/linter", ""},
		{"upward", "internal/session/a.go", module + "/internal/broker", "layer 1"},
		{"sideways", "internal/broker/a.go", module + "/internal/guest", "layer 2"},
		{"sideways in layer 0", "internal/eventlog/a.go", module + "/internal/wire", "layer 0"},
		{"nested upward", "internal/wire/sub/a.go", module + "/internal/session", "layer 0"},
		{"forbidden though lower", "internal/cli/a.go", module + "/internal/broker", "never"},
		{"dependency of a pure package", "internal/wire/a.go", logrus, "other modules"},
		{"name that begins like an allowed one", "internal/config/a.go", toml + "x", "other modules"},
		{"main that does more", "castrad/main.go", module + "/internal/broker", "castradcmd"},
		{"main with a dependency", "castrad/main.go", cobra, "castradcmd"},
		{"unknown package", "internal/queue/a.go", "fmt", "not in the table"},
		{"junk drawer", "internal/wire/util/a.go", "fmt", "says nothing"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			src := fmt.Sprintf("package p\n\nimport _ %q\n", tt.imports)
			bad, err := violations(fstest.MapFS{tt.file: {Data: []byte(src)}})
			if err != nil {
				t.Fatal(err)
			}
			switch {
			case tt.want == "" && len(bad) > 0:
				t.Errorf("reported %q, want nothing", bad)
			case tt.want != "" && (len(bad) != 1 || !strings.Contains(bad[0], tt.want)):
				t.Errorf("reported %q, want one with %q in it", bad, tt.want)
			}
		})
	}
}

// violations checks every Go file of the module at the root of fsys, tests aside: they
// may look at their package from above.
func violations(fsys fs.FS) ([]string, error) {
	var bad []string
	err := fs.WalkDir(fsys, ".", func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if file != "." && (strings.HasPrefix(d.Name(), ".") || file == "tools") {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go") {
			return nil
		}
		imports, err := importsOf(fsys, file)
		if err != nil {
			return err
		}
		bad = append(bad, check(path.Dir(file), imports)...)
		return nil
	})
	// Several files of a package break a rule together.
	slices.Sort(bad)
	return slices.Compact(bad), err
}

func importsOf(fsys fs.FS, file string) ([]string, error) {
	src, err := fs.ReadFile(fsys, file)
	if err != nil {
		return nil, err
	}
	f, err := parser.ParseFile(token.NewFileSet(), file, src, parser.ImportsOnly)
	if err != nil {
		return nil, err
	}
	set := map[string]bool{}
	for _, spec := range f.Imports {
		p, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		set[p] = true
	}
	return slices.Sorted(maps.Keys(set)), nil
}

// check judges the imports of one directory's package.
func check(dir string, imports []string) []string {
	if slices.Contains([]string{"util", "utils", "common", "helper", "helpers", "misc"}, path.Base(dir)) {
		return []string{dir + ": a name that says nothing; name the package for what it provides"}
	}
	if only, ok := mains[dir]; ok {
		return checkMain(dir, only, imports)
	}
	own, ok := strings.CutPrefix(dir, "internal/")
	if !ok {
		return nil
	}
	own, _, _ = strings.Cut(own, "/")
	from, ok := rules[own]
	if !ok {
		return []string{dir + ": not in the table of layers; put it on the lowest that serves it"}
	}
	var bad []string
	for _, imp := range imports {
		to, ours := strings.CutPrefix(imp, module+"/internal/")
		to, _, _ = strings.Cut(to, "/")
		switch {
		case ours && to == own: // a package nested in its own
		case ours && slices.Contains(from.never, to):
			bad = append(bad, fmt.Sprintf("%s imports %s, which it never may", dir, to))
		case ours && to != "bus" && rules[to].layer >= from.layer:
			bad = append(bad, fmt.Sprintf("%s (layer %d) imports %s (layer %d)", dir, from.layer, to, rules[to].layer))
		case !ours && !standard(imp) && !slices.ContainsFunc(from.uses, func(m string) bool { return within(imp, m) }):
			bad = append(bad, fmt.Sprintf("%s imports %s: other modules than %v are not for it", dir, imp, from.uses))
		}
	}
	return bad
}

func checkMain(dir, only string, imports []string) []string {
	var bad []string
	for _, imp := range imports {
		if !standard(imp) && imp != module+"/internal/"+only {
			bad = append(bad, fmt.Sprintf("%s imports %s: a main calls %s and does nothing else", dir, imp, only))
		}
	}
	return bad
}

// standard reports whether an import is of the standard library, whose paths, unlike
// modules', begin with a word that is no domain.
func standard(imp string) bool {
	first, _, _ := strings.Cut(imp, "/")
	return !strings.Contains(first, ".")
}

func within(imp, module string) bool {
	return imp == module || strings.HasPrefix(imp, module+"/")
}
