// Command castra-guestd is a virtual machine's end of the message bus between a
// Linux host and its guests.
package main

import (
	"os"

	"github.com/castrabus/castra/internal/guestdcmd"
)

// version is set by the build.
var version = "devel"

func main() { os.Exit(guestdcmd.Main(version, os.Args[1:], os.Stdout, os.Stderr)) }
