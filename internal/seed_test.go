package internal

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	testFunc = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark)\w+)\(`)
	// seedTests is a list of tests and the package that they are in: `A`, `B` (`wire`).
	seedTests = regexp.MustCompile("((?:`(?:Test|Fuzz|Benchmark)\\w+`(?:, )?)+) \\(`(\\w+)`\\)")
	seedTest  = regexp.MustCompile("`((?:Test|Fuzz|Benchmark)\\w+)`")
)

// TestSeedNamesTests holds docs/SEED.md to the tree: each test that it names is there,
// in the package that it says, and each promise names one.
func TestSeedNamesTests(t *testing.T) {
	const root = ".."
	doc, err := os.ReadFile(filepath.Join(root, "docs", "SEED.md"))
	if err != nil {
		t.Fatal(err)
	}
	there := make(map[string]map[string]bool) // by package
	in := func(pkg string) map[string]bool {
		if there[pkg] == nil {
			there[pkg] = make(map[string]bool)
			dir := filepath.Join(root, "internal", pkg)
			if pkg == "e2e" {
				dir = filepath.Join(root, pkg)
			}
			files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
			if err != nil {
				t.Fatal(err)
			}
			for _, file := range files {
				text, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				for _, m := range testFunc.FindAllSubmatch(text, -1) {
					there[pkg][string(m[1])] = true
				}
			}
		}
		return there[pkg]
	}
	promises := 0
	for line := range strings.Lines(string(doc)) {
		if !strings.HasPrefix(line, "| ") || strings.HasPrefix(line, "| promise") {
			continue
		}
		promises++
		named, found := len(seedTest.FindAllString(line, -1)), 0
		for _, list := range seedTests.FindAllStringSubmatch(line, -1) {
			for _, m := range seedTest.FindAllStringSubmatch(list[1], -1) {
				found++
				if !in(list[2])[m[1]] {
					t.Errorf("there is no test %s in %s", m[1], list[2])
				}
			}
		}
		if named == 0 || found != named {
			t.Errorf("%d of %d tests are named with their package: %s", found, named, line)
		}
	}
	if promises == 0 {
		t.Error("docs/SEED.md holds no promise")
	}
}
