package cli

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Manual writes castractl(1) as man(7) has it, made of what the commands say about
// themselves, so that the two cannot part.
func Manual(w io.Writer) error {
	f := &Factory{}
	defer f.Close()
	root := newRootCmd(f)
	m := manual{}
	m.line(`.TH CASTRACTL 1 2026-11-25 "Castra Bus" "User Commands"`)
	m.section("name")
	m.line(`castractl \- ask and steer the Castra message bus`)
	m.section("synopsis")
	m.line(".B castractl")
	m.line(`.RI [ FLAG ...]\&`)
	m.line(".I COMMAND")
	m.line(`.RI [ ARGUMENT ...]\&`)
	m.section("description")
	m.prose(root.Long)
	m.section("flags of every command")
	m.flags(root.PersistentFlags())
	m.section("commands")
	m.commands(root)
	m.sb.WriteString(manualEnd)
	_, err := io.WriteString(w, m.sb.String())
	return err
}

// manualEnd is what no command says about itself.
const manualEnd = `.SH EXIT STATUS
.TP
.B 0
Done.
.TP
.B 1
Failed.
.TP
.B 2
Wrong usage.
.TP
.B 3
Not reachable: a VM that
.B status
or
.B wait
named, or nobody acknowledged what was published with
.BR \-\-wait\-ack .
.TP
.B 4
There is no such VM.
.TP
.B 5
castrad is not to be had.
.SH ENVIRONMENT
.TP
.B DBUS_SYSTEM_BUS_ADDRESS
The message bus to use in place of the system's.
.TP
.BR NO_COLOR ", " PAGER ", " COLUMNS
As other programs have them.
.SH SEE ALSO
.BR castrad (8),
.BR castrad.toml (5),
.BR castra\-guestd (8),
.BR journalctl (1)
`

type manual struct{ sb strings.Builder }

func (m *manual) line(format string, args ...any) { fmt.Fprintf(&m.sb, format+"\n", args...) }

func (m *manual) section(title string) { m.line(".SH %s", strings.ToUpper(title)) }

// commands writes what can be run below cmd, each with all its words.
func (m *manual) commands(cmd *cobra.Command) {
	for _, c := range cmd.Commands() {
		if !c.IsAvailableCommand() {
			continue
		}
		if c.HasAvailableSubCommands() {
			m.commands(c)
			continue
		}
		m.line(".SS %s", roff(c.CommandPath()[len("castractl "):]))
		m.line(".B %s", roff(c.UseLine()))
		m.line(".PP")
		if c.Long != "" {
			m.prose(c.Long)
		} else {
			m.prose(c.Short + ".")
		}
		m.flags(c.NonInheritedFlags())
		if c.Example != "" {
			m.line(".PP")
			m.prose(c.Example)
		}
	}
}

func (m *manual) flags(flags *pflag.FlagSet) {
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		name := `\fB` + roff("--"+f.Name) + `\fR`
		if f.Shorthand != "" {
			name = `\fB` + roff("-"+f.Shorthand) + `\fR, ` + name
		}
		value, usage := pflag.UnquoteUsage(f)
		if value != "" {
			name += ` \fI` + roff(value) + `\fR`
		}
		switch f.DefValue {
		case "", "0", "false", "[]", "0s":
		default:
			usage += " (default " + f.DefValue + ")"
		}
		m.line(".TP")
		m.line("%s", name)
		m.line("%s", roff(usage))
	})
}

// prose writes paragraphs; lines that are indented stand as they are.
func (m *manual) prose(text string) {
	literal := false
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		code, indented := strings.CutPrefix(line, "  ")
		if indented != literal && line != "" {
			if literal = indented; literal {
				m.line(".RS 4\n.nf")
			} else {
				m.line(".fi\n.RE")
			}
		}
		switch {
		case line == "":
			m.line(".PP")
		case literal:
			m.line("%s", roff(code))
		default:
			m.line("%s", roff(line))
		}
	}
	if literal {
		m.line(".fi\n.RE")
	}
}

// roff makes text stand for itself: a minus that can be copied into a shell, and no
// character at the start of a line that would make it a request (groff(7)).
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, `-`, `\-`, `…`, `...`).Replace(text)
	if strings.HasPrefix(text, ".") || strings.HasPrefix(text, "'") {
		text = `\&` + text
	}
	return text
}
