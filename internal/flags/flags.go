// Package flags reads the command line that castrad and castra-guestd share.
package flags

import (
	"errors"
	"flag"
	"fmt"
	"io"
)

// Daemon is what the command line of a daemon says.
type Daemon struct {
	Config string // the configuration file
	Check  bool   // only check it
	Debug  bool   // log more
}

// Parse reads the arguments behind a daemon's name. Where proceed is false the
// command line is answered already, and status is what to exit with: 0 for
// --help and --version, 2 for wrong usage.
func Parse(name, version, config string, args []string, stdout, stderr io.Writer) (d Daemon, status int, proceed bool) {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&d.Config, "config", config, "the configuration `file`; drop-ins are FILE.d/*.toml")
	fs.BoolVar(&d.Check, "check-config", false, "check the configuration and exit")
	fs.BoolVar(&d.Debug, "debug", false, "log more")
	showVersion := fs.Bool("version", false, "print the version and exit")
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return d, 0, false
	case err != nil:
		return d, 2, false
	case fs.NArg() > 0:
		fmt.Fprintf(stderr, "%s: unexpected argument %q; %s --help lists the options\n", name, fs.Arg(0), name)
		return d, 2, false
	case *showVersion:
		fmt.Fprintln(stdout, name, version)
		return d, 0, false
	}
	return d, 0, true
}
