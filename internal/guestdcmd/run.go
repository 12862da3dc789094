// Package guestdcmd is castra-guestd's main program: it reads the configuration,
// finds out who this guest is, puts the parts together and takes them down again.
package guestdcmd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/config"
	"github.com/castrabus/castra/internal/dbusapi"
	"github.com/castrabus/castra/internal/flags"
	"github.com/castrabus/castra/internal/guest"
	"github.com/castrabus/castra/internal/logging"
	"github.com/castrabus/castra/internal/sdnotify"
	"github.com/castrabus/castra/internal/token"
	"github.com/castrabus/castra/internal/wire"
)

// busPatience bounds how long readiness waits for the message bus: whoever is
// started behind this service finds the name owned, and a message bus that hangs
// does not hang the boot.
const busPatience = 2 * time.Second

// Main runs castra-guestd with the arguments behind its name and gives its exit
// status: 0 after a clean end, 1 after a failure, 2 for wrong usage.
func Main(version string, args []string, stdout, stderr io.Writer) int {
	f, status, proceed := flags.Parse("castra-guestd", version, config.GuestPath, args, stdout, stderr)
	if !proceed {
		return status
	}
	cfg, err := load(f.Config)
	if err != nil {
		fmt.Fprintln(stderr, "castra-guestd:", err)
		return 1
	}
	if f.Check {
		if cfg.Identity.VM != "" { // a credential may win over it, but it can never be right
			if _, err := (environment{}).name(cfg); err != nil {
				fmt.Fprintf(stderr, "castra-guestd: %s: %v\n", f.Config, err)
				return 1
			}
		}
		fmt.Fprintf(stdout, "%s: the configuration is good\n", f.Config)
		return 0
	}
	level := logrus.InfoLevel
	if f.Debug {
		level = logrus.DebugLevel
	}
	d := &daemon{
		version: version, path: f.Config, cfg: cfg, log: logging.New(level),
		socket:  cfg.Bus.Socket,
		env:     environment{credentials: os.Getenv("CREDENTIALS_DIRECTORY"), hostname: os.Hostname},
		changed: make(chan struct{}, 1),
	}
	if err := d.run(); err != nil {
		logging.Failed.On(d.log).WithError(err).Error("castra-guestd ends")
		return 1
	}
	return 0
}

func load(path string) (config.Guest, error) {
	return config.LoadGuest(path, func(topic string) error {
		if strings.HasPrefix(topic, wire.BrokerPrefix) {
			return fmt.Errorf("topics beginning %s are heard by the host alone", wire.BrokerPrefix)
		}
		_, err := wire.ParsePattern(topic)
		return err
	})
}

// daemon is a running castra-guestd.
type daemon struct {
	version string
	path    string
	cfg     config.Guest
	env     environment
	log     *logrus.Logger

	agent  *guest.Agent
	socket string // where the local bus is; empty: nowhere
	status sdnotify.Status
	// changed has room for one: the status line may be another.
	changed chan struct{}

	mu  sync.Mutex
	bus string // why D-Bus is not served; empty: it is, or that is not known yet
}

func (d *daemon) run() error {
	signals := make(chan os.Signal, 4) // a few in a row while one is acted on
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer signal.Stop(signals)

	id, err := d.env.resolve(d.cfg)
	if err != nil {
		return err
	}
	passed, err := d.passedSocket()
	if err != nil {
		return err
	}
	if passed != nil {
		d.socket = passed.Addr().String()
	}
	d.agent, err = guest.New(guest.Options{
		Name: id.name, Address: id.address, Key: id.key, Version: d.version,
		Subscribe: d.cfg.Bus.Subscribe, Socket: d.cfg.Bus.Socket, Listener: passed, SpoolDir: d.cfg.Bus.SpoolDir, SpoolSize: int64(d.cfg.Bus.SpoolSize),
		Log: logrus.NewEntry(d.log), OnState: d.stateChanged,
	})
	if err != nil {
		return err
	}

	// The agent ends first: what D-Bus callers still await it answers.
	working, stopWork := context.WithCancel(context.Background())
	serving, stopServing := context.WithCancel(context.Background())
	defer stopWork()
	defer stopServing()
	var agent, rest sync.WaitGroup
	agent.Go(func() { d.agent.Run(working) })
	known := make(chan struct{}) // closed once it is known whether D-Bus is served
	rest.Go(func() { d.serveBus(serving, known) })
	select {
	case <-known:
	case <-time.After(busPatience):
	}
	logging.GuestReady.On(d.log).WithFields(logrus.Fields{"name": id.name, "address": id.address, "socket": d.socket, "keyed": id.key != nil}).Info("castra-guestd is ready")
	d.notify(sdnotify.Ready)
	rest.Go(func() { d.keepStatus(serving) })
	if interval, ok := sdnotify.WatchdogInterval(); ok {
		rest.Go(func() {
			sdnotify.RunWatchdog(working, interval, func(err error) { logging.WatchdogNotFed.On(d.log).WithError(err).Error("the watchdog is not fed") }, d.agent.Probe)
		})
	}
	for sig := range signals {
		if sig != syscall.SIGHUP {
			break
		}
		d.reload()
	}
	d.notify(sdnotify.Stopping)
	stopWork()
	agent.Wait()
	stopServing()
	rest.Wait()
	return nil
}

// passedSocket gives the local bus's socket where systemd passed it in, nil where it did
// not.
func (d *daemon) passedSocket() (*net.UnixListener, error) {
	passed, err := sdnotify.Listeners()
	if err != nil {
		return nil, fmt.Errorf("taking over the sockets passed in: %w", err)
	}
	if len(passed) == 0 {
		return nil, nil
	}
	ln, err := onlySocket(passed)
	if err != nil {
		return nil, err
	}
	if at := ln.Addr().String(); d.cfg.Bus.Socket != at {
		logging.ConfigurationDoubtful.On(d.log).Warnf("configuration: bus.socket is %q, and systemd passed %q in, which is served; to change that: systemctl edit castra-guestd.socket", d.cfg.Bus.Socket, at)
	}
	return ln, nil
}

// onlySocket gives the socket where one is passed in, and of the right kind; else it closes
// all that is.
func onlySocket(passed []sdnotify.Passed) (*net.UnixListener, error) {
	ln, ok := passed[0].Listener.(*net.UnixListener)
	if len(passed) == 1 && passed[0].Use == sdnotify.SocketBus && ok {
		return ln, nil
	}
	err := errors.New("castra-guestd serves one Unix socket; see systemctl cat castra-guestd.socket for what is passed in")
	for _, p := range passed {
		err = errors.Join(err, p.Close())
	}
	return nil, err
}

// serveBus serves D-Bus until ctx is done, unless the name is somebody else's.
func (d *daemon) serveBus(ctx context.Context, known chan<- struct{}) {
	api, err := dbusapi.Start(ctx, dbusapi.Options{Log: logrus.NewEntry(d.log), Bus: d.agent, Yield: true, OnState: d.busState})
	close(known)
	if err != nil {
		if ctx.Err() == nil {
			d.busState(false, err)
		}
		return
	}
	<-ctx.Done()
	api.Close()
}

// busState takes in whether D-Bus is served, and says so.
func (d *daemon) busState(owned bool, err error) {
	why := ""
	if !owned && err != nil {
		why = err.Error()
	}
	d.mu.Lock()
	d.bus = why
	d.mu.Unlock()
	d.stateChanged()
	switch {
	case owned:
		logging.BusServed.On(d.log).Info("serving org.castra.Bus1 on the message bus")
	case errors.Is(err, dbusapi.ErrNameTaken):
		logging.BusUnavailable.On(d.log).WithField("socket", d.socket).Warn("org.castra.Bus1 is owned by another process, as on a host that is itself a VM; serving the socket alone")
	case err != nil:
		logging.BusUnavailable.On(d.log).WithError(err).WithField("socket", d.socket).Warn("no message bus: serving the socket alone; trying again in the background")
	}
}

// stateChanged makes keepStatus look. It does not wait.
func (d *daemon) stateChanged() { token.Leave(d.changed) }

// keepStatus keeps the line in `systemctl status` true.
func (d *daemon) keepStatus(ctx context.Context) {
	for {
		if err := d.status.Set(d.statusLine()); err != nil {
			d.log.WithError(err).Debug("the service manager was not told")
		}
		select {
		case <-d.changed:
		case <-ctx.Done():
			return
		}
	}
}

func (d *daemon) statusLine() string {
	line := d.agent.Summary()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.bus != "" {
		line += "; serving the socket alone: " + d.bus
	}
	return line
}

// notify tells the service manager; it can do without.
func (d *daemon) notify(state string) {
	if err := sdnotify.Notify(state); err != nil {
		d.log.WithError(err).Debug("the service manager was not told")
	}
}

// reload takes the configuration in again, as far as it may change: where the host
// is and what is always listened to.
func (d *daemon) reload() {
	if err := sdnotify.Reloading(); err != nil {
		d.log.WithError(err).Debug("the service manager was not told")
	}
	if err := d.reconfigure(); err != nil {
		logging.ConfigurationRefused.On(d.log).WithError(err).Error("the configuration is kept as it was")
	} else {
		logging.ConfigurationRead.On(d.log).Info("the configuration was read again")
	}
	d.notify(sdnotify.Ready)
}

func (d *daemon) reconfigure() error {
	cfg, err := load(d.path)
	if err != nil {
		return err
	}
	address, err := d.env.address(cfg)
	if err != nil {
		return err
	}
	if err := d.agent.Reload(address, cfg.Bus.Subscribe); err != nil {
		return err
	}
	old := d.cfg.Bus
	if cfg.Identity != d.cfg.Identity || cfg.Bus.Socket != old.Socket || cfg.Bus.SpoolDir != old.SpoolDir || cfg.Bus.SpoolSize != old.SpoolSize {
		logging.ConfigurationDoubtful.On(d.log).Warn("[identity], socket and spool are read at the start alone; restart castra-guestd to change them")
	}
	return nil
}
