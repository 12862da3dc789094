// Command castrad is the host's end of the message bus between a Linux host and
// its virtual machines.
package main

import (
	"os"

	"github.com/castrabus/castra/internal/castradcmd"
)

// version is set by the build.
var version = "devel"

func main() { os.Exit(castradcmd.Main(version, os.Args[1:], os.Stdout, os.Stderr)) }
