package castradcmd

import (
	"os"

	"github.com/castrabus/castra/internal/broker"
	"github.com/castrabus/castra/internal/config"
	"github.com/castrabus/castra/internal/presence"
	"github.com/castrabus/castra/internal/wire"
)

func load(path string) (config.Host, error) {
	return config.LoadHost(path, func(topic string) error {
		_, err := wire.ParsePattern(topic)
		return err
	})
}

// brokerOptions turns the configuration into the broker's options.
func (d *daemon) brokerOptions() broker.Options {
	s := d.cfg.Store
	return broker.Options{
		Version: d.version, StateDir: s.StateDir, LogDir: s.LogDir, Registry: d.reg, Log: d.log,
		SyncName: string(s.Sync), SyncEvery: s.Sync.Every(), Boot: os.Getenv("CASTRA_BOOT"),
		SegmentSize: int64(s.SegmentSize), HostRetention: int64(s.HostRetentionSize),
		VMRetention: int64(s.VMRetentionSize), RetentionAge: s.RetentionAge.Std(),
		MaxHandshakes: d.cfg.Limits.MaxHandshakes, UnsentBytes: int(d.cfg.Limits.UnsentBytes), Inherit: d.stored,
		Settings: settings(d.cfg),
	}
}

// settings are the options that a reload may change.
func settings(c config.Host) broker.Settings {
	var topics []wire.Pattern
	for _, t := range c.Broker.GuestTopics {
		if p, err := wire.ParsePattern(t); err == nil { // load has checked it
			topics = append(topics, p)
		}
	}
	return broker.Settings{
		AcceptUnknown: c.Broker.UnknownVMs == "accept", GuestTopics: topics,
		HandshakeTimeout: c.Broker.HandshakeTimeout.Std(), SessionTimeout: c.Broker.SessionTimeout.Std(),
		ReachableWithin: c.Broker.ReachableWithin.Std(),
		MaxSessions:     c.Limits.MaxSessions, MaxVMs: c.Limits.MaxVMs, MaxSubscriptions: c.Limits.MaxSubscriptions,
		Rate: presence.Rate{
			Records: float64(c.Limits.PublishRate), Burst: float64(c.Limits.PublishBurst), Bytes: float64(c.Limits.PublishBytes),
		},
		HandshakeRate: presence.Rate{Records: float64(c.Limits.HandshakeRate), Burst: float64(c.Limits.HandshakeBurst), Bytes: 1},
	}
}
