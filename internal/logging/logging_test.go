package logging

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/coreos/go-systemd/v22/journal"
	"github.com/sirupsen/logrus"
)

func entry(fields logrus.Fields) *logrus.Entry {
	e := logrus.NewEntry(logrus.New()).WithFields(fields)
	e.Time = time.Date(2026, 11, 23, 21, 9, 5, 7e6, time.UTC)
	e.Level = logrus.WarnLevel
	e.Message = "it happened"
	return e
}

func TestText(t *testing.T) {
	tests := []struct {
		name   string
		fields logrus.Fields
		want   string
	}{
		{"no fields", nil, ""},
		{"sorted", logrus.Fields{"vm": "web1", "topic": "a.b", "seq": 7, MessageID: "abc"}, " seq=7 topic=a.b vm=web1"},
		{"quoted", logrus.Fields{"a": "two words", "b": "", "c": `"`, "d": "x=y", "e": `\`}, ` a="two words" b="" c="\"" d="x=y" e=\`},
		{"error", logrus.Fields{logrus.ErrorKey: errors.New("no disk")}, ` error="no disk"`},
		{"kinds", logrus.Fields{"a": 5 * time.Second, "b": true, "c": nil, "d": []string{"x"}}, " a=5s b=true c=<nil> d=[x]"},
		{"line breaks", logrus.Fields{"a": "x\ny", "b": "x\r\n2026 info  forged"}, ` a=x\ny b="x\r\n2026 info  forged"`},
		{"terminal", logrus.Fields{"a": "\x1b[31m", "b": "\u009b2J", "c": "\x7f\x00"}, ` a=\x1b[31m b=\u009b2J c=\x7f\x00`},
		{"other breaks and directions", logrus.Fields{"a": "\u2028", "b": "\u202e"}, ` a=\u2028 b=\u202e`},
		{"letters", logrus.Fields{"a": "Zürich", "b": "\xff"}, " a=Zürich b=\uFFFD"},
		{"key", logrus.Fields{"a\nb": 1}, ` a\nb=1`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := textFormatter{}.Format(entry(tt.fields))
			if want := "2026-11-23T21:09:05.007Z warning it happened" + tt.want + "\n"; string(got) != want || err != nil {
				t.Errorf("got  %q, %v\nwant %q", got, err, want)
			}
		})
	}
}

func TestMessageCannotForgeALine(t *testing.T) {
	e := entry(nil)
	e.Message = "hello\nworld\x1b[0m"
	got, _ := textFormatter{}.Format(e)
	if !strings.HasSuffix(string(got), ` hello\nworld\x1b[0m`+"\n") {
		t.Errorf("%q", got)
	}
	if got := message(e); got != `hello\nworld\x1b[0m` {
		t.Errorf("%q", got)
	}
}

func TestJournal(t *testing.T) {
	long := strings.Repeat("k", 100)
	tests := []struct {
		name    string
		fields  logrus.Fields
		message string
		vars    map[string]string
	}{
		{"no fields", nil, "it happened", nil},
		{
			"the well-known",
			logrus.Fields{"vm": "web1", "session": "sess-1", "topic": "a.b", "seq": uint64(7), "reason": "slow", MessageID: "abc", logrus.ErrorKey: errors.New("gone")},
			"web1: it happened (slow): gone seq=7 topic=a.b",
			map[string]string{
				"CASTRA_VM": "web1", "CASTRA_SESSION": "sess-1", "CASTRA_TOPIC": "a.b", "CASTRA_SEQ": "7",
				"CASTRA_REASON": "slow", "MESSAGE_ID": "abc", "CASTRA_ERROR": "gone",
			},
		},
		{
			"odd names",
			logrus.Fields{"_odd key": 1, "message": 2, long: 3},
			"it happened _odd key=1 " + long + "=3 message=2",
			map[string]string{"CASTRA__ODD_KEY": "1", "CASTRA_MESSAGE": "2", "CASTRA_" + strings.Repeat("K", 57): "3"},
		},
		{
			"a guest's words", // a field keeps them as they are, for whoever searches for them
			logrus.Fields{"vm": "a\nb", "reason": "\x1b[31m", logrus.ErrorKey: "x\ny", "topic": "p\nq"},
			`a\nb: it happened (\x1b[31m): x\ny topic=p\nq`,
			map[string]string{"CASTRA_VM": "a\nb", "CASTRA_REASON": "\x1b[31m", "CASTRA_ERROR": "x\ny", "CASTRA_TOPIC": "p\nq"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := journalHook{send: func(m string, p journal.Priority, vars map[string]string) error {
				want := map[string]string{"SYSLOG_IDENTIFIER": filepath.Base(os.Args[0])}
				maps.Copy(want, tt.vars)
				if m != tt.message || p != journal.PriWarning || !maps.Equal(vars, want) {
					t.Errorf("sent %q at %d with %q\nwant %q with %q", m, p, vars, tt.message, want)
				}
				return nil
			}}
			if err := h.Fire(entry(tt.fields)); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestWhatTheJournalRefusesIsStillSaid(t *testing.T) {
	var stream bytes.Buffer
	h := journalHook{stream: &stream, send: func(string, journal.Priority, map[string]string) error { return errors.New("no socket") }}
	if err := h.Fire(entry(logrus.Fields{"vm": "web1"})); err != nil || stream.String() != "<4>web1: it happened\n" {
		t.Errorf("%q, %v", stream.String(), err)
	}
}

func TestPriorities(t *testing.T) {
	want := map[logrus.Level]journal.Priority{
		logrus.PanicLevel: 2, logrus.FatalLevel: 2, logrus.ErrorLevel: 3, logrus.WarnLevel: 4,
		logrus.InfoLevel: 6, logrus.DebugLevel: 7, logrus.TraceLevel: 7,
	}
	for _, l := range logrus.AllLevels {
		if got := priority(l); got != want[l] {
			t.Errorf("%v is %d, want %d", l, got, want[l])
		}
	}
}

func TestIsJournal(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "stream"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st syscall.Stat_t
	if err := syscall.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	for announced, want := range map[string]bool{
		fmt.Sprintf("%d:%d", st.Dev, st.Ino):   true,
		fmt.Sprintf("%d:%d", st.Dev, st.Ino+1): false,
		fmt.Sprintf("%d:%d", st.Dev+1, st.Ino): false,
		fmt.Sprintf("%d", st.Dev):              false,
		"":                                     false,
		"a:b":                                  false,
	} {
		if got := isJournal(announced, f); got != want {
			t.Errorf("%q: %v", announced, got)
		}
	}
	f.Close()
	if isJournal(fmt.Sprintf("%d:%d", st.Dev, st.Ino), f) {
		t.Error("a closed file is the journal")
	}
}

func TestNew(t *testing.T) {
	// Elsewhere than in the journal, whatever a parent announced.
	t.Setenv("JOURNAL_STREAM", "1:1")
	log := New(logrus.DebugLevel)
	if _, ok := log.Formatter.(textFormatter); !ok || log.Out != os.Stderr || log.GetLevel() != logrus.DebugLevel || len(log.Hooks) > 0 {
		t.Errorf("%+v", log)
	}
	info, err := os.Stderr.Stat()
	if err != nil {
		t.Fatal(err)
	}
	st := info.Sys().(*syscall.Stat_t)
	t.Setenv("JOURNAL_STREAM", fmt.Sprintf("%d:%d", st.Dev, st.Ino))
	if log := New(logrus.InfoLevel); log.Out == os.Stderr || len(log.Hooks) != len(logrus.AllLevels) {
		t.Errorf("%+v", log)
	}
}

// FuzzLine logs whatever a guest may have said: it stays one line, and commands no
// terminal.
func FuzzLine(f *testing.F) {
	for _, said := range []string{"a", "x\ny", "\x1b[31m", "\u202e\u2028", "\xff\u009b", `a="b" c=d`, ""} {
		f.Add(said, said)
	}
	f.Fuzz(func(t *testing.T, said, field string) {
		e := entry(logrus.Fields{"vm": said, "reason": field, logrus.ErrorKey: errors.New(said), field: said})
		e.Message = said
		line, err := textFormatter{}.Format(e)
		if err != nil || bytes.IndexByte(line, '\n') != len(line)-1 {
			t.Fatalf("%q, %v", line, err)
		}
		for _, shown := range []string{string(line[:len(line)-1]), message(e)} {
			if i := strings.IndexFunc(shown, unprintable); i >= 0 || !utf8.ValidString(shown) {
				t.Errorf("%q shows %q", said, shown)
			}
		}
		if name := journalField(field); len(name) > maxField || strings.Trim(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_") != "" {
			t.Errorf("the field %q is called %q", field, name)
		}
	})
}
