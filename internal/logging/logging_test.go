package logging

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/coreos/go-systemd/v22/journal"
	"github.com/sirupsen/logrus"
)

func TestTextLineCannotBeForged(t *testing.T) {
	var out bytes.Buffer
	log := logrus.New()
	log.SetFormatter(textFormatter{})
	log.SetOutput(&out)
	log.WithFields(logrus.Fields{"vm": "a\nb", "z": "two words", "colour": "\x1b[31m", "c1": "\u009b2J"}).
		WithError(errors.New("x\ry")).Warn("hello\nworld")
	got := out.String()
	if strings.Count(got, "\n") != 1 || strings.ContainsAny(got, "\x1b\r\u009b") {
		t.Errorf("control characters came through: %q", got)
	}
	for _, want := range []string{` warning hello\nworld`, ` vm=a\nb`, ` z="two words"`, ` error=x\ry`} {
		if !strings.Contains(got, want) {
			t.Errorf("%q lacks %q", got, want)
		}
	}
}

func TestJournalFields(t *testing.T) {
	var message string
	var pri journal.Priority
	var vars map[string]string
	var fallback bytes.Buffer
	var fail error
	log := logrus.New()
	log.SetOutput(&bytes.Buffer{})
	log.AddHook(journalHook{fallback: &fallback, send: func(m string, p journal.Priority, v map[string]string) error {
		message, pri, vars = m, p, v
		return fail
	}})
	e := log.WithFields(logrus.Fields{"vm": "web1", "session": "sess-1", MessageID: "abc", "_odd key": 1}).WithError(errors.New("gone"))
	e.Error("it broke")
	if message != "web1: it broke: gone" || pri != journal.PriErr {
		t.Errorf("%q at %d", message, pri)
	}
	for k, want := range map[string]string{"CASTRA_VM": "web1", "CASTRA_SESSION": "sess-1", "MESSAGE_ID": "abc", "CASTRA__ODD_KEY": "1", "CASTRA_ERROR": "gone"} {
		if vars[k] != want {
			t.Errorf("%s is %q, want %q", k, vars[k], want)
		}
	}
	fail = errors.New("no journal")
	e.Error("still said")
	if !strings.Contains(fallback.String(), "still said") {
		t.Errorf("without a journal: %q", fallback.String())
	}
}
