package broker

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/castrabus/castra/internal/logging"
	"github.com/castrabus/castra/internal/presence"
	"github.com/castrabus/castra/internal/statefile"
	"github.com/castrabus/castra/internal/wire"
)

// maxVMFile is more than any VM's file takes.
const maxVMFile = 1 << 20

// past is what an earlier castrad wrote down of the VMs, as long as it is being read.
type past struct {
	recall func(vm string) error

	mu   sync.Mutex          // held while a file is read: whoever is to write it waits
	read map[string]struct{} // whose files were; nil: all
	// The files that could not be read.
	bad   int
	first error
}

// take reads what there is of vm, once. Whoever writes vm's file calls it first: a guest
// may be back before its file's turn has come.
func (p *past) take(vm string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, done := p.read[vm]; done || p.read == nil {
		return
	}
	p.read[vm] = struct{}{}
	if err := p.recall(vm); err != nil && !errors.Is(err, fs.ErrNotExist) {
		p.failed(err)
	}
}

// failed counts a file that could not be read. Call it with the lock held.
func (p *past) failed(err error) {
	if p.bad++; p.first == nil {
		p.first = err
	}
}

// remember takes in when each VM was last heard of, as the castrad before wrote it down:
// a VM that stays away after the host was started anew was not "never seen". Guests do
// not wait for it.
func (b *Broker) remember() {
	p := b.records.past
	entries, err := os.ReadDir(b.records.dir)
	for _, e := range entries {
		if b.ctx2.Err() != nil {
			return
		}
		if vm, ok := strings.CutSuffix(e.Name(), ".json"); ok && wire.ValidName(vm) {
			p.take(vm)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.read = nil
	if err != nil {
		p.failed(err)
	}
	if p.first != nil {
		logging.PresenceUnknown.On(b.log).WithError(p.first).WithField("count", p.bad).Warn("when VMs were last heard of is not known")
	}
}

// recall takes in when vm was last heard of.
func (b *Broker) recall(vm string) error {
	registered := b.registered(vm)
	if !registered && !b.settings.Load().AcceptUnknown {
		return nil
	}
	last, err := b.records.vms.read(vm)
	if err != nil {
		return err
	}
	if registered || b.opts.RetentionAge <= 0 || time.Since(last.Handshake) <= b.opts.RetentionAge {
		b.table.Remember(vm, last) // else forgetStrangers removes it
	}
	return nil
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
