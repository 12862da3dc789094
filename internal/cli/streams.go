package cli

import (
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Streams are what castractl reads from and writes to, and what is known of the
// terminal behind them.
type Streams struct {
	In  io.Reader
	Out io.Writer
	Err io.Writer

	Interactive bool // In is a terminal: somebody can be asked for a password

	Terminal bool // Out is a terminal: pager, colour and remarks make sense
	Colour   bool
	Width    int // columns that a line may take; 0: as many as it needs
	Height   int // rows that fit before a pager is called for; 0: no pager
}

// ProcessStreams are the process's own.
func ProcessStreams() Streams {
	s := Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}
	s.Interactive, s.Terminal = isTerminal(os.Stdin), isTerminal(os.Stdout)
	if s.Terminal {
		s.Width, s.Height = 80, 24
		if ws, err := unix.IoctlGetWinsize(int(os.Stdout.Fd()), unix.TIOCGWINSZ); err == nil && ws.Col > 0 {
			s.Width, s.Height = int(ws.Col), int(ws.Row)
		}
		// https://no-color.org: set and not empty, whatever the value.
		s.Colour = os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
	}
	if n, err := strconv.Atoi(os.Getenv("COLUMNS")); err == nil && n > 0 {
		s.Width = n
	}
	return s
}

// isTerminal asks not for a window size, which a serial line may lack, but for
// terminal attributes, which nothing else has.
func isTerminal(file *os.File) bool {
	_, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS)
	return err == nil
}

// style is an SGR sequence's parameters; none leaves the text as it is.
type style string

const (
	plain  style = ""
	bold   style = "1"
	faint  style = "2"
	red    style = "31"
	green  style = "32"
	yellow style = "33"
)

// paint gives text in a style, where there is colour.
func (s *Streams) paint(st style, text string) string {
	if !s.Colour || st == plain || text == "" {
		return text
	}
	return "\x1b[" + string(st) + "m" + text + "\x1b[0m"
}
