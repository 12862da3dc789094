package cli

import (
	"bytes"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// heading finds where the next command's section, or what follows them all, begins.
var heading = regexp.MustCompile(`\n( {3})?[^ \n]`)

// TestManual takes castractl(1) as man shows it: every command and every flag that
// --help has is in it, and man has nothing to say against it.
func TestManual(t *testing.T) {
	var page bytes.Buffer
	if err := Manual(&page); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("groff", "-man", "-Tascii", "-P-cbou", "-ww", "-rLL=1000n")
	var complaints bytes.Buffer
	cmd.Stdin, cmd.Stderr = &page, &complaints
	out, err := cmd.Output()
	if err != nil || complaints.Len() > 0 {
		t.Fatalf("groff: %v: %s", err, &complaints)
	}
	shown := string(out)
	flags := 0
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		if !c.HasAvailableSubCommands() {
			_, section, ok := strings.Cut(shown, "\n   "+strings.TrimPrefix(c.CommandPath(), "castractl ")+"\n")
			if !ok {
				t.Errorf("castractl(1) has no section for %s", c.CommandPath())
			}
			if next := heading.FindStringIndex(section); next != nil {
				section = section[:next[0]]
			}
			c.NonInheritedFlags().VisitAll(func(f *pflag.Flag) {
				flags++
				if !f.Hidden && f.Name != "help" && !strings.Contains(section, "--"+f.Name) {
					t.Errorf("castractl(1) does not name --%s of %s", f.Name, c.CommandPath())
				}
			})
		}
		for _, sub := range c.Commands() {
			if sub.IsAvailableCommand() {
				walk(sub)
			}
		}
	}
	walk(newRootCmd(&Factory{}))
	if flags == 0 {
		t.Error("no command has a flag: this test looks at nothing")
	}
}

func TestRoff(t *testing.T) {
	for text, want := range map[string]string{
		"plain":        "plain",
		"--vm":         `\-\-vm`,
		`a\nb`:         `a\enb`,
		".TH is none":  `\&.TH is none`,
		"'quoted'":     `\&'quoted'`,
		"[VM…]":        "[VM...]",
		"one. Another": "one. Another",
	} {
		if got := roff(text); got != want {
			t.Errorf("roff(%q) = %q, want %q", text, got, want)
		}
	}
}
