package config

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Duration is a time.Duration written as "5s", "720h".
type Duration time.Duration

// UnmarshalText parses what [time.ParseDuration] parses, and no sign.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil || v < 0 {
		return fmt.Errorf("%q is no duration; write it as 5s, 15m or 720h", b)
	}
	*d = Duration(v)
	return nil
}

// Std gives it as the standard library's type.
func (d Duration) Std() time.Duration { return time.Duration(d) }

// Size is a number of bytes written as "64MiB" or as a plain number.
type Size int64

// UnmarshalTOML parses a string with a unit, or an integer of bytes.
func (s *Size) UnmarshalTOML(v any) error {
	switch v := v.(type) {
	case int64:
		if v < 0 {
			return fmt.Errorf("%d is no size", v)
		}
		*s = Size(v)
		return nil
	case string:
		return s.parse(v)
	default:
		return fmt.Errorf("%v is no size; write it as \"64MiB\"", v)
	}
}

func (s *Size) parse(text string) error {
	digits, shift := text, 0
	for i, unit := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if rest, ok := strings.CutSuffix(text, unit); ok {
			digits, shift = rest, 10*(i+1)
		}
	}
	n, err := strconv.ParseInt(strings.TrimSpace(digits), 10, 64)
	if err != nil || n < 0 || n > (1<<62)>>shift {
		return fmt.Errorf("%q is no size; write it as 64KiB, 64MiB or 4GiB", text)
	}
	*s = Size(n << shift)
	return nil
}

// Sync says when the event log is synced: "always", a duration, or "never".
type Sync string

// UnmarshalText checks the word.
func (s *Sync) UnmarshalText(b []byte) error {
	*s = Sync(b)
	if *s == SyncAlways || *s == SyncNever {
		return nil
	}
	if d, err := time.ParseDuration(string(b)); err != nil || d <= 0 {
		return fmt.Errorf("%q is no sync mode; it is \"always\", \"never\" or a duration like \"1s\"", b)
	}
	return nil
}

// The words that a Sync can be beside a duration.
const (
	SyncAlways Sync = "always"
	SyncNever  Sync = "never"
)

// Every gives 0 for always, negative for never, else the duration.
func (s Sync) Every() time.Duration {
	switch s {
	case SyncAlways:
		return 0
	case SyncNever:
		return -1
	}
	d, err := time.ParseDuration(string(s))
	if err != nil { // cannot be: UnmarshalText checked it
		return 0
	}
	return d
}
