package dbusclient

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"unicode"

	"github.com/godbus/dbus/v5"

	"github.com/castrabus/castra/internal/bus"
)

// Why the daemon could not be asked. The errors that wrap them say what to do.
var (
	ErrNoBus      = errors.New("no message bus")
	ErrNotRunning = errors.New("daemon not running")
)

// cause is a complete sentence for a person, of a kind that errors.Is finds.
type cause struct {
	kind error
	text string
}

func (c *cause) Error() string { return c.text }

func (c *cause) Unwrap() error { return c.kind }

// explain turns what godbus reports into what happened, and what to do next.
func (c *Client) explain(ctx context.Context, err error) error {
	e, ok := errors.AsType[dbus.Error](err)
	if !ok {
		if ctx.Err() != nil {
			return fmt.Errorf("waiting for %s: %w", c.opts.Daemon, ctx.Err())
		}
		if !c.conn.Connected() {
			return &cause{ErrNoBus, fmt.Sprintf("the message bus at %s went away (%s); try again", c.opts.Address, err)}
		}
		return fmt.Errorf("asking %s: %w", c.opts.Daemon, err)
	}
	if name, ok := strings.CutPrefix(e.Name, busName+".Error."); ok {
		return &bus.Error{Code: codeOf(name), Reason: e.Error()}
	}
	d := c.opts.Daemon
	switch name, _ := strings.CutPrefix(e.Name, "org.freedesktop.DBus.Error."); name {
	case "ServiceUnknown", "NameHasNoOwner":
		return &cause{ErrNotRunning, fmt.Sprintf("%s is not running; start it with: systemctl start %s", d, d)}
	case "NoReply", "Disconnected":
		return &cause{ErrNotRunning, fmt.Sprintf("%s ended before it answered (%s); see: journalctl -u %s", d, e, d)}
	case "AccessDenied":
		return &bus.Error{Code: bus.CodeAccessDenied, Reason: fmt.Sprintf("the message bus does not let this user call %s (%s); its policy file, %s.conf, belongs into /usr/share/dbus-1/system.d", d, e, busName)}
	case "LimitsExceeded":
		return fmt.Errorf("asking %s: %w", d, e)
	case "UnknownMethod", "UnknownInterface", "UnknownObject":
		return fmt.Errorf("the running %s is not of this version (%w); restart it with: systemctl restart %s", d, e, d)
	default:
		if strings.HasPrefix(name, "Spawn.") || name == "TimedOut" || strings.HasPrefix(name, "org.freedesktop.systemd1.") {
			return &cause{ErrNotRunning, fmt.Sprintf("%s could not be started (%s); see: journalctl -u %s", d, e, d)}
		}
	}
	return fmt.Errorf("asking %s: %w", d, e)
}

// codeOf is the code that an error's name stands for: RateLimited is rate-limited,
// NoSuchVM no-such-vm.
func codeOf(name string) bus.Code {
	var b strings.Builder
	runes := []rune(name)
	for i, r := range runes {
		if i > 0 && unicode.IsUpper(r) {
			after := i+1 < len(runes) && unicode.IsLower(runes[i+1])
			if unicode.IsLower(runes[i-1]) || after {
				b.WriteByte('-')
			}
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return bus.Code(b.String())
}
