// Package logging sets logrus up for the daemons: structured entries where
// stderr is the journal, a readable line each elsewhere.
package logging

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"

	"github.com/coreos/go-systemd/v22/journal"
	"github.com/sirupsen/logrus"
)

// MessageID is the logrus field whose value becomes the journal's MESSAGE_ID.
const MessageID = "message_id"

// New gives the logger of a daemon that writes to stderr.
func New(level logrus.Level) *logrus.Logger {
	log := logrus.New()
	log.SetLevel(level)
	log.SetFormatter(textFormatter{})
	log.SetOutput(os.Stderr)
	if toJournal() {
		log.AddHook(journalHook{send: journal.Send, fallback: os.Stderr})
		log.SetOutput(io.Discard)
	}
	return log
}

// toJournal tells whether stderr is a stream to the journal: systemd sets
// JOURNAL_STREAM to its device and inode (systemd.exec(5)).
func toJournal() bool {
	dev, ino, ok := strings.Cut(os.Getenv("JOURNAL_STREAM"), ":")
	if !ok || !journal.Enabled() {
		return false
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(int(os.Stderr.Fd()), &st); err != nil {
		return false
	}
	return dev == strconv.FormatUint(st.Dev, 10) && ino == strconv.FormatUint(st.Ino, 10)
}

// journalHook sends entries to the journal with their fields.
type journalHook struct {
	send     func(message string, priority journal.Priority, vars map[string]string) error
	fallback io.Writer
}

func (journalHook) Levels() []logrus.Level { return logrus.AllLevels }

func (h journalHook) Fire(e *logrus.Entry) error {
	vars := make(map[string]string, len(e.Data)+1)
	for k, v := range e.Data {
		if k == MessageID {
			vars["MESSAGE_ID"] = fmt.Sprint(v)
		} else {
			vars[journalField(k)] = fmt.Sprint(v)
		}
	}
	vars["SYSLOG_IDENTIFIER"] = identifier()
	if err := h.send(message(e), priority(e.Level), vars); err != nil {
		// The journal is away: what was to be said must still be seen.
		line, _ := textFormatter{}.Format(e)
		_, err := h.fallback.Write(line)
		return err
	}
	return nil
}

func identifier() string { return os.Args[0][strings.LastIndexByte(os.Args[0], '/')+1:] }

// message is what stands in MESSAGE: an error belongs to it, and so does whom
// it is about, since that is all that a plain journalctl shows.
func message(e *logrus.Entry) string {
	m := e.Message
	if vm, ok := e.Data["vm"]; ok {
		m = fmt.Sprintf("%v: %s", vm, m)
	}
	if reason, ok := e.Data["reason"]; ok {
		m = fmt.Sprintf("%s (%v)", m, reason)
	}
	if err, ok := e.Data[logrus.ErrorKey]; ok {
		m = fmt.Sprintf("%s: %v", m, err)
	}
	return escape(m)
}

// journalField makes a name that journald takes: upper case, not beginning
// with an underscore (journal-fields in systemd.journal-fields(7)).
func journalField(key string) string {
	return "CASTRA_" + strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '_':
			return r
		default:
			return '_'
		}
	}, key)
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

// textFormatter writes an entry as one line that a guest cannot break out of:
// names and errors come from outside, so control characters are escaped.
type textFormatter struct{}

func (textFormatter) Format(e *logrus.Entry) ([]byte, error) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s %-7s %s", e.Time.Format(time.RFC3339), e.Level, escape(e.Message))
	keys := make([]string, 0, len(e.Data))
	for k := range e.Data {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		v := escape(fmt.Sprint(e.Data[k]))
		if strings.ContainsAny(v, " \"=") || v == "" {
			v = strconv.Quote(v)
		}
		fmt.Fprintf(&b, " %s=%s", escape(k), v)
	}
	b.WriteByte('\n')
	return b.Bytes(), nil
}

// escape writes what would not print as Go would.
func escape(s string) string {
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

func unprintable(r rune) bool { return !unicode.IsPrint(r) }
