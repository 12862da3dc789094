package broker

import (
	"slices"
	"strconv"
	"time"

	"github.com/castrabus/castra/internal/presence"
	"github.com/castrabus/castra/internal/statefile"
	"github.com/castrabus/castra/internal/wire"
)

// A VM's file is written within a second of a handshake or a change of its
// subscriptions, and otherwise every thirty at most (contract 4).
const (
	handshakeDelay  = 400 * time.Millisecond // in which most guests subscribe, too
	handshakePeriod = 30 * time.Second
)

// vmFiles are the files about each VM's last handshake. Ten thousand guests that beat
// have one written every 3 ms, so this is most of what castrad does for idle guests.
// One goroutine writes them.
type vmFiles struct {
	files statefile.Replacer
	buf   []byte // of the file that is being written
}

func newVMFiles(dir string) vmFiles {
	return vmFiles{files: statefile.Replacer{Dir: dir, Spares: dir + ".spare", Perm: 0o640}}
}

// write replaces a VM's file.
func (f *vmFiles) write(files *statefile.Files, name string, last *presence.Last) error {
	f.buf = appendPadding(appendVMFile(f.buf[:0], name, last))
	return files.Replace(vmFile(name), f.buf)
}

// vmFileUnit is what the length of a VM's file is a multiple of. A file that is as long
// as the one before can be written over, see [statefile.Replacer], and there is a sector
// to a sector for whoever pulls the plug.
const vmFileUnit = 512

// appendPadding appends spaces behind the object, and the end of the line.
func appendPadding(b []byte) []byte {
	for (len(b)+1)%vmFileUnit != 0 {
		b = append(b, ' ')
	}
	return append(b, '\n')
}

func vmFile(name string) string { return name + ".json" }

// appendVMFile appends the object of contract 4. Times are Unix seconds.
func appendVMFile(b []byte, name string, last *presence.Last) []byte {
	b = wire.AppendString(append(b, `{"vm":`...), name)
	b = strconv.AppendInt(append(b, `,"timestamp":`...), last.Handshake.Unix(), 10)
	b = appendStrings(append(b, `,"capabilities":`...), last.Capabilities)
	if !slices.Contains(last.Capabilities, wire.CapBus) {
		return append(b, `,"bus":null}`...)
	}
	b = wire.AppendString(append(b, `,"bus":{"protocol":`...), wire.CapBus)
	b = appendStrings(append(b, `,"subscribed_topics":`...), last.Topics)
	b = appendUnix(append(b, `,"last_publish_ts":`...), last.Publish)
	b = appendUnix(append(b, `,"last_heartbeat_ts":`...), last.Heartbeat)
	b = appendUnix(append(b, `,"last_subscribe_ts":`...), last.Subscribe)
	return append(b, `}}`...)
}

func appendStrings(b []byte, all []string) []byte {
	b = append(b, '[')
	for i, s := range all {
		if i > 0 {
			b = append(b, ',')
		}
		b = wire.AppendString(b, s)
	}
	return append(b, ']')
}

// appendUnix appends t in Unix seconds, null where it is zero.
func appendUnix(b []byte, t time.Time) []byte {
	if t.IsZero() {
		return append(b, "null"...)
	}
	return strconv.AppendInt(b, t.Unix(), 10)
}
