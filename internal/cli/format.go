package cli

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
)

// formats are what `bus tail -o` takes.
var formats = []string{"short", "cat", "json", "json-pretty"}

// formatter writes one entry of a tail.
type formatter func(w *bufio.Writer, e *entry) error

// newFormatter gives the formatter of one of formats.
func newFormatter(name string, f *Factory) formatter {
	switch name {
	case "json":
		return writeLine
	case "json-pretty":
		return writePretty
	case "cat":
		return func(w *bufio.Writer, e *entry) error { return writeCat(w, f.IO.Err, e) }
	}
	return func(w *bufio.Writer, e *entry) error { return writeShort(w, &f.IO, e) }
}

func writeLine(w *bufio.Writer, e *entry) error {
	_, err := w.Write(e.line)
	if err == nil {
		err = w.WriteByte('\n')
	}
	return err
}

func writePretty(w *bufio.Writer, e *entry) error {
	var b bytes.Buffer
	if err := json.Indent(&b, e.line, "", "  "); err != nil {
		return fmt.Errorf("indenting record %d: %w", e.Seq, err)
	}
	b.WriteByte('\n')
	_, err := b.WriteTo(w)
	return err
}

// writeCat writes payloads alone. A gap has none, and goes to stderr, so that
// every line on stdout stays a payload and the loss is said all the same.
func writeCat(w *bufio.Writer, stderr io.Writer, e *entry) error {
	if e.isGap() {
		_, err := fmt.Fprintln(stderr, gapLine(e))
		return err
	}
	_, err := fmt.Fprintln(w, escape(string(e.Payload)))
	return err
}

// writeShort writes a line like journalctl's, in the person's own time zone.
func writeShort(w *bufio.Writer, s *Streams, e *entry) error {
	if e.isGap() {
		_, err := fmt.Fprintln(w, s.paint(yellow, gapLine(e)))
		return err
	}
	_, err := fmt.Fprintf(w, "%s %s %s: %s\n",
		s.paint(faint, e.Time.Local().Format("Jan 02 15:04:05.000")),
		s.paint(bold, escape(e.VM)), escape(e.Topic), escape(string(e.Payload)))
	return err
}

func gapLine(e *entry) string {
	if e.From == e.To {
		return fmt.Sprintf("-- gap: record %d is gone --", e.From)
	}
	return fmt.Sprintf("-- gap: records %d to %d are gone --", e.From, e.To)
}
