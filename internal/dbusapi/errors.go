package dbusapi

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/godbus/dbus/v5"

	"github.com/castrabus/castra/internal/bus"
)

// ErrNameTaken is another process that owns org.castra.Bus1 on this message bus.
var ErrNameTaken = errors.New(BusName + " is owned by another process on this message bus")

// The errors that every service gives under the same names.
const (
	errNameArgs      = "org.freedesktop.DBus.Error.InvalidArgs"
	errNameLimits    = "org.freedesktop.DBus.Error.LimitsExceeded"
	errNameObject    = "org.freedesktop.DBus.Error.UnknownObject"
	errNameInterface = "org.freedesktop.DBus.Error.UnknownInterface"
	errNameMethod    = "org.freedesktop.DBus.Error.UnknownMethod"
	errNameProperty  = "org.freedesktop.DBus.Error.UnknownProperty"
	errNameReadOnly  = "org.freedesktop.DBus.Error.PropertyReadOnly"
)

// dbusError makes an error with a standard name.
func dbusError(name, format string, args ...any) dbus.Error {
	return dbus.Error{Name: name, Body: []any{text(fmt.Sprintf(format, args...))}}
}

// ErrorName gives the D-Bus error that stands for a code: rate-limited is
// org.castra.Bus1.Error.RateLimited.
func ErrorName(code bus.Code) string {
	var b strings.Builder
	b.WriteString(BusName + ".Error.")
	for word := range strings.SplitSeq(string(code), "-") {
		switch word {
		case "":
		case "vm":
			b.WriteString("VM")
		default:
			b.WriteString(strings.ToUpper(word[:1]) + word[1:])
		}
	}
	return b.String()
}

// asDBus turns what a method returned into what its caller is sent.
func asDBus(err error) dbus.Error {
	if e, ok := errors.AsType[dbus.Error](err); ok {
		return e
	}
	e, ok := errors.AsType[*bus.Error](err)
	switch {
	case ok:
	case errors.Is(err, errTooLarge):
		return dbusError(errNameLimits, "%s; ask for fewer VMs at a time", err)
	case errors.Is(err, errDialogs):
		return dbusError(errNameLimits, "%s", err)
	case errors.Is(err, context.Canceled):
		e = bus.Errorf(bus.CodeShuttingDown, "the daemon stopped before the call was done; try again")
	default:
		e = bus.Errorf(bus.CodeInternal, "%s", err)
	}
	return dbus.Error{Name: ErrorName(e.Code), Body: []any{text(e.Reason)}}
}

// text makes s fit for a D-Bus string, which may hold neither invalid UTF-8 nor a
// NUL; a file name in an error may.
func text(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "\uFFFD")
}
