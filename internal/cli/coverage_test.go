package cli

import (
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/rogpeppe/go-internal/txtar"
	"github.com/spf13/cobra"
)

// commandEnd ends one command in a line of a shell's or a script's.
var commandEnd = regexp.MustCompile(`[|;&>]`)

// scriptedLines gives each command line of castractl in the scripts, as words.
func scriptedLines(t *testing.T) [][]string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("testdata", "script", "*.txtar"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	var lines [][]string
	for _, file := range files {
		archive, err := txtar.ParseFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(archive.Comment)) {
			if strings.HasPrefix(line, "#") || strings.HasPrefix(line, "stderr") || strings.HasPrefix(line, "stdout") {
				continue
			}
			for _, command := range strings.Split(line, "castractl ")[1:] {
				command = commandEnd.Split(command, 2)[0]
				lines = append(lines, strings.Fields(strings.ReplaceAll(command, "'", " ")))
			}
		}
	}
	return lines
}

// TestScriptsUseEverything walks the commands and fails for each command and each flag
// that no script uses.
func TestScriptsUseEverything(t *testing.T) {
	root := newRootCmd(&Factory{Version: "0.1.0"})
	root.InitDefaultHelpCmd()
	used := make(map[string]bool) // "castractl bus tail", "castractl bus tail --from"
	for _, words := range scriptedLines(t) {
		if len(words) > 0 && strings.HasPrefix(words[0], cobra.ShellCompRequestCmd) {
			continue // a completion uses no flag
		}
		cmd, _, err := root.Find(words)
		if err != nil {
			continue // an unknown command, on purpose
		}
		used[cmd.CommandPath()] = true
		for _, word := range words {
			word, _, _ = strings.Cut(word, "=")
			for _, flag := range append(flagsOf(cmd), flagsOf(root)...) {
				if word == "--"+flag.name || flag.short != "" && word == "-"+flag.short {
					used[cmd.CommandPath()+" --"+flag.name] = true
					used["any --"+flag.name] = true
				}
			}
		}
	}
	walkCommands(root, func(cmd *cobra.Command) {
		path := cmd.CommandPath()
		if !used[path] {
			t.Errorf("no script runs: %s", path)
		}
		for _, flag := range flagsOf(cmd) {
			// The root's own are every command's.
			if flag.name != "help" && !used[path+" --"+flag.name] && (cmd != root || !used["any --"+flag.name]) {
				t.Errorf("no script uses: %s --%s", path, flag.name)
			}
		}
	})
}

// TestHelpSaysAll: the manual page is made of what the commands say of themselves.
func TestHelpSaysAll(t *testing.T) {
	root := newRootCmd(&Factory{Version: "0.1.0"})
	walkCommands(root, func(cmd *cobra.Command) {
		if cmd.Name() == "help" {
			return
		}
		path := cmd.CommandPath()
		if cmd.Short == "" || cmd.Long == "" {
			t.Errorf("%s does not say what it does", path)
		}
		r := run(t, &fakeClient{}, append(strings.Fields(path)[1:], "--help"))
		r.want(t, ExitDone, cmd.Long, "")
		for line := range strings.Lines(r.out) {
			if utf8.RuneCountInString(strings.TrimSuffix(line, "\n")) > 80 {
				t.Errorf("%s --help: a line of over 80 columns: %s", path, line)
			}
		}
		if cmd.HasSubCommands() {
			return
		}
		if !strings.Contains(cmd.Example, "castractl ") {
			t.Errorf("%s has no example", path)
		}
		if !strings.Contains(cmd.Long, "xit code") {
			t.Errorf("%s does not say how it ends", path)
		}
		for _, flag := range flagsOf(cmd) {
			if flag.usage == "" {
				t.Errorf("%s --%s does not say what it does", path, flag.name)
			}
		}
	})
}

// helpFlag is one of a command's own, as its help shows it.
type helpFlag struct{ short, name, usage string }

var flagLine = regexp.MustCompile(`(?m)^ +(?:-(\w), )?--([a-z][a-z-]*)(?: [A-Za-z:]+)? *(.*)$`)

func flagsOf(cmd *cobra.Command) []helpFlag {
	var flags []helpFlag
	for _, m := range flagLine.FindAllStringSubmatch(cmd.NonInheritedFlags().FlagUsages(), -1) {
		flags = append(flags, helpFlag{m[1], m[2], m[3]})
	}
	return flags
}

func walkCommands(cmd *cobra.Command, visit func(*cobra.Command)) {
	visit(cmd)
	for _, sub := range cmd.Commands() {
		walkCommands(sub, visit)
	}
}
