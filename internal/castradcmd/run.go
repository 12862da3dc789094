// Package castradcmd is castrad's main program: it reads the configuration,
// puts the parts together and takes them down again.
package castradcmd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/broker"
	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/config"
	"github.com/castrabus/castra/internal/dbusapi"
	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/flags"
	"github.com/castrabus/castra/internal/identity"
	"github.com/castrabus/castra/internal/logging"
	"github.com/castrabus/castra/internal/sdnotify"
	"github.com/castrabus/castra/internal/token"
)

// statusInterval is how often at most the line in `systemctl status` is brought up to
// date.
const statusInterval = time.Second

// Main runs castrad with the arguments behind its name and gives its exit
// status: 0 after a clean end, 1 after a failure, 2 for wrong usage.
func Main(version string, args []string, stdout, stderr io.Writer) int {
	f, status, proceed := flags.Parse("castrad", version, config.HostPath, args, stdout, stderr)
	if !proceed {
		return status
	}
	level := logrus.InfoLevel
	if f.Debug {
		level = logrus.DebugLevel
	}
	log := logging.New(level)
	if !f.Check {
		if err := relaxTimers(); err != nil {
			log.WithError(err).Debug("castrad does without")
		}
	}
	cfg, err := load(f.Config)
	if err != nil {
		fmt.Fprintln(stderr, "castrad:", err)
		return 1
	}
	if f.Check {
		for _, w := range cfg.Warnings() {
			fmt.Fprintln(stderr, "castrad: warning:", w)
		}
		fmt.Fprintf(stdout, "%s: the configuration is good\n", f.Config)
		return 0
	}
	d := &daemon{version: version, path: f.Config, cfg: cfg, log: log, start: beginStart(), changed: make(chan struct{}, 1)}
	if err := d.run(); err != nil {
		logging.Failed.On(d.log).WithError(err).Error("castrad ends")
		return 1
	}
	return 0
}

// daemon is a running castrad.
type daemon struct {
	version string
	path    string
	cfg     config.Host // as it was at the start; of a reload the broker has what can change
	log     *logrus.Logger
	start   *starting

	stored *os.File // what the castrad before left; nil: nothing
	broker *broker.Broker
	reg    *identity.Registry
	status sdnotify.Status
	pages  []sdnotify.Passed // the health, metrics and pprof sockets

	mu  sync.Mutex
	bus string // why there is no D-Bus; empty: it is served

	changed chan struct{} // room for one token: the status line may be another
}

func (d *daemon) run() error {
	signals := make(chan os.Signal, 4) // a few in a row while one is acted on
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer signal.Stop(signals)

	noProfiles()
	d.warn(d.cfg)
	listeners, err := d.passed()
	if err != nil {
		return err
	}
	unlock, err := d.open()
	if err != nil {
		return err
	}
	defer unlock()

	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	// The name is owned before the first guest is greeted.
	api, err := dbusapi.Start(ctx, dbusapi.Options{
		Log: logrus.NewEntry(d.log), Bus: d.broker, Registry: d.broker, OnState: d.busState,
	})
	if err != nil {
		cancel()
		return errors.Join(err, d.broker.Close())
	}
	if len(listeners) == 0 {
		// Not before: whoever has seen the port open may count on castractl.
		if listeners, err = d.listen(); err != nil {
			cancel()
			api.Close()
			return errors.Join(err, d.broker.Close())
		}
	}
	d.begin(ctx, &work, listeners)
	for sig := range signals {
		if sig != syscall.SIGHUP {
			break
		}
		d.reload()
	}
	signal.Stop(signals) // a second one ends what hangs
	d.notify("STOPPING=1\nSTATUS=Ending")
	cancel()
	work.Wait()
	api.Close()
	d.handOver()
	return d.broker.Close()
}

// begin serves guests and pages, and the service manager, until ctx is done. What that
// takes is added to work.
func (d *daemon) begin(ctx context.Context, work *sync.WaitGroup, listeners []net.Listener) {
	for _, ln := range listeners {
		d.broker.Serve(ln)
		logging.Listening.On(d.log).WithField("addr", ln.Addr().String()).Info("listening for guests")
	}
	for _, p := range d.pages {
		logging.Listening.On(d.log).WithFields(logrus.Fields{"addr": p.Listener.Addr().String(), "use": p.Use}).Info("serving HTTP")
		work.Go(func() {
			if err := servePages(ctx, p, func() bus.Status { return d.broker.Status(nil) }); err != nil {
				logging.AcceptFailed.On(d.log).WithError(err).Error("a page is no longer served")
			}
		})
	}
	if err := sdnotify.Notify("READY=1"); err != nil {
		logging.NotifyFailed.On(d.log).WithError(err).Warn("cannot tell the service manager that castrad is ready")
	}
	if sdnotify.Managed() {
		work.Go(func() { d.keepStatus(ctx) })
	}
	work.Go(func() { trim(ctx, d.start) })
	if interval, ok := sdnotify.WatchdogInterval(); ok {
		work.Go(func() {
			sdnotify.RunWatchdog(ctx, interval, func(err error) { logging.WatchdogNotFed.On(d.log).WithError(err).Error("the watchdog is not fed") }, d.broker.Ping)
		})
	}
}

// warn logs what in a configuration is allowed and most likely not meant.
func (d *daemon) warn(cfg config.Host) {
	for _, w := range cfg.Warnings() {
		logging.ConfigurationDoubtful.On(d.log).Warn("configuration: " + w)
	}
}

// warnOfDisk says so where the event log is on a file system that does not keep what it
// said was synced.
func (d *daemon) warnOfDisk() {
	if dev := eventlog.Unjournaled(d.cfg.Store.LogDir); dev != "" && d.cfg.Store.Sync.Every() >= 0 {
		logging.StorageDoubtful.On(d.log).Warnf("%s is on ext4 without a journal, where a power cut may take records that were acknowledged; to give it one, unmounted: tune2fs -O has_journal /dev/%s",
			d.cfg.Store.LogDir, dev)
	}
}

// notify tells the service manager; it can do without.
func (d *daemon) notify(state string) {
	if err := sdnotify.Notify(state); err != nil {
		d.log.WithError(err).Debug("the service manager was not told")
	}
}

// passed gives the sockets that systemd passed in for guests to connect to; none:
// the configuration says where.
func (d *daemon) passed() ([]net.Listener, error) {
	passed, err := sdnotify.Listeners()
	if err != nil {
		return nil, fmt.Errorf("taking over the sockets passed in: %w", err)
	}
	var lns []net.Listener
	for _, p := range passed {
		switch p.Use {
		case sdnotify.SocketBus:
			lns = append(lns, p.Listener)
		case sdnotify.HandOver:
			d.inherit(p.Stored)
		case sdnotify.SocketPprof:
			runtime.MemProfileRate = sampleRate
			d.pages = append(d.pages, p)
		default:
			d.pages = append(d.pages, p)
		}
	}
	switch {
	case len(lns) > 0:
		d.noteOverridden(lns)
	case len(passed) > 0:
		logging.ConfigurationDoubtful.On(d.log).Warn("systemd passed sockets in, and none for guests; broker.listen decides where they connect")
	}
	return lns, nil
}

// listen opens the sockets that the configuration names.
func (d *daemon) listen() ([]net.Listener, error) {
	var lns []net.Listener
	withoutProbes := net.ListenConfig{KeepAlive: -1} // the broker wants none
	for _, addr := range d.cfg.Broker.Listen {
		ln, err := withoutProbes.Listen(context.Background(), "tcp", addr)
		if err != nil {
			for _, ln := range lns {
				err = errors.Join(err, ln.Close())
			}
			return nil, fmt.Errorf("listening for guests (broker.listen): %w", err)
		}
		lns = append(lns, ln)
	}
	if len(lns) == 0 {
		return nil, errors.New("nowhere to listen: broker.listen is empty and no socket was passed in")
	}
	return lns, nil
}

// noteOverridden says that where guests connect is not where the configuration, edited,
// has it.
func (d *daemon) noteOverridden(passed []net.Listener) {
	at := make([]string, len(passed))
	for i, ln := range passed {
		at[i] = ln.Addr().String()
	}
	listen := d.cfg.Broker.Listen
	if slices.Equal(listen, config.DefaultHost().Broker.Listen) || !slices.ContainsFunc(listen, func(addr string) bool { return !slices.Contains(at, addr) }) {
		return
	}
	logging.ConfigurationDoubtful.On(d.log).Warnf("configuration: broker.listen is %s, and systemd passed %s in, where guests connect; to change that: systemctl edit castrad.socket",
		strings.Join(listen, ", "), strings.Join(at, ", "))
}

// open opens what is on disk. unlock lets another castrad have it.
func (d *daemon) open() (unlock func(), err error) {
	s := d.cfg.Store
	// Where both are one it must not find itself at work there.
	dirs := slices.Compact([]string{filepath.Clean(s.StateDir), filepath.Clean(s.LogDir)})
	for _, dir := range dirs {
		if err := os.MkdirAll(dir, 0o750); err != nil {
			return nil, fmt.Errorf("creating castrad's directories: %w", err)
		}
	}
	d.warnOfDisk()
	var locks []*os.File
	unlock = func() {
		for _, f := range locks {
			_ = f.Close()
		}
	}
	for _, dir := range dirs {
		f, err := lock(dir)
		if err != nil {
			unlock()
			return nil, err
		}
		locks = append(locks, f)
	}
	reg, problems, err := identity.Open(filepath.Join(s.StateDir, "vms"), d.cfg.Broker.VMsDir)
	if err == nil {
		d.reg = reg
		d.complain(problems)
		d.broker, err = broker.Open(d.brokerOptions())
	}
	if err != nil {
		unlock()
		return nil, err
	}
	return unlock, nil
}

// lock makes sure that no other castrad uses dir: two writers would destroy the
// event log.
func lock(dir string) (*os.File, error) {
	path := filepath.Join(dir, ".castrad.lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking %s: %w", dir, err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("%s is in use by another castrad (%s is locked); stop that one, or name another directory in the configuration", dir, path), f.Close())
	}
	return f, nil
}

func (d *daemon) complain(problems []identity.Problem) {
	for _, p := range problems {
		logging.RegistrationIgnored.On(d.log).WithField("file", p.File).Errorf("a VM's registration is not used: %s", p.Reason)
	}
}

// reload takes the configuration in again, as far as it may change.
func (d *daemon) reload() {
	if err := sdnotify.Reloading(); err != nil {
		d.log.WithError(err).Debug("the service manager was not told")
	}
	cfg, err := load(d.path)
	if err != nil {
		logging.ConfigurationRefused.On(d.log).WithError(err).Error("the configuration is kept as it was")
	} else {
		d.noteRestart(cfg)
		d.warn(cfg)
		problems, err := d.broker.Configure(settings(cfg))
		if err != nil {
			logging.RegistrationIgnored.On(d.log).WithError(err).Error("the registry of VMs is kept as it was")
		}
		d.complain(problems)
		logging.ConfigurationRead.On(d.log).Info("the configuration was read again")
	}
	d.notify("READY=1")
}

// noteRestart says which changes a reload does not bring.
func (d *daemon) noteRestart(cfg config.Host) {
	b := cfg.Broker
	b.UnknownVMs, b.GuestTopics = d.cfg.Broker.UnknownVMs, d.cfg.Broker.GuestTopics
	b.HandshakeTimeout, b.SessionTimeout, b.ReachableWithin = d.cfg.Broker.HandshakeTimeout, d.cfg.Broker.SessionTimeout, d.cfg.Broker.ReachableWithin
	if cfg.Store != d.cfg.Store || !reflect.DeepEqual(b, d.cfg.Broker) || cfg.Limits.MaxHandshakes != d.cfg.Limits.MaxHandshakes || cfg.Limits.UnsentBytes != d.cfg.Limits.UnsentBytes {
		logging.ConfigurationDoubtful.On(d.log).Warn("changes of [store], broker.listen, broker.vms_dir, limits.max_handshakes or limits.unsent_bytes take effect at the next start: systemctl restart castrad")
	}
}

// busState takes in whether D-Bus is served.
func (d *daemon) busState(owned bool, err error) {
	d.mu.Lock()
	d.bus = ""
	if !owned && err != nil {
		d.bus = err.Error()
	}
	d.mu.Unlock()
	d.statusChanged()
	switch {
	case owned:
		logging.BusServed.On(d.log).Info("serving org.castra.Bus1 on the message bus")
	case err != nil:
		logging.BusUnavailable.On(d.log).WithError(err).Warn("no message bus: guests are served, castractl is not; trying again in the background")
	}
}

// keepStatus keeps the line in `systemctl status` true. While nothing changes it
// does not wake.
func (d *daemon) keepStatus(ctx context.Context) {
	unwatch := d.broker.Watch(func(bus.VM, bool) { d.statusChanged() })
	defer unwatch()
	for {
		if err := d.status.Set(d.statusLine()); err != nil {
			d.log.WithError(err).Debug("the service manager was not told")
			d.statusChanged() // again
		}
		select {
		case <-time.After(statusInterval): // a thousand guests that connect are one line
		case <-ctx.Done():
			return
		}
		select {
		case <-d.changed:
		case <-ctx.Done():
			return
		}
	}
}

func (d *daemon) statusChanged() { token.Leave(d.changed) }

func (d *daemon) statusLine() string {
	sessions, reachable := d.broker.Counts()
	line := fmt.Sprintf("%d guests reachable, %d sessions, %d VMs registered", reachable, sessions, d.reg.Len())
	if state := d.broker.State(); state != "running" {
		line = state + "; " + line
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.bus != "" {
		line += "; no message bus: castractl cannot be served"
	}
	return line
}
