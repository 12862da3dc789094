// Package config reads the daemons' configuration: a TOML file and drop-ins
// beside it, FILE.d/*.toml, which override it key by key in the order of their
// names. A list in a later file replaces an earlier one.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// load decodes path and its drop-ins into cfg, which holds the defaults, and says
// where each key was set. A missing file is an error unless optional; its
// drop-ins count all the same.
func load(path string, optional bool, cfg any) (origins, error) {
	dropins, err := dropIns(path + ".d")
	if err != nil {
		return nil, err
	}
	from := make(origins)
	var errs []error
	for i, file := range append([]string{path}, dropins...) {
		text, err := os.ReadFile(file)
		if i == 0 && optional && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reading the configuration: %w", err)
		}
		errs = append(errs, decode(file, string(text), cfg, from))
	}
	return from, errors.Join(errs...)
}

// dropIns lists a directory's *.toml in the order of their names. What begins
// with a dot is an editor's or a package manager's.
func dropIns(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir) // sorted
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("looking for drop-ins of the configuration: %w", err)
	}
	var files []string
	for _, e := range entries {
		if name := e.Name(); strings.HasSuffix(name, ".toml") && !strings.HasPrefix(name, ".") {
			files = append(files, filepath.Join(dir, name))
		}
	}
	return files, nil
}

// checker collects values that no file may set.
type checker struct {
	path string
	from origins
	errs []*Error
}

// refuse says what is wrong with the value of key, at the line that set it.
func (c *checker) refuse(key, format string, args ...any) {
	o, ok := c.from[key]
	if !ok {
		o.file = c.path
	}
	c.errs = append(c.errs, &Error{File: o.file, Line: o.line, Key: key, Reason: fmt.Sprintf(format, args...)})
}

func (c *checker) atLeastOne(key string, value int64) {
	if value < 1 {
		c.refuse(key, "is %d; it must be at least 1", value)
	}
}

func (c *checker) positive(key string, d Duration) {
	if d <= 0 {
		c.refuse(key, `is "0s"; it must be a duration above 0, like "5s"`)
	}
}

func (c *checker) sizeAtLeast(key string, value, least Size) {
	if value < least {
		c.refuse(key, `is %d bytes; it must be at least "%v"`, value, least)
	}
}

func (c *checker) directory(key, path string) {
	if path == "" {
		c.refuse(key, "is empty; it must name a directory")
	}
}

// address checks HOST:PORT with a port of at least lowest.
func (c *checker) address(key, addr string, lowest uint64) (host string) {
	host, port, err := net.SplitHostPort(addr)
	n, perr := strconv.ParseUint(port, 10, 16)
	if err != nil || perr != nil || n < lowest || strings.ContainsAny(host, " \t/") {
		c.refuse(key, `is %q; it must be an address like "127.0.0.1:7070" or "[::1]:7070", with a port from %d to 65535`, addr, lowest)
	}
	return host
}

func (c *checker) topics(key string, topics []string, check func(string) error) {
	for _, topic := range topics {
		if err := check(topic); err != nil {
			c.refuse(key, "%v", err)
		}
	}
}
