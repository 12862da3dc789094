// Command manpage prints castractl(1). The packages are built with it.
package main

import (
	"fmt"
	"os"

	"github.com/castrabus/castra/internal/cli"
)

func main() {
	if err := cli.Manual(os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "manpage:", err)
		os.Exit(1)
	}
}
