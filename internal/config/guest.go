package config

// GuestPath is where castra-guestd looks for its configuration.
const GuestPath = "/etc/castra/guestd.toml"

// Guest is castra-guestd's configuration (contract 5).
type Guest struct {
	Broker   GuestBroker `toml:"broker"`
	Identity Identity    `toml:"identity"`
	Bus      GuestBus    `toml:"bus"`
}

// GuestBroker says where the host is.
type GuestBroker struct {
	// Address is the host's TCP address, HOST:PORT. The system credential
	// castra.broker wins. Default: 10.0.2.2:7070, the host's loopback as QEMU's
	// user-mode network shows it.
	Address string `toml:"address"`
}

// Identity says who the guest is.
type Identity struct {
	// VM is the guest's name on the bus. The system credential castra.vm wins;
	// empty, the default: the host name.
	VM string `toml:"vm"`
	// KeyFile is the file with the VM's key. The system credential castra.key
	// wins; empty, the default: the guest has no key.
	KeyFile string `toml:"key_file"`
}

// GuestBus says what castra-guestd does for the guest's programs.
type GuestBus struct {
	// Subscribe has the topics that are always listened to; vm:self is the VM's
	// own. Default: none.
	Subscribe []string `toml:"subscribe"`
	// Socket is the path of the Unix socket for programs without D-Bus; empty:
	// none is made. Default: /run/castra-guestd/bus.sock.
	Socket string `toml:"socket"`
	// SpoolDir is the directory of what the host has not acknowledged yet; empty:
	// memory. Default: /var/lib/castra-guestd.
	SpoolDir string `toml:"spool_dir"`
	// SpoolSize is how many bytes that may take; beyond it publishers are
	// refused. At least 128 KiB; default 16 MiB.
	SpoolSize Size `toml:"spool_size"`
}

// leastSpool holds two of the largest messages: one on its way, one waiting.
const leastSpool Size = 128 << 10

// DefaultGuest is what holds where the configuration says nothing.
func DefaultGuest() Guest {
	return Guest{
		Broker: GuestBroker{Address: "10.0.2.2:7070"},
		Bus: GuestBus{
			Subscribe: []string{}, Socket: "/run/castra-guestd/bus.sock",
			SpoolDir: "/var/lib/castra-guestd", SpoolSize: 16 << 20,
		},
	}
}

// LoadGuest reads castra-guestd's configuration from path and its drop-ins. The
// file may be missing only where path is GuestPath. checkTopic judges a pattern
// of subscribe. Mistakes in the files are an [Error] each, joined.
func LoadGuest(path string, checkTopic func(string) error) (Guest, error) {
	cfg := DefaultGuest()
	from, err := load(path, path == GuestPath, &cfg)
	if err != nil {
		return Guest{}, err
	}
	c := checker{path: path, from: from}
	if host := c.address("broker.address", cfg.Broker.Address, 1); host == "" && len(c.errs) == 0 {
		c.refuse("broker.address", `is %q; it must name the host, like "10.0.2.2:7070"`, cfg.Broker.Address)
	}
	c.topics("bus.subscribe", cfg.Bus.Subscribe, checkTopic)
	c.sizeAtLeast("bus.spool_size", cfg.Bus.SpoolSize, leastSpool)
	if err := join(c.errs); err != nil {
		return Guest{}, err
	}
	return cfg, nil
}
