package cli

import (
	"strings"
	"testing"
	"unicode/utf8"
)

func TestShorten(t *testing.T) {
	for _, c := range []struct {
		text  string
		width int
		how   yield
		want  string
	}{
		{"web1", 4, cutMiddle, "web1"},
		{"web12", 4, cutMiddle, "we…2"},
		{"abcdefghij", 5, cutMiddle, "ab…ij"},
		{"abcdefghij", 5, cutEnd, "abcd…"},
		{"äöüäöü", 3, cutMiddle, "ä…ü"},
		{"ab", 1, cutMiddle, "…"},
	} {
		if got := shorten(c.text, c.width, c.how); got != c.want {
			t.Errorf("shorten(%q, %d, %d) = %q, want %q", c.text, c.width, c.how, got, c.want)
		}
	}
}

func TestTableWidths(t *testing.T) {
	long := strings.Repeat("n", 128)
	tab := table{columns: []column{{title: "VM", yield: cutMiddle}, {title: "STATE"}, {title: "TOPICS", yield: cutEnd}}}
	tab.add(cell{long, plain}, cell{"reachable", plain}, cell{strings.Repeat("topic ", 40), plain})
	tab.add(cell{"web1", plain}, cell{"unreachable", plain}, cell{"", plain})
	for _, width := range []int{50, 80, 132, 0} {
		var out strings.Builder
		if err := tab.write(&out, &Streams{Width: width}, true); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(out.String()) {
			if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); width > 0 && n > width {
				t.Errorf("a line of %d columns where %d fit: %q", n, width, line)
			}
		}
		if width == 0 && !strings.Contains(out.String(), long) {
			t.Error("a name is cut though there is no terminal to fit")
		}
	}
}

func TestTableEscapes(t *testing.T) {
	tab := table{columns: []column{{title: "VM"}, {title: "TOPIC"}}}
	tab.add(cell{"evil\x1b[2J", plain}, cell{"", plain})
	var out strings.Builder
	if err := tab.write(&out, &Streams{}, false); err != nil {
		t.Fatal(err)
	}
	if want := `evil\u001b[2J  -` + "\n"; out.String() != want {
		t.Errorf("%q, want %q", out.String(), want)
	}
}
