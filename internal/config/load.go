// Package config reads the daemons' configuration: a TOML file and drop-ins
// beside it, FILE.d/*.toml, which override it key by key in the order of their
// names.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/BurntSushi/toml"
)

// load decodes path and its drop-ins into cfg, which holds the defaults. A
// missing file is an error unless optional. It gives the keys that were set.
func load(path string, optional bool, cfg any) (set map[string]bool, err error) {
	set = make(map[string]bool)
	files := []string{path}
	dropins, err := filepath.Glob(filepath.Join(globEscape(path)+".d", "*.toml"))
	if err != nil {
		return nil, fmt.Errorf("looking for drop-ins of %s: %w", path, err)
	}
	for i, file := range append(files, dropins...) { // Glob sorts
		data, err := os.ReadFile(file)
		if i == 0 && optional && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reading the configuration: %w", err)
		}
		if err := decode(file, string(data), cfg, set); err != nil {
			return nil, err
		}
	}
	return set, nil
}

func globEscape(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}

func decode(file, text string, cfg any, set map[string]bool) error {
	meta, err := toml.Decode(text, cfg)
	if err != nil {
		var perr toml.ParseError
		if errors.As(err, &perr) {
			return fmt.Errorf("%s, line %d: %s", file, perr.Position.Line, perr.Message+inner(perr))
		}
		return fmt.Errorf("%s: %w", file, err)
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		key := unknown[0].String()
		return fmt.Errorf("%s, line %d: unknown key %s; castrad.toml(5) and castra-guestd.toml(5) list those there are", file, lineOf(text, unknown[0]), key)
	}
	for _, key := range meta.Keys() {
		set[key.String()] = true
	}
	return nil
}

// inner adds the reason where a parse error only names the key.
func inner(perr toml.ParseError) string {
	if cause := errors.Unwrap(perr); cause != nil && !strings.Contains(perr.Message, cause.Error()) {
		return ": " + cause.Error()
	}
	return ""
}

// lineOf finds the line that a key stands in, for an error message: the parser
// does not keep it.
func lineOf(text string, key toml.Key) int {
	table := ""
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			table = strings.Trim(line, "[] \t")
			if table == key.String() {
				return i + 1
			}
			continue
		}
		name, _, ok := strings.Cut(line, "=")
		name = strings.Trim(strings.TrimSpace(name), `"'`)
		full := name
		if table != "" {
			full = table + "." + name
		}
		if ok && full == key.String() {
			return i + 1
		}
	}
	return 1
}
