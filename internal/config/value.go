package config

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Duration is a time.Duration, written as "5s", "15m" or "720h".
type Duration time.Duration

// UnmarshalTOML takes a string that [time.ParseDuration] takes, of 0 or more.
func (d *Duration) UnmarshalTOML(v any) error {
	s, _ := v.(string)
	parsed, err := time.ParseDuration(s)
	if err != nil || parsed < 0 {
		return fmt.Errorf(`is %s; it must be a duration like "5s", "15m" or "720h"`, describe(v))
	}
	*d = Duration(parsed)
	return nil
}

// Std gives d as the standard library's type.
func (d Duration) Std() time.Duration { return time.Duration(d) }

// Size is a number of bytes, written as "64KiB", "64MiB", "4GiB", "1TiB" or a
// plain whole number.
type Size int64

// units are 1024 of the one before each, the first 1024 bytes.
var units = [...]string{"KiB", "MiB", "GiB", "TiB"}

// UnmarshalTOML takes a number with or without a unit, of 0 or more.
func (s *Size) UnmarshalTOML(v any) error {
	n, ok := v.(int64)
	if text, isText := v.(string); isText {
		n, ok = parseSize(text)
	}
	if !ok || n < 0 {
		return fmt.Errorf(`is %s; it must be a size like "64KiB", "64MiB" or "4GiB", or a number of bytes`, describe(v))
	}
	*s = Size(n)
	return nil
}

func parseSize(text string) (int64, bool) {
	digits, shift := text, 0
	for i, unit := range units {
		if number, ok := strings.CutSuffix(text, unit); ok {
			digits, shift = number, 10*(i+1)
		}
	}
	n, err := strconv.ParseUint(digits, 10, 63)
	if err != nil || n > math.MaxInt64>>shift {
		return 0, false
	}
	return int64(n << shift), true
}

// String writes s with the largest unit that leaves a whole number.
func (s Size) String() string {
	text := strconv.FormatInt(int64(s), 10)
	for i, unit := range units {
		if each := Size(1) << (10 * (i + 1)); s >= each && s%each == 0 {
			text = strconv.FormatInt(int64(s/each), 10) + unit
		}
	}
	return text
}

// Sync says when the event log is synced to disk: "always", before each
// acknowledgement; a duration like "1s", so often; or "never", which leaves it to
// the kernel.
type Sync string

// The words that a Sync can be beside a duration.
const (
	SyncAlways Sync = "always"
	SyncNever  Sync = "never"
)

// UnmarshalTOML takes one of the words, or a duration above 0.
func (s *Sync) UnmarshalTOML(v any) error {
	text, _ := v.(string)
	if d, err := time.ParseDuration(text); text == string(SyncAlways) || text == string(SyncNever) || err == nil && d > 0 {
		*s = Sync(text)
		return nil
	}
	return fmt.Errorf(`is %s; it must be "always", "never" or a duration like "1s"`, describe(v))
}

// Every gives 0 for always, less than 0 for never, and else the duration.
func (s Sync) Every() time.Duration {
	switch s {
	case SyncAlways:
		return 0
	case SyncNever:
		return -1
	}
	d, err := time.ParseDuration(string(s))
	if err != nil {
		return 0 // no value of UnmarshalTOML's: the safe one
	}
	return d
}
