package wire

import (
	"bufio"
	"os"
	"strings"
	"testing"
)

// Whoever implements the protocol from its description copies these frames.
func TestDocumentedFrames(t *testing.T) {
	doc, err := os.Open("../../docs/PROTOCOL.md")
	if err != nil {
		t.Fatal(err)
	}
	defer doc.Close()
	inJSON, seen := false, map[Type]int{}
	lines := bufio.NewScanner(doc)
	for lines.Scan() {
		line := lines.Text()
		if strings.HasPrefix(line, "```") {
			inJSON = line == "```json"
			continue
		}
		if !inJSON {
			continue
		}
		m, err := decode(line)
		if err != nil || m.Bad != "" || m.Type == TypeUnknown {
			t.Errorf("%s\n%v, bad %q, type %d", line, err, m.Bad, m.Type)
		}
		if m.Topic != nil {
			if _, err := ParsePattern(string(m.Topic)); err != nil {
				t.Errorf("%s\n%v", line, err)
			}
		}
		seen[m.Type]++
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	for _, typ := range []Type{TypePublish, TypeSubscribe, TypeUnsubscribe, TypeHeartbeat, TypeAck, TypeGap, TypeError} {
		if seen[typ] == 0 {
			t.Errorf("no frame of type %d is shown", typ)
		}
	}
}

// The table of patterns is what people learn them from.
func TestDocumentedPatterns(t *testing.T) {
	doc, err := os.ReadFile("../../docs/PROTOCOL.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, ok := strings.Cut(string(doc), "| pattern | selects | does not select |\n|---|---|---|\n")
	if !ok {
		t.Fatal("there is no table of patterns")
	}
	table, _, _ = strings.Cut(table, "\n\n")
	quoted := func(cell string) (words []string) {
		for i, word := range strings.Split(cell, "`") {
			if i%2 == 1 {
				words = append(words, word)
			}
		}
		return words
	}
	for row := range strings.Lines(table) {
		cells := strings.Split(row, "|")
		if len(cells) != 5 || len(quoted(cells[1])) != 1 {
			t.Fatalf("the row %q", row)
		}
		p, err := ParsePattern(quoted(cells[1])[0])
		if err != nil {
			t.Error(err)
			continue
		}
		if strings.Contains(cells[2], "every") {
			continue
		}
		for i, want := range []bool{true, false} {
			for _, topic := range quoted(cells[2+i]) {
				if p.Match(topic) != want {
					t.Errorf("%s matches %s: %v", p, topic, !want)
				}
			}
		}
	}
}
