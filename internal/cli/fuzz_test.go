package cli

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/castrabus/castra/internal/bus"
)

// FuzzForward reads what --forward may be given.
func FuzzForward(f *testing.F) {
	for _, text := range []string{"tcp:2222:22", "udp:1:1", "tcp:0:1", "tcp:1", "tcp::", "x:1:2", "tcp:99999:1"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		_, _ = parseForward(text)
		if word := shellQuote(text); !strings.Contains(text, "'") && strings.Trim(word, "'") != strings.Trim(text, "'") {
			t.Errorf("%q is quoted as %q", text, word)
		}
	})
}

// shown fails if text commands a terminal or holds a line that begins as none does.
func shown(t *testing.T, text []byte) {
	t.Helper()
	if i := bytes.IndexFunc(text, func(r rune) bool { return r != '\n' && unsafe(r) }); i >= 0 {
		t.Errorf("it shows %q", text)
	}
}

// FuzzTailed shows whatever a tail's stream holds, in every format.
func FuzzTailed(f *testing.F) {
	for _, text := range []string{
		record(1, `{"a":"\u001b[31m"}`) + gap + record(8, `"\u202e"`), record(1, "1")[:20], `{"type":"error","code":"no-such-vm","reason":"x"}` + "\n",
		`{"seq":-1}` + "\n", `{"time":"yesterday"}` + "\n", `{"type":"gap","from":7,"to":3}` + "\n", "\n", "[]\n", `{"seq":18446744073709551615,"vm":"` + "\x7f\xff" + `","payload":` + "\"\u009b\"}\n",
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, format := range formats {
			var out, errs bytes.Buffer
			factory := &Factory{IO: Streams{Out: &out, Err: &errs}, Now: testNow}
			tail := &tailer{f: factory, out: bufio.NewWriter(&out), format: newFormatter(format, factory)}
			if err := tail.copy(bufio.NewReaderSize(bytes.NewReader(data), maxLine)); err == nil && len(data) > 0 && data[len(data)-1] != '\n' {
				t.Errorf("the end of %q is taken for the stream's", data)
			}
			if format == "short" || format == "cat" {
				shown(t, out.Bytes())
				shown(t, errs.Bytes())
				if lines := bytes.Count(data, []byte("\n")); bytes.Count(out.Bytes(), []byte("\n")) > lines {
					t.Errorf("%d records became %q", lines, out.Bytes())
				}
			}
		}
	})
}

// FuzzStatus shows whatever status a daemon gives: no name and no reason in it, which
// guests may have chosen, commands a terminal.
func FuzzStatus(f *testing.F) {
	st := testStatus()
	text, err := json.Marshal(st)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text, 80)
	f.Add([]byte(`{"broker":{"kind":"guest","state":"\u001b[2J","listen":["\u202e"]},"vms":[{"vm":"\u009b","reason":"\n","subscriptions":["\r"]}]}`), 0)
	f.Add([]byte(`{"refused":[{"vm":"$(reboot)\u0007","reason":"x\ny","age_ms":-1}],"vms":[{"vm":"a","forwards":["tcp:\u001b:1"],"last_publish_age_ms":9223372036854775807}]}`), 1)
	f.Fuzz(func(t *testing.T, data []byte, width int) {
		var st bus.Status
		if json.Unmarshal(data, &st) != nil {
			return
		}
		var out bytes.Buffer
		factory := &Factory{IO: Streams{Out: &out, Err: io.Discard, Width: width % 300}, Now: testNow}
		if err := factory.writeStatus(&out, &st, false); err != nil {
			t.Fatal(err)
		}
		shown(t, out.Bytes())
	})
}

// FuzzCursorFile reads whatever bytes as the file that a tail notes its place in.
func FuzzCursorFile(f *testing.F) {
	for _, text := range []string{"7\n", "", " \n", "-1", "0x7", "18446744073709551616", "7\n8", "\x00", "+7"} {
		f.Add([]byte(text))
	}
	path := filepath.Join(f.TempDir(), "cursor")
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		c := &cursorFile{path: path}
		n, err := c.load()
		if err != nil {
			if n != 0 || c.saved != 0 {
				t.Errorf("%q is %d beside %v", data, n, err)
			}
			return
		}
		if n == 0 {
			return // there is nothing to save
		}
		c.saved = 0
		c.shown.Store(n)
		again := &cursorFile{path: path}
		if err := c.save(); err != nil {
			t.Fatal(err)
		}
		if m, err := again.load(); m != n || err != nil {
			t.Errorf("%q is %d, and then %d, %v", data, n, m, err)
		}
	})
}
