package castradcmd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/sdnotify"
)

const (
	// maxPages bounds the connections to one such socket; more wait in its
	// backlog.
	maxPages = 32
	// pageTimeout bounds a request and its answer, and how long a connection may idle.
	pageTimeout = 10 * time.Second
)

// servePages answers HTTP on a health, metrics or pprof socket until ctx is done. The
// first two wait for no guest and no disk.
func servePages(ctx context.Context, p sdnotify.Passed, status func() bus.Status) error {
	srv := &http.Server{
		ReadTimeout: pageTimeout, WriteTimeout: pageTimeout, IdleTimeout: pageTimeout, MaxHeaderBytes: 8 << 10,
		ErrorLog: log.New(io.Discard, "", 0), // what a client does wrong is the client's to see
	}
	mux := http.NewServeMux()
	switch p.Use {
	case sdnotify.SocketHealth:
		mux.HandleFunc("GET /", func(w http.ResponseWriter, _ *http.Request) { health(w, status().Broker.State) })
	case sdnotify.SocketMetrics:
		mux.HandleFunc("GET /", func(w http.ResponseWriter, _ *http.Request) { metrics(w, status()) })
	case sdnotify.SocketPprof:
		mux.Handle("GET /", profiles(srv))
	}
	srv.Handler = mux
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	// One token for each connection, maxPages in all.
	err := srv.Serve(&roomyListener{Listener: p.Listener, room: make(chan struct{}, maxPages), ctx: ctx})
	if ctx.Err() != nil || errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serving the %s socket: %w", p.Use, err)
}

// health answers 200 while all is well and 503 while it is not.
func health(w http.ResponseWriter, state string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	if state == "running" {
		fmt.Fprintln(w, "ok")
		return
	}
	w.WriteHeader(http.StatusServiceUnavailable)
	fmt.Fprintln(w, state)
}

// metrics answers with the text format of Prometheus, version 0.0.4. No VM has a line of
// its own: there may be 20,000.
func metrics(w http.ResponseWriter, s bus.Status) {
	b := s.Broker
	degraded := 0
	if strings.HasPrefix(b.State, "degraded") {
		degraded = 1
	}
	var published, limited, lag uint64
	for i := range s.VMs {
		published += s.VMs[i].Published
		limited += s.VMs[i].RateLimited
		lag = max(lag, s.VMs[i].Lag)
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	fmt.Fprintf(w, "# HELP castra_build_info The running castrad.\n# TYPE castra_build_info gauge\ncastra_build_info{version=%q} 1\n", b.Version)
	for _, m := range []struct {
		name, kind, help string
		value            any
	}{
		{"castra_uptime_seconds", "gauge", "Seconds since castrad started.", float64(b.UptimeMS) / 1000},
		{"castra_degraded", "gauge", "1 while castrad cannot do all of its work.", degraded},
		{"castra_sessions", "gauge", "Guests that are connected.", b.Sessions},
		{"castra_vms_reachable", "gauge", "VMs heard of lately.", b.Reachable},
		{"castra_vms_registered", "gauge", "VMs that are registered.", b.Registered},
		{"castra_vms_refused", "gauge", "Names turned away in the last hour.", len(s.Refused)},
		{"castra_records_total", "counter", "Records in the host stream since it began.", b.HeadSeq},
		{"castra_oldest_record", "gauge", "Number of the oldest record that is kept.", b.OldestSeq},
		{"castra_guest_records_total", "counter", "Records of guests since castrad started, of those VMs that it knows.", published},
		{"castra_rate_limited_total", "counter", "Publishes refused as too many since castrad started, of those VMs that it knows.", limited},
		{"castra_lag_records", "gauge", "Records that the slowest subscription has not passed yet.", lag},
	} {
		fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s %s\n%s %v\n", m.name, m.help, m.name, m.kind, m.name, m.value)
	}
}

// roomyListener accepts only while there is room.
type roomyListener struct {
	net.Listener
	room chan struct{}
	ctx  context.Context //nolint:containedctx // of servePages, which made it and outlives it
}

func (l *roomyListener) Accept() (net.Conn, error) {
	select {
	case l.room <- struct{}{}:
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
	conn, err := l.Listener.Accept()
	if err != nil {
		<-l.room
		return nil, err
	}
	return &roomyConn{Conn: conn, leave: sync.OnceFunc(func() { <-l.room })}, nil
}

// roomyConn makes room again when it is closed.
type roomyConn struct {
	net.Conn
	leave func()
}

func (c *roomyConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
