package config

import (
	"fmt"
	"net"
	"path/filepath"
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
	// Listen has the TCP addresses, HOST:PORT, where guests connect. Used only
	// where systemd passed no socket. Default: 127.0.0.1:7070.
	Listen []string `toml:"listen"`
	// UnknownVMs is what becomes of names that nobody registered: "reject", the
	// default, or "accept".
	UnknownVMs string `toml:"unknown_vms"`
	// GuestTopics has the patterns of topics on which guests hear guests.
	// Default: none.
	GuestTopics []string `toml:"guest_topics"`
	// VMsDir is the directory of VM definitions kept as files; empty: none are
	// kept so. Default: /etc/castra/vms.d.
	VMsDir string `toml:"vms_dir"`
	// HandshakeTimeout bounds a whole handshake. Above 0; default 5 s.
	HandshakeTimeout Duration `toml:"handshake_timeout"`
	// SessionTimeout ends a session from which no frame came for so long. Above
	// 0; default 60 s.
	SessionTimeout Duration `toml:"session_timeout"`
	// ReachableWithin is how long after a frame a VM counts as reachable. Above
	// 0; default 45 s.
	ReachableWithin Duration `toml:"reachable_within"`
}

// Store says where the bus keeps what, and how much.
type Store struct {
	// StateDir is the directory of registrations, cursors and handshake records.
	// Default: /var/lib/castra.
	StateDir string `toml:"state_dir"`
	// LogDir is the directory of the host's and the VMs' streams. Default:
	// /var/log/castra.
	LogDir string `toml:"log_dir"`
	// Sync is when records are synced to disk. Default: SyncAlways.
	Sync Sync `toml:"sync"`
	// SegmentSize is the size in bytes of the host stream's files. At least 64
	// KiB; default 64 MiB.
	SegmentSize Size `toml:"segment_size"`
	// HostRetentionSize is how many bytes of the host stream are kept. At least
	// 64 KiB; default 4 GiB. Whole segments go, the newest never.
	HostRetentionSize Size `toml:"host_retention_size"`
	// VMRetentionSize is how many bytes are kept of each VM's stream, whose
	// segments are an eighth of it. At least 64 KiB; default 64 MiB.
	VMRetentionSize Size `toml:"vm_retention_size"`
	// RetentionAge is how long records are kept in either stream; 0: for ever.
	// Default: 720 h.
	RetentionAge Duration `toml:"retention_age"`
}

// Limits bound what guests may use. Each is at least 1.
type Limits struct {
	// MaxSessions is how many guests may be connected. Default: 20000.
	MaxSessions int `toml:"max_sessions"`
	// MaxHandshakes is how many handshakes may be unfinished; beyond it the
	// oldest is closed. Default: 4096.
	MaxHandshakes int `toml:"max_handshakes"`
	// MaxVMs is how many names are remembered where unknown ones are accepted.
	// Default: 20000.
	MaxVMs int `toml:"max_vms"`
	// MaxSubscriptions is how many subscriptions one session may have. Default:
	// 16.
	MaxSubscriptions int `toml:"max_subscriptions"`
	// PublishRate is how many records a second one guest may publish for as long
	// as it likes. Default: 1000.
	PublishRate int64 `toml:"publish_rate"`
	// PublishBurst is how many records of one guest may come at once. Default:
	// 2000.
	PublishBurst int64 `toml:"publish_burst"`
	// PublishBytes is how many bytes a second one guest may publish. At least 64
	// KiB, for the largest frame must pass. Default: 4 KiB times PublishRate, but
	// no less than 4 MiB.
	PublishBytes Size `toml:"publish_bytes"`
	// HandshakeRate is how many handshakes a second one VM may complete for as long
	// as it likes. Default: 10.
	HandshakeRate int64 `toml:"handshake_rate"`
	// HandshakeBurst is how many of one VM's may come at once. Default: 100.
	HandshakeBurst int64 `toml:"handshake_burst"`
	// UnsentBytes is how much the kernel holds of what a guest was sent and has not
	// taken; what is behind it waits in the log. At least 64 KiB; default 256 KiB.
	UnsentBytes Size `toml:"unsent_bytes"`
}

// leastSize is the least that a segment may be told to take (contract 4), and
// what the largest frame takes (contract 2).
const leastSize Size = 64 << 10

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
			HandshakeRate: 10, HandshakeBurst: 100, UnsentBytes: 256 << 10,
		},
	}
}

// LoadHost reads castrad's configuration from path and its drop-ins. The file may
// be missing only where path is HostPath. checkTopic judges a pattern of
// guest_topics. Mistakes in the files are an [Error] each, joined.
func LoadHost(path string, checkTopic func(string) error) (Host, error) {
	cfg := DefaultHost()
	from, err := load(path, path == HostPath, &cfg)
	if err != nil {
		return Host{}, err
	}
	if _, set := from["limits.publish_bytes"]; !set {
		cfg.Limits.PublishBytes = publishBytes(cfg.Limits.PublishRate)
	}
	c := checker{path: path, from: from}
	cfg.Broker.check(&c, checkTopic)
	cfg.Store.check(&c)
	cfg.Limits.check(&c)
	if err := join(c.errs); err != nil {
		return Host{}, err
	}
	return cfg, nil
}

// publishBytes is the default of publish_bytes, which grows with the rate so that
// raising the rate alone is not undone by it.
func publishBytes(rate int64) Size {
	const (
		each  = 4 << 10
		least = 4 << 20
		most  = 1 << 50 // far from overflow, and no limit any more
	)
	return Size(max(least, min(rate, most/each)*each))
}

func (b *HostBroker) check(c *checker, checkTopic func(string) error) {
	for _, addr := range b.Listen {
		c.address("broker.listen", addr, 0)
	}
	if b.UnknownVMs != "reject" && b.UnknownVMs != "accept" {
		c.refuse("broker.unknown_vms", `is %q; it must be "reject" or "accept"`, b.UnknownVMs)
	}
	c.topics("broker.guest_topics", b.GuestTopics, checkTopic)
	c.positive("broker.handshake_timeout", b.HandshakeTimeout)
	c.positive("broker.session_timeout", b.SessionTimeout)
	c.positive("broker.reachable_within", b.ReachableWithin)
}

func (s *Store) check(c *checker) {
	c.directory("store.state_dir", s.StateDir)
	c.directory("store.log_dir", s.LogDir)
	c.sizeAtLeast("store.segment_size", s.SegmentSize, leastSize)
	c.sizeAtLeast("store.host_retention_size", s.HostRetentionSize, leastSize)
	c.sizeAtLeast("store.vm_retention_size", s.VMRetentionSize, leastSize)
}

func (l *Limits) check(c *checker) {
	c.atLeastOne("limits.max_sessions", int64(l.MaxSessions))
	c.atLeastOne("limits.max_handshakes", int64(l.MaxHandshakes))
	c.atLeastOne("limits.max_vms", int64(l.MaxVMs))
	c.atLeastOne("limits.max_subscriptions", int64(l.MaxSubscriptions))
	c.atLeastOne("limits.publish_rate", l.PublishRate)
	c.atLeastOne("limits.publish_burst", l.PublishBurst)
	c.sizeAtLeast("limits.publish_bytes", l.PublishBytes, leastSize)
	c.atLeastOne("limits.handshake_rate", l.HandshakeRate)
	c.atLeastOne("limits.handshake_burst", l.HandshakeBurst)
	c.sizeAtLeast("limits.unsent_bytes", l.UnsentBytes, leastSize)
}

// Warnings lists settings that are allowed and hardly meant, a sentence each.
func (h *Host) Warnings() []string {
	var all []string
	warn := func(format string, args ...any) { all = append(all, fmt.Sprintf(format, args...)) }
	for _, addr := range h.Broker.Listen {
		if host, _, err := net.SplitHostPort(addr); err == nil && !loopback(host) {
			warn("broker.listen: %s can be reached from the network, where a VM without a key is whoever says its name", addr)
		}
	}
	if b := h.Broker; b.ReachableWithin > b.SessionTimeout {
		warn("broker.reachable_within is longer than broker.session_timeout (%v), at which a silent VM becomes unreachable anyway", b.SessionTimeout.Std())
	}
	if s := h.Store; s.HostRetentionSize < s.SegmentSize {
		warn("store.host_retention_size is less than store.segment_size (%v), and the newest segment is always kept", s.SegmentSize)
	}
	for _, d := range []struct{ key, dir string }{
		{"broker.vms_dir", h.Broker.VMsDir}, {"store.state_dir", h.Store.StateDir}, {"store.log_dir", h.Store.LogDir},
	} {
		if d.dir != "" && !filepath.IsAbs(d.dir) {
			warn("%s: %s is relative to the directory in which castrad is started", d.key, d.dir)
		}
	}
	return all
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
