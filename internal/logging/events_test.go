package logging

import (
	"bufio"
	"bytes"
	"go/ast"
	"go/parser"
	"go/printer"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// declared gives the events of events.go, id by name.
func declared(t *testing.T) map[string]string {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), "events.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ids := map[string]string{}
	ast.Inspect(f, func(n ast.Node) bool {
		if spec, ok := n.(*ast.ValueSpec); ok {
			id, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			ids[spec.Names[0].Name] = id
		}
		return true
	})
	if len(ids) == 0 {
		t.Fatal("events.go declares no event")
	}
	return ids
}

// TestCatalog holds events.go and the catalog together: an entry for each event, saying
// what it means, and none for what is no event.
func TestCatalog(t *testing.T) {
	file, err := os.Open("../../packaging/catalog/castra.catalog")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	type entry struct {
		subject, text string
		body          bool // an empty line ends the headers
	}
	entries := map[string]*entry{}
	var at *entry
	for lines := bufio.NewScanner(file); lines.Scan(); {
		line := lines.Text()
		switch id, begins := strings.CutPrefix(line, "-- "); {
		case begins && entries[id] != nil:
			t.Errorf("%s is in the catalog twice", id)
		case begins:
			at = &entry{}
			entries[id] = at
		case at == nil:
		case strings.HasPrefix(line, "Subject: "):
			at.subject = line
		case line == "":
			at.body = true
		case at.body:
			at.text += line
		}
	}
	names := map[string]string{}
	for name, id := range declared(t) {
		if !regexp.MustCompile(`^[0-9a-f]{32}$`).MatchString(id) {
			t.Errorf("%s: %q is no 128-bit id", name, id)
		}
		if names[id] != "" {
			t.Errorf("%s and %s have one id", name, names[id])
		}
		names[id] = name
		if e := entries[id]; e == nil || e.subject == "" || e.text == "" {
			t.Errorf("packaging/catalog/castra.catalog does not say what %s (%s) means and what to do", name, id)
		}
	}
	for id := range entries {
		if names[id] == "" {
			t.Errorf("the catalog has %s, which is no event of events.go", id)
		}
	}
}

// TestEveryEntryIsAnEvent finds what is logged at the default level without a
// MESSAGE_ID, and events that nothing logs.
func TestEveryEntryIsAnEvent(t *testing.T) {
	used := map[string]bool{}
	logger := regexp.MustCompile(`\b([lL]og|logger)\b`)
	event := regexp.MustCompile(`\.On\(`)
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(f, func(n ast.Node) bool {
			if sel, ok := n.(*ast.SelectorExpr); ok {
				if pkg, ok := sel.X.(*ast.Ident); ok && pkg.Name == "logging" {
					used[sel.Sel.Name] = true
				}
			}
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			sel, ok := call.Fun.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			var receiver bytes.Buffer
			if err := printer.Fprint(&receiver, fset, sel.X); err != nil {
				t.Error(err)
			}
			switch sel.Sel.Name {
			case "Info", "Infof", "Warn", "Warnf", "Error", "Errorf":
				if logger.Match(receiver.Bytes()) && !event.Match(receiver.Bytes()) {
					t.Errorf("%s: an entry without an event: begin it with logging.Some.On(log), and put what is new into events.go and the catalog", fset.Position(call.Pos()))
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for name := range declared(t) {
		if !used[name] {
			t.Errorf("nothing logs %s", name)
		}
	}
}
