package config

import (
	"fmt"
	"net"
	"strconv"
	"time"
)

// HostPath is where castrad looks for its configuration.
const HostPath = "/etc/castra/castrad.toml"

// Host is castrad's configuration (contract 5).
type Host struct {
	Broker HostBroker `toml:"broker"`
	Store  Store      `toml:"store"`
	Limits Limits     `toml:"limits"`
}

// HostBroker says whom castrad serves and for how long it waits.
type HostBroker struct {
	Listen           []string `toml:"listen"`            // addresses, used only where systemd passed no socket
	UnknownVMs       string   `toml:"unknown_vms"`       // "reject" or "accept"
	GuestTopics      []string `toml:"guest_topics"`      // patterns on which guests hear guests
	VMsDir           string   `toml:"vms_dir"`           // VM definitions kept as files
	HandshakeTimeout Duration `toml:"handshake_timeout"` // for the whole handshake
	SessionTimeout   Duration `toml:"session_timeout"`   // no frame for so long: the session ends
	ReachableWithin  Duration `toml:"reachable_within"`  // a VM is reachable for so long after a frame
}

// Store says where the bus keeps what, and how much.
type Store struct {
	StateDir          string   `toml:"state_dir"`
	LogDir            string   `toml:"log_dir"`
	Sync              Sync     `toml:"sync"`                // when a record is synced
	SegmentSize       Size     `toml:"segment_size"`        // of the host stream's files
	HostRetentionSize Size     `toml:"host_retention_size"` // bytes of host stream kept
	VMRetentionSize   Size     `toml:"vm_retention_size"`   // bytes kept of each VM's stream
	RetentionAge      Duration `toml:"retention_age"`       // of every stream; "0s": for ever
}

// Limits bound what guests may use.
type Limits struct {
	MaxSessions      int   `toml:"max_sessions"`
	MaxHandshakes    int   `toml:"max_handshakes"`    // unfinished at once; beyond it the oldest is closed
	MaxVMs           int   `toml:"max_vms"`           // names, where unknown ones are accepted
	MaxSubscriptions int   `toml:"max_subscriptions"` // a session
	PublishRate      int64 `toml:"publish_rate"`      // records a second and guest, sustained
	PublishBurst     int64 `toml:"publish_burst"`     // records that may come at once
	PublishBytes     Size  `toml:"publish_bytes"`     // bytes a second and guest; unset: see publishBytes
}

// DefaultHost is what holds where the configuration says nothing.
func DefaultHost() Host {
	return Host{
		Broker: HostBroker{
			Listen: []string{"127.0.0.1:7070"}, UnknownVMs: "reject", GuestTopics: []string{}, VMsDir: "/etc/castra/vms.d",
			HandshakeTimeout: Duration(5 * time.Second), SessionTimeout: Duration(60 * time.Second), ReachableWithin: Duration(45 * time.Second),
		},
		Store: Store{
			StateDir: "/var/lib/castra", LogDir: "/var/log/castra", Sync: SyncAlways,
			SegmentSize: 64 << 20, HostRetentionSize: 4 << 30, VMRetentionSize: 64 << 20, RetentionAge: Duration(720 * time.Hour),
		},
		Limits: Limits{
			MaxSessions: 20000, MaxHandshakes: 4096, MaxVMs: 20000, MaxSubscriptions: 16,
			PublishRate: 1000, PublishBurst: 2000, PublishBytes: 4 << 20,
		},
	}
}

// LoadHost reads castrad's configuration from path. The file may be missing
// only where path is the default one. checkTopic checks a pattern of
// guest_topics.
func LoadHost(path string, checkTopic func(string) error) (Host, error) {
	cfg := DefaultHost()
	set, err := load(path, path == HostPath, &cfg)
	if err != nil {
		return Host{}, err
	}
	if !set["limits.publish_bytes"] {
		cfg.Limits.PublishBytes = publishBytes(cfg.Limits.PublishRate)
	}
	if err := cfg.check(checkTopic); err != nil {
		return Host{}, fmt.Errorf("%s and its drop-ins: %w", path, err)
	}
	return cfg, nil
}

// publishBytes is the default of publish_bytes: 4 KiB a record of publish_rate,
// and never below 4 MiB, so that raising the rate alone is not undone by it.
func publishBytes(rate int64) Size {
	const most = 1 << 50
	return Size(max(4<<20, min(rate, most>>12)<<12))
}

func (c *Host) check(checkTopic func(string) error) error {
	for _, addr := range c.Broker.Listen {
		if err := checkAddress(addr); err != nil {
			return fmt.Errorf("broker.listen: %w", err)
		}
	}
	if u := c.Broker.UnknownVMs; u != "reject" && u != "accept" {
		return fmt.Errorf("broker.unknown_vms is %q; it is \"reject\" or \"accept\"", u)
	}
	for _, topic := range c.Broker.GuestTopics {
		if err := checkTopic(topic); err != nil {
			return fmt.Errorf("broker.guest_topics: %w", err)
		}
	}
	const atLeast = 64 << 10
	for _, r := range []struct {
		key        string
		value, low int64
	}{
		{"broker.handshake_timeout", int64(c.Broker.HandshakeTimeout), 1},
		{"broker.session_timeout", int64(c.Broker.SessionTimeout), 1},
		{"broker.reachable_within", int64(c.Broker.ReachableWithin), 1},
		{"store.segment_size", int64(c.Store.SegmentSize), atLeast},
		{"store.host_retention_size", int64(c.Store.HostRetentionSize), atLeast},
		{"store.vm_retention_size", int64(c.Store.VMRetentionSize), atLeast},
		{"limits.max_sessions", int64(c.Limits.MaxSessions), 1},
		{"limits.max_handshakes", int64(c.Limits.MaxHandshakes), 1},
		{"limits.max_vms", int64(c.Limits.MaxVMs), 1},
		{"limits.max_subscriptions", int64(c.Limits.MaxSubscriptions), 1},
		{"limits.publish_rate", c.Limits.PublishRate, 1},
		{"limits.publish_burst", c.Limits.PublishBurst, 1},
		{"limits.publish_bytes", int64(c.Limits.PublishBytes), atLeast},
	} {
		if r.value < r.low {
			return fmt.Errorf("%s is too small: %d, at least %d is needed", r.key, r.value, r.low)
		}
	}
	for key, dir := range map[string]string{"store.state_dir": c.Store.StateDir, "store.log_dir": c.Store.LogDir} {
		if dir == "" {
			return fmt.Errorf("%s is empty; name a directory", key)
		}
	}
	return nil
}

func checkAddress(addr string) error {
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("%q is no address; write it as 127.0.0.1:7070", addr)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return fmt.Errorf("%q has no port between 0 and 65535", addr)
	}
	return nil
}
