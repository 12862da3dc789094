package cli

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// The grammar of moments and spans is systemd.time(7)'s, as journalctl takes it.

// A month is 30.44 days and a year 365.25, as systemd.time(7) has it.
const (
	day   = 24 * time.Hour
	week  = 7 * day
	month = 2_629_800 * time.Second
	year  = 31_557_600 * time.Second
)

// forever is the longest span there is.
const forever = time.Duration(math.MaxInt64)

var errSpan = errors.New(`no span of time: write it as 30s, 5min, "1h 30min" or 2d`)

// spanUnit gives the length of a unit of systemd.time(7); 0: no such unit. A
// number without one counts seconds.
func spanUnit(name string) time.Duration {
	switch name {
	case "usec", "us", "µs", "μs":
		return time.Microsecond
	case "msec", "ms":
		return time.Millisecond
	case "", "seconds", "second", "sec", "s":
		return time.Second
	case "minutes", "minute", "min", "m":
		return time.Minute
	case "hours", "hour", "hr", "h":
		return time.Hour
	case "days", "day", "d":
		return day
	case "weeks", "week", "w":
		return week
	case "months", "month", "M":
		return month
	case "years", "year", "y":
		return year
	}
	return 0
}

// parseSpan reads a span: numbers, each with a unit, added up. Every duration
// that Go prints down to the microsecond reads back as itself.
func parseSpan(s string) (time.Duration, error) {
	rest := strings.TrimSpace(s)
	if rest == "" {
		return 0, errSpan
	}
	var sum time.Duration
	for rest != "" {
		end := strings.IndexFunc(rest, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
		if end < 0 {
			end = len(rest)
		}
		n, err := strconv.ParseFloat(rest[:end], 64)
		if err != nil {
			return 0, errSpan
		}
		rest = strings.TrimLeft(rest[end:], " ")
		end = strings.IndexAny(rest, " 0123456789.")
		if end < 0 {
			end = len(rest)
		}
		unit := spanUnit(rest[:end])
		if unit == 0 {
			return 0, fmt.Errorf("no unit of time: %q", rest[:end])
		}
		rest = strings.TrimLeft(rest[end:], " ")
		if n > float64(math.MaxInt64/unit) || sum > forever-time.Duration(n*float64(unit)) {
			return 0, errors.New("too long a span of time")
		}
		sum += time.Duration(math.Round(n * float64(unit)))
	}
	return sum, nil
}

// spanFlag is a flag that takes a span.
type spanFlag time.Duration

func (d *spanFlag) Set(s string) error {
	span, err := parseSpan(s)
	*d = spanFlag(span)
	return err
}
func (d *spanFlag) String() string { return time.Duration(*d).String() }
func (d *spanFlag) Type() string   { return "SPAN" }

var errMoment = errors.New(`no moment: write it as "2006-01-02 15:04:05", RFC 3339, today, yesterday, now, -5min or "5min ago"`)

// parseMoment reads a moment; what it leaves out (zone, day) is now's.
func parseMoment(s string, now time.Time) (time.Time, error) {
	s = strings.TrimSpace(s)
	midnight := time.Date(now.Year(), now.Month(), now.Day(), 0, 0, 0, 0, now.Location())
	switch s {
	case "":
		return time.Time{}, errMoment
	case "now":
		return now, nil
	case "today":
		return midnight, nil
	case "yesterday":
		return midnight.AddDate(0, 0, -1), nil
	case "tomorrow":
		return midnight.AddDate(0, 0, 1), nil
	}
	if t, ok, err := parseRelative(s, now); ok {
		return t, err
	}
	if sec, ok := strings.CutPrefix(s, "@"); ok {
		n, err := strconv.ParseFloat(sec, 64)
		if err != nil || math.IsNaN(n) || math.Abs(n) > math.MaxInt32*1000 {
			return time.Time{}, errMoment
		}
		whole, frac := math.Modf(n)
		return time.Unix(int64(whole), int64(math.Round(frac*1e6))*1000).In(now.Location()), nil
	}
	return parseCalendar(s, now, midnight)
}

// parseRelative reads -SPAN, +SPAN, "SPAN ago" and "SPAN left"; ok is false when s is none of them.
func parseRelative(s string, now time.Time) (t time.Time, ok bool, err error) {
	var text string
	sign := time.Duration(1)
	before, ago := strings.CutSuffix(s, " ago")
	ahead, left := strings.CutSuffix(s, " left")
	switch {
	case ago:
		text, sign = before, -1
	case left:
		text = ahead
	case s[0] == '-':
		text, sign = s[1:], -1
	case s[0] == '+':
		text = s[1:]
	default:
		return time.Time{}, false, nil
	}
	span, err := parseSpan(text)
	if err != nil {
		return time.Time{}, true, errMoment
	}
	return now.Add(sign * span), true, nil
}

// parseCalendar reads dates and times of day, with a zone or an RFC 3339 offset
// behind them or now's zone, and with the day of the week before them, as systemctl
// and timedatectl print them.
func parseCalendar(s string, now, midnight time.Time) (time.Time, error) {
	if t, err := time.Parse(time.RFC3339Nano, s); err == nil {
		return t, nil
	}
	zone := now.Location()
	if i := strings.LastIndexByte(s, ' '); i > 0 {
		if named := zoneNamed(s[i+1:], now); named != nil {
			s, zone = s[:i], named
			y, m, d := now.In(zone).Date()
			midnight = time.Date(y, m, d, 0, 0, 0, 0, zone)
		}
	}
	if first, rest, _ := strings.Cut(s, " "); rest != "" && isWeekday(first) {
		s = rest // which day the date is is the date's to say
	}
	for _, layout := range []string{"2006-01-02 15:04:05", "2006-01-02 15:04", "2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, s, zone); err == nil {
			return t, nil // a fraction of a second is taken where seconds are
		}
	}
	for _, layout := range []string{"15:04:05", "15:04"} {
		if t, err := time.ParseInLocation(layout, s, zone); err == nil {
			y, m, d := midnight.Date()
			return time.Date(y, m, d, t.Hour(), t.Minute(), t.Second(), t.Nanosecond(), zone), nil
		}
	}
	return time.Time{}, errMoment
}

// zoneNamed gives the zone of a name: UTC, one of the time zone database, or one of
// the two that now's goes by through the year; nil: none.
func zoneNamed(name string, now time.Time) *time.Location {
	if name == "UTC" {
		return time.UTC
	}
	for _, month := range []time.Month{time.January, time.July} {
		at := time.Date(now.Year(), month, 1, 0, 0, 0, 0, now.Location())
		if short, offset := at.Zone(); short == name {
			return time.FixedZone(name, offset)
		}
	}
	if !strings.Contains(name, "/") { // as LoadLocation takes it, "" and "Local" are zones too
		return nil
	}
	zone, err := time.LoadLocation(name)
	if err != nil {
		return nil
	}
	return zone
}

func isWeekday(word string) bool {
	for day := time.Sunday; day <= time.Saturday; day++ {
		if full := day.String(); strings.EqualFold(word, full) || strings.EqualFold(word, full[:3]) {
			return true
		}
	}
	return false
}

// age writes how long ago something was, in at most nine columns; nil: never.
func age(ms *int64) string {
	if ms == nil {
		return "-"
	}
	return spanMS(*ms)
}

// spanMS writes milliseconds of the status as a span.
func spanMS(ms int64) string { return shortSpan(time.Duration(ms) * time.Millisecond) }

// shortSpan writes a span with its two largest units.
func shortSpan(d time.Duration) string {
	switch d = max(d, 0); {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dmin", d/time.Minute)
	case d < 2*day:
		return fmt.Sprintf("%dh %dmin", d/time.Hour, d%time.Hour/time.Minute)
	case d < 100*day:
		return fmt.Sprintf("%dd %dh", d/day, d%day/time.Hour)
	}
	return fmt.Sprintf("%dd", d/day)
}
