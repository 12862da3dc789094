package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
)

// note prints a remark on stderr: never what was asked for, so that a script may
// drop it, and -q does.
func (f *Factory) note(format string, args ...any) {
	if !f.Quiet {
		fmt.Fprintln(f.IO.Err, escape(fmt.Sprintf(format, args...)))
	}
}

// paged lets show write through a pager, if the output turns out long and there
// is a terminal. A reader that stops reading is no error.
func (f *Factory) paged(show func(w io.Writer) error) error {
	p := &pager{out: f.IO.Out, errs: f.IO.Err}
	if f.IO.Terminal && !f.NoPager {
		p.rows = f.IO.Height
	}
	err := show(p)
	if cerr := p.Close(); err == nil {
		err = cerr
	}
	if isBrokenPipe(err) {
		return nil
	}
	return err
}

// printJSON prints v as one line, indented on a terminal.
func (f *Factory) printJSON(v any) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if f.IO.Terminal {
		enc.SetIndent("", "  ")
	}
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("writing JSON: %w", err)
	}
	return f.paged(func(w io.Writer) error {
		_, err := w.Write(b.Bytes())
		return err
	})
}
