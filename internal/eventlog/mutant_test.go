package eventlog

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
)

// syncCalls gives every call of Sync and SyncDir in the package as file:line,
// and the function that it is in; instead of those in stream.syncDir, Log.sync
// and committer.syncSegment, the calls of these. What fs.go has to do with the machine's file
// system is beneath the simulated disk.
func syncCalls(t *testing.T) map[string]string {
	t.Helper()
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	fset := token.NewFileSet()
	calls := map[string]string{}
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(fset, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range file.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if !ok || strings.HasPrefix(receiver(fn), "os") || fn.Name.Name == "syncDir" || receiver(fn) == "Log" && fn.Name.Name == "sync" || fn.Name.Name == "syncSegment" {
				continue
			}
			ast.Inspect(fn, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				if sel, ok := call.Fun.(*ast.SelectorExpr); ok && (strings.EqualFold(sel.Sel.Name, "syncDir") || sel.Sel.Name == "syncSegment" || strings.EqualFold(sel.Sel.Name, "sync") && len(call.Args) == 0) {
					at := fset.Position(sel.Sel.Pos())
					calls[fmt.Sprintf("%s:%d", at.Filename, at.Line)] = strings.TrimPrefix(receiver(fn)+"."+fn.Name.Name, ".") + ": " + sel.Sel.Name
				}
				return true
			})
		}
	}
	return calls
}

func receiver(fn *ast.FuncDecl) string {
	if fn.Recv == nil {
		return ""
	}
	typ := fn.Recv.List[0].Type
	if star, ok := typ.(*ast.StarExpr); ok {
		typ = star.X
	}
	return typ.(*ast.Ident).Name
}

// Without any one of the calls that sync, a promise is broken: there is none too
// many, and TestCrash would see it if one went missing.
func TestCrashWithoutASync(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	calls := syncCalls(t)
	if len(calls) < 10 {
		t.Fatalf("only %d calls were found", len(calls))
	}
	for _, site := range slices.Sorted(maps.Keys(calls)) {
		t.Run(calls[site], func(t *testing.T) {
			every := uint64(1)
			if strings.HasPrefix(site, "fault.go") || strings.Contains(calls[site], "void") || strings.Contains(calls[site], "restore") { // the disk must fail for it to matter
				every = crashKinds
			}
			seed, broken, total := crashSeeds(crashFaulty, every, 50000, func(c *crashLife) { c.disk.ignored = site })
			if broken == "" {
				t.Fatalf("%s: %d crashes without it broke no promise", site, total)
			}
			t.Logf("%s: after %d crashes, seed %d: %s", site, total, seed, broken)
		})
	}
}
