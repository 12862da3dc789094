package broker

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/castrabus/castra/internal/logging"
	"github.com/castrabus/castra/internal/presence"
	"github.com/castrabus/castra/internal/statefile"
	"github.com/castrabus/castra/internal/wire"
)

// maxVMFile is more than any VM's file takes.
const maxVMFile = 1 << 20

// remember takes in when each VM was last heard of, as the castrad before wrote it down:
// a VM that stays away after the host was started anew was not "never seen". Guests do
// not wait for it.
func (b *Broker) remember() {
	entries, err := os.ReadDir(b.records.dir)
	bad, first := 0, err
	for _, e := range entries {
		vm, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || !wire.ValidName(vm) {
			continue
		}
		registered := b.registered(vm)
		if !registered && !b.settings.Load().AcceptUnknown {
			continue
		}
		if b.ctx2.Err() != nil {
			return
		}
		last, err := b.records.vms.read(vm)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			if bad++; first == nil {
				first = err
			}
		case !registered && b.opts.RetentionAge > 0 && time.Since(last.Handshake) > b.opts.RetentionAge:
			// forgetStrangers removes it
		default:
			b.table.Remember(vm, last)
		}
	}
	if first != nil {
		logging.PresenceUnknown.On(b.log).WithError(first).WithField("count", max(1, bad)).Warn("when VMs were last heard of is not known")
	}
}

// read is the other way round than write.
func (f *vmFiles) read(name string) (*presence.Last, error) {
	path := filepath.Join(f.files.Dir, vmFile(name))
	data, err := statefile.Read(path, maxVMFile, statefile.NoFollow)
	if err != nil {
		return nil, err
	}
	last, err := parseVMFile(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return last, nil
}

func parseVMFile(data []byte) (*presence.Last, error) {
	var file struct {
		Timestamp    int64    `json:"timestamp"`
		Capabilities []string `json:"capabilities"`
		Bus          struct {
			Publish   int64 `json:"last_publish_ts"`
			Heartbeat int64 `json:"last_heartbeat_ts"`
			Subscribe int64 `json:"last_subscribe_ts"`
		} `json:"bus"`
	}
	if err := json.Unmarshal(data, &file); err != nil {
		return nil, err
	}
	for _, at := range []int64{file.Timestamp, file.Bus.Publish, file.Bus.Heartbeat, file.Bus.Subscribe} {
		if at < 0 || at > maxUnix {
			return nil, fmt.Errorf("%d is no time", at)
		}
	}
	if file.Timestamp == 0 {
		return nil, errors.New("it has no timestamp")
	}
	return &presence.Last{
		Handshake: fromUnix(file.Timestamp), Publish: fromUnix(file.Bus.Publish),
		Heartbeat: fromUnix(file.Bus.Heartbeat), Subscribe: fromUnix(file.Bus.Subscribe),
		Capabilities: file.Capabilities,
	}, nil
}

// maxUnix is the last second of the year 9999.
const maxUnix = 253402300799

// fromUnix is the other way round than appendUnix.
func fromUnix(at int64) time.Time {
	if at == 0 {
		return time.Time{}
	}
	return time.Unix(at, 0)
}
