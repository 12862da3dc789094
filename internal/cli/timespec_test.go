package cli

import (
	"strings"
	"testing"
	"time"
)

func TestParseSpan(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"0":             0,
		"5":             5 * time.Second,
		"30s":           30 * time.Second,
		"1.5s":          1500 * time.Millisecond,
		"100ms":         100 * time.Millisecond,
		"7us":           7 * time.Microsecond,
		"7µs":           7 * time.Microsecond,
		"5min":          5 * time.Minute,
		"5m":            5 * time.Minute,
		"1h 30min":      90 * time.Minute,
		"1h30m":         90 * time.Minute,
		"1m30s":         90 * time.Second,
		" 2 hours ":     2 * time.Hour,
		"2d":            48 * time.Hour,
		"1week":         7 * 24 * time.Hour,
		"1M":            2_629_800 * time.Second,
		"1y":            31_557_600 * time.Second,
		"1day 1second ": 24*time.Hour + time.Second,
	} {
		got, err := parseSpan(text)
		if err != nil || got != want {
			t.Errorf("parseSpan(%q) = %v, %v; want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", " ", "s", "-5s", "5parsec", "1..5s", ".", "5 5x", "99999999y", "300y", "200y 200y", "1e3s", "0x5s", "5S"} {
		if got, err := parseSpan(text); err == nil {
			t.Errorf("parseSpan(%q) = %v, want an error", text, got)
		}
	}
}

func TestParseMoment(t *testing.T) {
	berlin := time.FixedZone("CET", 3600)
	now := time.Date(2026, 3, 4, 5, 6, 7, 0, berlin)
	for text, want := range map[string]string{
		"now":                           "2026-03-04T05:06:07+01:00",
		"today":                         "2026-03-04T00:00:00+01:00",
		"yesterday":                     "2026-03-03T00:00:00+01:00",
		"tomorrow":                      "2026-03-05T00:00:00+01:00",
		"-5min":                         "2026-03-04T05:01:07+01:00",
		"-1h 30min":                     "2026-03-04T03:36:07+01:00",
		"+2h":                           "2026-03-04T07:06:07+01:00",
		"5min ago":                      "2026-03-04T05:01:07+01:00",
		"5 minutes ago":                 "2026-03-04T05:01:07+01:00",
		"1h left":                       "2026-03-04T06:06:07+01:00",
		"2026-02-03":                    "2026-02-03T00:00:00+01:00",
		"2026-02-03 04:05":              "2026-02-03T04:05:00+01:00",
		"2026-02-03 04:05:06":           "2026-02-03T04:05:06+01:00",
		"2026-02-03 04:05:06.25":        "2026-02-03T04:05:06.25+01:00",
		"2026-02-03 04:05:06 UTC":       "2026-02-03T04:05:06Z",
		"2026-02-03 04:05:06 CET":       "2026-02-03T04:05:06+01:00",
		"Tue 2026-02-03 04:05:06 CET":   "2026-02-03T04:05:06+01:00",
		"Tue 2026-02-03 04:05:06 UTC":   "2026-02-03T04:05:06Z",
		"tuesday 2026-02-03":            "2026-02-03T00:00:00+01:00",
		"2026-02-03T04:05:06":           "2026-02-03T04:05:06+01:00",
		"2026-02-03T04:05:06Z":          "2026-02-03T04:05:06Z",
		"2026-02-03T04:05:06.123-07:00": "2026-02-03T04:05:06.123-07:00",
		"04:05":                         "2026-03-04T04:05:00+01:00",
		"04:05:06":                      "2026-03-04T04:05:06+01:00",
		"04:05 UTC":                     "2026-03-04T04:05:00Z",
		"@0":                            "1970-01-01T01:00:00+01:00",
		"@1700000000.5":                 "2023-11-14T23:13:20.5+01:00",
	} {
		got, err := parseMoment(text, now)
		if err != nil || got.Format(time.RFC3339Nano) != want {
			t.Errorf("parseMoment(%q) = %v, %v; want %v", text, got.Format(time.RFC3339Nano), err, want)
		}
	}
	for _, text := range []string{"", "soon", "5min", "-", "+", " ago", "-5parsec", "2026-13-01", "2026-02-30", "25:00", "@", "@x", "@nan", "@1e300", "--5min", "2026-02-03 04", "today 5:00", "Tue", "Tue now", "2026-02-03 PST", "2026-02-03 Local", "2026-02-03 ../UTC", " UTC"} {
		if got, err := parseMoment(text, now); err == nil {
			t.Errorf("parseMoment(%q) = %v, want an error", text, got)
		}
	}
}

// Midnight and relative spans on the day the clock is put forward.
func TestParseMomentDaylightSaving(t *testing.T) {
	paris, err := time.LoadLocation("Europe/Paris")
	if err != nil {
		t.Skip("no time zones here:", err)
	}
	now := time.Date(2026, 3, 29, 12, 0, 0, 0, paris) // 02:00 became 03:00
	for text, want := range map[string]string{
		"today":     "2026-03-29T00:00:00+01:00",
		"yesterday": "2026-03-28T00:00:00+01:00",
		"-10h":      "2026-03-29T01:00:00+01:00",
		"04:00":     "2026-03-29T04:00:00+02:00",

		"Tue 2026-02-03 04:05:06 CET":         "2026-02-03T04:05:06+01:00",
		"Sat 2026-08-01 04:05:06 CEST":        "2026-08-01T04:05:06+02:00",
		"2026-08-01 04:05:06 America/Toronto": "2026-08-01T04:05:06-04:00",
		"23:30 America/Toronto":               "2026-03-29T23:30:00-04:00",
	} {
		got, err := parseMoment(text, now)
		if err != nil || got.Format(time.RFC3339) != want {
			t.Errorf("parseMoment(%q) = %v, %v; want %v", text, got.Format(time.RFC3339), err, want)
		}
	}
}

func FuzzParseMoment(f *testing.F) {
	for _, seed := range []string{"now", "-5min", "5min ago", "@1.5", "2026-02-03 04:05:06.25 UTC", "04:05", "1h 30min", "999999999999999999y"} {
		f.Add(seed)
	}
	now := testNow()
	f.Fuzz(func(t *testing.T, text string) {
		if d, err := parseSpan(text); err == nil && d < 0 {
			t.Errorf("parseSpan(%q) = %v, a negative span", text, d)
		}
		got, err := parseMoment(text, now)
		if err != nil {
			return
		}
		if strings.HasSuffix(text, " ago") && got.After(now) {
			t.Errorf("parseMoment(%q) = %v, which is not ago", text, got)
		}
	})
}

func TestAge(t *testing.T) {
	if got := age(nil); got != "-" {
		t.Errorf("age of never: %q", got)
	}
	for seconds, want := range map[int64]string{
		-1: "0s", 0: "0s", 59: "59s", 60: "1min", 3599: "59min", 3600: "1h 0min",
		47*3600 + 59*60: "47h 59min", 48 * 3600: "2d 0h", 99*86400 + 82800: "99d 23h", 100 * 86400: "100d",
	} {
		if got := age(ms(seconds)); got != want {
			t.Errorf("age of %d s: %q, want %q", seconds, got, want)
		}
	}
}
