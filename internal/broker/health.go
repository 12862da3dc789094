package broker

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/logging"
	"github.com/castrabus/castra/internal/token"
)

// part is what of the broker can fail by itself, the worst first.
type part int

const (
	partLog part = iota
	partVMStreams
	partCursors
	parts // how many there are
)

// partWords are the parts as status, D-Bus and the journal have them.
var partWords = [parts]struct {
	name   string
	state  string // before the cause, in the state
	effect string // of its failing
	again  string // said when it works again
	broken logging.Event
	works  logging.Event
}{
	partLog: {
		"event-log", "",
		"publishes are refused, and nothing acknowledged is lost; sessions, heartbeats and replay go on",
		"the event log takes records again",
		logging.StorageDegraded, logging.StorageRecovered,
	},
	partVMStreams: {
		"vm-streams", "VM streams: ",
		"publishes are taken and acknowledged; the VMs' own streams and ids wait, and the host stream keeps all that they have still to copy, beyond its retention",
		"the VMs' streams are written again, and complete",
		logging.VMStreamsBehind, logging.VMStreamsComplete,
	},
	partCursors: {
		"cursors", "cursors: ",
		"how far guests have read is not stored: after a restart of castrad some of it would be delivered again",
		"how far guests have read is stored again",
		logging.CursorsNotStored, logging.CursorsStored,
	},
}

// health is what keeps the broker from all that it promises.
type health struct {
	mu      sync.Mutex
	faults  [parts]*fault
	changed chan struct{} // room for one token: those who watch are to be told
}

type fault struct {
	bus.Fault
	since time.Time
}

// note takes in how a part is: err is nil where it is well. It may be called
// again and again with the same; a change is logged once.
func (b *Broker) note(p part, err error) {
	w := partWords[p]
	var now *fault
	if err != nil {
		cause, effect := eventlog.Cause(err), w.effect
		if p == partLog && cause == eventlog.CauseRemoved {
			effect = "what the files had is lost, of which readers are told, and publishes are refused until castrad has a new one; sessions and heartbeats go on"
		}
		now = &fault{since: time.Now(), Fault: bus.Fault{
			Part: w.name, Cause: cause, Effect: effect, Detail: err.Error(),
			Advice: advice(cause, b.pathOf(p, err)),
		}}
	}
	h := &b.health
	h.mu.Lock()
	was := h.faults[p]
	if was != nil && now != nil {
		now.since = was.since
	}
	h.faults[p] = now
	h.mu.Unlock()
	switch {
	case now == nil && was == nil, now != nil && was != nil && now.Cause == was.Cause:
		return
	case now == nil:
		w.works.On(b.log).WithField("part", w.name).Info(w.again)
	default:
		w.broken.On(b.log).WithError(err).WithFields(logrus.Fields{"part": w.name, "reason": now.Cause}).
			Errorf("degraded: %s%s: %s. To mend it: %s", w.state, now.Cause, now.Effect, now.Advice)
	}
	token.Leave(h.changed)
}

// pathOf gives the file that err is about, or one beside it.
func (b *Broker) pathOf(p part, err error) string {
	if pe, ok := errors.AsType[*fs.PathError](err); ok && filepath.IsAbs(pe.Path) {
		return pe.Path
	}
	if p == partCursors {
		return filepath.Join(b.opts.StateDir, "cursors")
	}
	return filepath.Join(b.opts.LogDir, "bus")
}

// list gives the faults, the worst first; never nil.
func (h *health) list() []bus.Fault {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := []bus.Fault{}
	for _, f := range h.faults {
		if f != nil {
			now := f.Fault
			now.AgeMS = time.Since(f.since).Milliseconds()
			out = append(out, now)
		}
	}
	return out
}

// word says in a few words what is wrong, empty where nothing is.
func (h *health) word() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	for p, f := range h.faults {
		if f != nil {
			return partWords[p].state + f.Cause
		}
	}
	return ""
}

// advice says what an operator does about a cause, at path. It is the only place
// that does.
func advice(cause, path string) string {
	dir := filepath.Dir(path)
	switch cause {
	case eventlog.CauseFull:
		return fmt.Sprintf("%s; castrad goes on by itself", makeRoom(dir))
	case eventlog.CauseReadOnly:
		return fmt.Sprintf("see why %s is read-only: dmesg; then remount it: mount -o remount,rw \"$(findmnt -no TARGET -T %[1]s)\"; castrad goes on by itself", dir)
	case eventlog.CauseDenied:
		return fmt.Sprintf("let castrad's user write there: ls -ld %s %s; a security module may forbid it too: dmesg; castrad goes on by itself", dir, path)
	case eventlog.CauseFiles:
		return "let castrad have more files: systemctl edit castrad.service, LimitNOFILE=; see who has them: ls -l /proc/$(pidof castrad)/fd"
	case eventlog.CauseStalled:
		return fmt.Sprintf("see what keeps the disk under %s busy (a backup, a snapshot, a lost network disk): dmesg, iostat -x 1; castrad goes on by itself when it answers", dir)
	case eventlog.CauseRemoved:
		return fmt.Sprintf("leave what is under %s to castrad, which keeps as much as host_retention_size and its like say; it goes on by itself, and where the directory has gone, too, after systemctl restart castrad", dir)
	default:
		return fmt.Sprintf("look for errors of the disk under %s: dmesg, smartctl -a; castrad tries again every second, and goes on by itself", dir)
	}
}

// makeRoom says of what there is too little in dir's file system. It is asked of
// full disks only: one that does not answer would keep it waiting.
func makeRoom(dir string) string {
	for len(dir) > 1 { // what could not even be made
		var st syscall.Statfs_t
		err := syscall.Statfs(dir, &st)
		if err == nil {
			size := int64(st.Bsize) //nolint:unconvert // its type is another on other machines
			if st.Files > 0 && st.Ffree == 0 {
				return fmt.Sprintf("make room on the file system of %s: all its %d inodes are in use (df -i %[1]s), so remove files, whatever their size", dir, st.Files)
			}
			const mib = 1 << 20
			return fmt.Sprintf("make room on the file system of %s: %d of its %d MiB are free (df -h %[1]s); or keep less: host_retention_size, vm_retention_size",
				dir, int64(st.Bavail)*size/mib, int64(st.Blocks)*size/mib)
		}
		dir = filepath.Dir(dir)
	}
	return "make room on its file system (df -h, df -i)"
}
