package cli

import (
	"io"
	"strings"
	"unicode/utf8"
)

// column is one column of a table.
type column struct {
	title string
	right bool // numbers and ages: aligned at their end
	yield yield
}

// yield is how a column gives way when a line would not fit the terminal; the last
// such column is the first to.
type yield uint8

const (
	rigid     yield = iota
	cutMiddle       // names that share a beginning differ at their end
	cutEnd          // a list says most with what is first
)

const (
	columnGap  = 2  // spaces
	leastWidth = 16 // what remains of a column that gives way
)

// cell is what a table shows in one place.
type cell struct {
	text  string
	style style
}

// table is text in columns.
type table struct {
	columns []column
	rows    [][]cell
}

// add appends a row; guests' bytes are escaped here, so that no table can forget to.
func (t *table) add(cells ...cell) {
	for i := range cells {
		if cells[i].text = escape(cells[i].text); cells[i].text == "" {
			cells[i].text = "-"
		}
	}
	t.rows = append(t.rows, cells)
}

// widths fits the columns into width, as far as they yield.
func (t *table) widths(width int) []int {
	w := make([]int, len(t.columns))
	total := columnGap * (len(w) - 1)
	for i, c := range t.columns {
		w[i] = utf8.RuneCountInString(c.title)
		for _, row := range t.rows {
			w[i] = max(w[i], utf8.RuneCountInString(row[i].text))
		}
		total += w[i]
	}
	if width <= 0 {
		return w
	}
	for i := len(w) - 1; i >= 0 && total > width; i-- {
		if t.columns[i].yield != rigid {
			least := max(utf8.RuneCountInString(t.columns[i].title), leastWidth)
			give := max(min(total-width, w[i]-least), 0)
			w[i] -= give
			total -= give
		}
	}
	return w
}

// write prints the table, its heading only when heading is set.
func (t *table) write(out io.Writer, s *Streams, heading bool) error {
	widths := t.widths(s.Width)
	var b strings.Builder
	if heading {
		head := make([]cell, len(t.columns))
		for i, c := range t.columns {
			head[i] = cell{c.title, bold}
		}
		t.writeRow(&b, s, widths, head)
	}
	for _, row := range t.rows {
		t.writeRow(&b, s, widths, row)
	}
	_, err := io.WriteString(out, b.String())
	return err
}

func (t *table) writeRow(b *strings.Builder, s *Streams, widths []int, row []cell) {
	for i, c := range row {
		text := shorten(c.text, widths[i], t.columns[i].yield)
		pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(text))
		last := i == len(row)-1
		if t.columns[i].right {
			b.WriteString(pad)
		}
		b.WriteString(s.paint(c.style, text))
		if !t.columns[i].right && !last {
			b.WriteString(pad)
		}
		if !last {
			b.WriteString(strings.Repeat(" ", columnGap))
		}
	}
	b.WriteByte('\n')
}

// shorten fits text into width columns.
func shorten(text string, width int, how yield) string {
	runes := []rune(text)
	if len(runes) <= width || width < 1 {
		return text
	}
	tail := 0
	if how == cutMiddle {
		tail = (width - 1) / 2
	}
	return string(runes[:width-1-tail]) + "…" + string(runes[len(runes)-tail:])
}
