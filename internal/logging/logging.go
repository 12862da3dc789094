// Package logging sets logrus up for the daemons: structured entries where
// stderr is the journal, a readable line each elsewhere. What is logged may hold a
// guest's words, so nothing in it can end a line or command a terminal.
package logging

import (
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unicode"

	"github.com/coreos/go-systemd/v22/journal"
	"github.com/sirupsen/logrus"
)

// MessageID is the logrus field whose value, 32 hex digits, becomes the journal's
// MESSAGE_ID.
const MessageID = "message_id"

// New gives the logger of a daemon that writes to stderr. It never colours.
func New(level logrus.Level) *logrus.Logger {
	log := logrus.New()
	log.SetLevel(level)
	// Nothing about it changes any more, and an os.File writes one entry at a time. Its
	// own lock is taken five times an entry, which thousands who connect at once wait for.
	log.SetNoLock()
	if isJournal(os.Getenv("JOURNAL_STREAM"), os.Stderr) {
		log.AddHook(journalHook{send: journal.Send, stream: os.Stderr})
		// The hook does it all; logrus formats and writes the rest in any case.
		log.SetFormatter(nothing{})
		log.SetOutput(io.Discard)
		return log
	}
	log.SetFormatter(textFormatter{})
	log.SetOutput(os.Stderr)
	return log
}

// isJournal tells whether f is the stream to the journal that systemd announced by
// its device and inode (JOURNAL_STREAM, systemd.exec(5)). A parent's announcement
// holds no longer where the parent has redirected f.
func isJournal(announced string, f *os.File) bool {
	info, err := f.Stat()
	if err != nil {
		return false
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && announced == strconv.FormatUint(st.Dev, 10)+":"+strconv.FormatUint(st.Ino, 10)
}

type nothing struct{}

func (nothing) Format(*logrus.Entry) ([]byte, error) { return nil, nil }

// journalHook sends entries to the journal with their fields.
type journalHook struct {
	send   func(message string, priority journal.Priority, vars map[string]string) error
	stream io.Writer // leads to the journal too, a line an entry
}

func (journalHook) Levels() []logrus.Level { return logrus.AllLevels }

func (h journalHook) Fire(e *logrus.Entry) error {
	vars := map[string]string{"SYSLOG_IDENTIFIER": identifier()}
	for _, k := range keys(e) {
		if k == MessageID {
			vars["MESSAGE_ID"] = text(e.Data[k])
		} else {
			vars[journalField(k)] = text(e.Data[k])
		}
	}
	if h.send(message(e), priority(e.Level), vars) == nil {
		return nil
	}
	// A sandbox may hide the journal's socket. The stream takes the priority as
	// a prefix (sd-daemon(3)).
	_, err := fmt.Fprintf(h.stream, "<%d>%s\n", priority(e.Level), message(e))
	return err
}

func identifier() string { return os.Args[0][strings.LastIndexByte(os.Args[0], '/')+1:] }

// message is what a plain journalctl shows, which is no field: whom it is about and
// why stand in the sentence, the other fields behind it. The session is left to
// those who look for it.
func message(e *logrus.Entry) string {
	var b []byte
	if vm, ok := e.Data["vm"]; ok {
		b = append(append(b, escape(text(vm))...), ": "...)
	}
	b = append(b, escape(e.Message)...)
	if reason, ok := e.Data["reason"]; ok {
		b = append(append(append(b, " ("...), escape(text(reason))...), ')')
	}
	if err, ok := e.Data[logrus.ErrorKey]; ok {
		b = append(append(b, ": "...), escape(text(err))...)
	}
	for _, k := range keys(e) {
		switch k {
		case "vm", "reason", logrus.ErrorKey, MessageID, "session":
		default:
			b = appendField(b, k, e.Data[k])
		}
	}
	return string(b)
}

// maxField is the longest name that journald takes (sd_journal_print(3)).
const maxField = 64

// journalField makes a name that journald takes of a field's: upper case, and not
// beginning with an underscore.
func journalField(key string) string {
	name := "CASTRA_" + strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return r
		default:
			return '_'
		}
	}, key)
	return name[:min(len(name), maxField)]
}

func priority(l logrus.Level) journal.Priority {
	switch l {
	case logrus.PanicLevel, logrus.FatalLevel:
		return journal.PriCrit
	case logrus.ErrorLevel:
		return journal.PriErr
	case logrus.WarnLevel:
		return journal.PriWarning
	case logrus.InfoLevel:
		return journal.PriInfo
	default:
		return journal.PriDebug
	}
}

// textFormatter writes an entry as one line: time, level, message, key=value….
type textFormatter struct{}

// timeFormat is RFC 3339 with milliseconds, in local time.
const timeFormat = "2006-01-02T15:04:05.000Z07:00"

func (textFormatter) Format(e *logrus.Entry) ([]byte, error) {
	b := make([]byte, 0, 256)
	b = e.Time.AppendFormat(b, timeFormat)
	b = append(b, ' ')
	level := e.Level.String()
	b = append(b, level...)
	for range 8 - len(level) {
		b = append(b, ' ')
	}
	b = append(b, escape(e.Message)...)
	for _, k := range keys(e) {
		if k != MessageID { // means something to the journal alone
			b = appendField(b, k, e.Data[k])
		}
	}
	return append(b, '\n'), nil
}

func keys(e *logrus.Entry) []string { return slices.Sorted(maps.Keys(e.Data)) }

// appendField appends " key=value", the value in quotes where it could be taken for
// more than one word.
func appendField(b []byte, key string, value any) []byte {
	b = append(append(append(b, ' '), escape(key)...), '=')
	v := text(value)
	if v == "" || strings.ContainsAny(v, ` "=`) {
		return strconv.AppendQuote(b, v)
	}
	return append(b, escape(v)...)
}

func text(value any) string {
	if s, ok := value.(string); ok {
		return s
	}
	return fmt.Sprint(value)
}

// escape writes as Go would what does not print: control characters, line and
// paragraph separators, and those that turn the direction of writing round. Bytes
// that are no UTF-8, which some terminals take for control characters, are replaced.
func escape(s string) string {
	if printableASCII(s) {
		return s
	}
	s = strings.ToValidUTF8(s, "\uFFFD")
	if strings.IndexFunc(s, unprintable) < 0 {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if unprintable(r) {
			q := strconv.QuoteRuneToASCII(r)
			b.WriteString(q[1 : len(q)-1])
		} else {
			b.WriteRune(r)
		}
	}
	return b.String()
}

func printableASCII(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

func unprintable(r rune) bool { return !unicode.IsPrint(r) }
