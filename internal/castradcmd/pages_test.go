package castradcmd

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/config"
	"github.com/castrabus/castra/internal/sdnotify"
)

// get serves a page with a status and gives what a client gets.
func get(t *testing.T, use string, s bus.Status) (code int, body string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1) // one value, whenever it is looked for
	go func() {
		done <- servePages(ctx, sdnotify.Passed{Use: use, Listener: ln}, func() bus.Status { return s })
	}()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	// More than there is room for, one after the other: each makes room again.
	for range maxPages + 1 {
		client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		resp, err := client.Get("http://" + ln.Addr().String() + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		code, body = resp.StatusCode, string(text)
	}
	return code, body
}

func TestHealth(t *testing.T) {
	for state, want := range map[string]struct {
		code int
		body string
	}{
		"running":                {http.StatusOK, "ok\n"},
		"degraded: disk stalled": {http.StatusServiceUnavailable, "degraded: disk stalled\n"},
		"stopping":               {http.StatusServiceUnavailable, "stopping\n"},
	} {
		code, body := get(t, sdnotify.SocketHealth, bus.Status{Broker: bus.Broker{State: state}})
		if code != want.code || body != want.body {
			t.Errorf("%s: %d %q, want %d %q", state, code, body, want.code, want.body)
		}
	}
}

func TestMetrics(t *testing.T) {
	code, body := get(t, sdnotify.SocketMetrics, bus.Status{
		Broker: bus.Broker{State: "degraded: disk full", Version: `1.0"x`, UptimeMS: 1500, Sessions: 2, Reachable: 3, Registered: 4, HeadSeq: 500, OldestSeq: 6},
		VMs:    []bus.VM{{Published: 10, RateLimited: 1, Lag: 7}, {Published: 20, RateLimited: 2, Lag: 70}},
	})
	if code != http.StatusOK {
		t.Fatalf("status %d", code)
	}
	for _, want := range []string{
		`castra_build_info{version="1.0\"x"} 1`, "castra_uptime_seconds 1.5", "castra_degraded 1", "castra_sessions 2", "castra_vms_reachable 3",
		"castra_vms_registered 4", "castra_vms_refused 0", "castra_records_total 500", "castra_oldest_record 6",
		"castra_guest_records_total 30", "castra_rate_limited_total 3", "castra_lag_records 70",
	} {
		if !strings.Contains("\n"+body, "\n"+want+"\n") {
			t.Errorf("%q is not in:\n%s", want, body)
		}
	}
	// Each line is of the format (prometheus.io/docs/instrumenting/exposition_formats).
	line := regexp.MustCompile(`^(# HELP [a-z_]+ .+|# TYPE [a-z_]+ (gauge|counter)|[a-z_]+(\{[a-z]+="([^"\\]|\\.)*"\})? [0-9.e+]+)$`)
	for l := range strings.Lines(body) {
		if !line.MatchString(strings.TrimSuffix(l, "\n")) {
			t.Errorf("%q is no line of the text format", l)
		}
	}
}

func TestOverriddenListen(t *testing.T) {
	passed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer passed.Close()
	for _, tt := range []struct {
		name   string
		listen []string
		warned bool
	}{
		{"nobody edited it", config.DefaultHost().Broker.Listen, false},
		{"edited", []string{"127.0.0.1:7171"}, true},
		{"edited to what is passed", []string{passed.Addr().String()}, false},
		{"edited to more", []string{passed.Addr().String(), "127.0.0.1:7171"}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			log := logrus.New()
			log.SetOutput(&out)
			d := &daemon{log: log, cfg: config.DefaultHost()}
			d.cfg.Broker.Listen = tt.listen
			d.noteOverridden([]net.Listener{passed})
			if got := strings.Contains(out.String(), "systemctl edit castrad.socket"); got != tt.warned {
				t.Errorf("warned: %t\n%s", got, &out)
			}
		})
	}
}
