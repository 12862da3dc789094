// Command castractl asks and steers the Castra bus from the command line.
package main

import (
	"os"

	"github.com/castrabus/castra/internal/cli"
)

var version string // set by the linker: -X main.version=…

func main() { os.Exit(cli.Main(os.Args[1:], version)) }
