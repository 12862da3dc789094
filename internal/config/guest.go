package config

import "fmt"

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
	Address string `toml:"address"` // the system credential castra.broker wins
}

// Identity says who the guest is.
type Identity struct {
	VM      string `toml:"vm"`       // the system credential castra.vm wins; else this; else the host name
	KeyFile string `toml:"key_file"` // the system credential castra.key wins
}

// GuestBus says what the guest's daemon does for its programs.
type GuestBus struct {
	Subscribe []string `toml:"subscribe"`  // topics always listened to; vm:self is the VM's own
	Socket    string   `toml:"socket"`     // for programs without D-Bus
	SpoolDir  string   `toml:"spool_dir"`  // what the host has not acknowledged yet
	SpoolSize Size     `toml:"spool_size"` // bytes of it; beyond it publishers are refused
}

// DefaultGuest is what holds where the configuration says nothing.
func DefaultGuest() Guest {
	return Guest{
		Broker: GuestBroker{Address: "10.0.2.2:7070"}, // QEMU's user-mode network: the host's loopback
		Bus: GuestBus{
			Subscribe: []string{}, Socket: "/run/castra-guestd/bus.sock",
			SpoolDir: "/var/lib/castra-guestd", SpoolSize: 16 << 20,
		},
	}
}

// LoadGuest reads castra-guestd's configuration from path. The file may be
// missing only where path is the default one. checkTopic checks a pattern of
// subscribe.
func LoadGuest(path string, checkTopic func(string) error) (Guest, error) {
	cfg := DefaultGuest()
	if _, err := load(path, path == GuestPath, &cfg); err != nil {
		return Guest{}, err
	}
	if err := cfg.check(checkTopic); err != nil {
		return Guest{}, fmt.Errorf("%s and its drop-ins: %w", path, err)
	}
	return cfg, nil
}

func (c *Guest) check(checkTopic func(string) error) error {
	if err := checkAddress(c.Broker.Address); err != nil {
		return fmt.Errorf("broker.address: %w", err)
	}
	for _, topic := range c.Bus.Subscribe {
		if err := checkTopic(topic); err != nil {
			return fmt.Errorf("bus.subscribe: %w", err)
		}
	}
	if c.Bus.SpoolSize < 128<<10 {
		return fmt.Errorf("bus.spool_size is too small: %d bytes, two of the largest messages take 128KiB", c.Bus.SpoolSize)
	}
	return nil
}
