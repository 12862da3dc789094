package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/logging"
	"github.com/castrabus/castra/internal/presence"
	"github.com/castrabus/castra/internal/statefile"
	"github.com/castrabus/castra/internal/token"
)

const (
	// Contract 4: the event files are rotated at 16 MiB, four kept.
	eventFileSize = 16 << 20
	eventFileKeep = 4

	// eventQueue is how many records of handshakes and troubles may wait while
	// the disk is slow: ten thousand guests connecting at once fit. Beyond it
	// they are counted and dropped; a handshake never waits for a disk.
	eventQueue = 1 << 14
)

// event is a line for one of the event files.
type event struct {
	bus  bool // bus-events.jsonl, else handshake-events.jsonl
	body any
}

// recorder writes the files that tell of handshakes. One goroutine does it, so
// that neither a guest nor a status ever waits for the disk.
type recorder struct {
	dir   string
	vms   vmFiles
	table *presence.Table
	log   *logrus.Logger
	past  *past // nil: there is none
	words *lastWords

	events chan event    // see eventQueue
	wake   chan struct{} // room for one token: a VM's file is due

	mu      sync.Mutex
	due     map[string]struct{}
	free    map[string]struct{} // due, the next time: empty, and has grown already
	failing map[string]struct{} // those whose files could not be written
	tried   time.Time           // when the last of those was
	list    bool                // the list of who was announced is due
	dropped int

	// Of who writes: see note.
	failed  int   // writes since the journal was told
	failure error // of the last of them
	told    time.Time
}

func openRecorder(dir string, table *presence.Table, log *logrus.Logger) (*recorder, error) {
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return nil, fmt.Errorf("creating the handshakes' directory: %w", err)
	}
	return &recorder{
		dir: dir, vms: newVMFiles(dir), table: table, log: log,
		events: make(chan event, eventQueue), wake: make(chan struct{}, 1),
		due: make(map[string]struct{}), free: make(map[string]struct{}),
		failing: make(map[string]struct{}),
	}, nil
}

// event records a line. It does not wait.
func (r *recorder) event(e event) {
	select {
	case r.events <- e:
	default:
		r.mu.Lock()
		r.dropped++
		r.mu.Unlock()
	}
}

// handshake makes the VMs' files due.
func (r *recorder) handshake(vms ...string) {
	if len(vms) == 0 {
		return
	}
	r.mu.Lock()
	for _, vm := range vms {
		r.due[vm] = struct{}{}
	}
	r.mu.Unlock()
	token.Leave(r.wake)
}

// listDue makes the list of who was announced as reachable due.
func (r *recorder) listDue() {
	r.mu.Lock()
	r.list = true
	r.mu.Unlock()
	token.Leave(r.wake)
}

// run writes until ctx is done, and then what is left. That is to be when all is announced
// that can be.
func (r *recorder) run(ctx context.Context) {
	files := [2]*rotated{
		{path: filepath.Join(r.dir, "handshake-events.jsonl"), log: r.log},
		{path: filepath.Join(r.dir, "bus-events.jsonl"), log: r.log},
	}
	soon := time.NewTimer(time.Hour)
	soon.Stop()
	armed := false
	for {
		select {
		case e := <-r.events:
			r.note(r.append(files, e))
		case <-r.wake:
			if !armed {
				soon.Reset(handshakeDelay)
				armed = true
			}
		case <-soon.C:
			armed = false
			r.writeDue()
		case <-ctx.Done():
			for len(r.events) > 0 {
				r.note(r.append(files, <-r.events))
			}
			r.listDue()
			r.writeDue()
			for _, f := range files {
				r.note(f.close())
			}
			return
		}
	}
}

// append writes e and whatever else is queued, a write a file.
func (r *recorder) append(files [2]*rotated, e event) error {
	var lines [2][]byte
	for n := 0; ; n++ {
		i := 0
		if e.bus {
			i = 1
		}
		line, err := json.Marshal(e.body)
		if err != nil {
			return err
		}
		lines[i] = append(append(lines[i], line...), '\n')
		if n >= eventQueue/8 || len(r.events) == 0 {
			break
		}
		e = <-r.events
	}
	return errors.Join(files[0].write(lines[0]), files[1].write(lines[1]))
}

// note takes in how a file was written, and tells the journal of what was not: at most
// once in limitLogInterval, since a full disk refuses the files of ten thousand VMs one
// by one.
func (r *recorder) note(err error) {
	if err != nil {
		r.failed++
		r.failure = err
	}
	if !r.told.IsZero() && time.Since(r.told) < limitLogInterval {
		return
	}
	r.mu.Lock()
	dropped := r.dropped
	r.dropped = 0
	r.mu.Unlock()
	if r.failed > 0 {
		logging.HandshakesNotRecorded.On(r.log).WithError(r.failure).WithField("count", r.failed).Error("cannot record handshakes")
		r.failed, r.told = 0, time.Now()
	}
	if dropped > 0 {
		logging.HandshakesNotRecorded.On(r.log).WithField("count", dropped).Warn("handshakes were not recorded: the disk is too slow")
		r.told = time.Now()
	}
}

// refresh makes the files due that have fallen behind. Call it every second or so.
func (r *recorder) refresh() {
	r.handshake(r.table.Unrecorded(handshakePeriod)...)
	r.handshake(r.again()...)
	if r.words.behind() {
		r.listDue()
	}
}

// again gives the VMs whose files could not be written a period ago: of one that is gone
// nothing else would make its file due, and that would go on telling of a session.
func (r *recorder) again() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.failing) == 0 || time.Since(r.tried) < handshakePeriod {
		return nil
	}
	names := slices.Collect(maps.Keys(r.failing))
	clear(r.failing)
	return names
}

func (r *recorder) writeDue() {
	r.mu.Lock()
	due, list := r.due, r.list
	r.due, r.list = r.free, false
	r.mu.Unlock()
	if list { // before ten thousand others
		r.note(r.words.write())
	}
	if len(due) > 0 {
		r.writeVMs(due)
	}
	r.mu.Lock()
	if len(due) > 0 {
		r.tried = time.Now()
		maps.Copy(r.failing, due)
		clear(due)
	}
	r.mu.Unlock()
	r.free = due
}

// writeVMs writes the VMs' files and takes those that it has written off due.
func (r *recorder) writeVMs(due map[string]struct{}) {
	files, err := r.vms.files.Open()
	if err != nil {
		r.note(err)
		return
	}
	for name := range due {
		if r.past != nil {
			r.past.take(name)
		}
		var err error
		last, ok := r.table.Record(name)
		switch {
		case !ok: // forgotten: names that come once must not leave files for ever
			err = files.Remove(vmFile(name))
		case !last.Handshake.IsZero():
			err = r.vms.write(files, name, &last)
		}
		if r.note(err); err == nil {
			delete(due, name)
		}
	}
	r.note(files.Close())
}

// replace is [eventlog.Replace] where somebody may have made a directory of that name.
func replace(path string, data []byte) error {
	err := eventlog.Replace(eventlog.OS, path, data)
	if errors.Is(err, syscall.EISDIR) || errors.Is(err, fs.ErrExist) {
		if _, err = statefile.SetAside(path); err == nil {
			err = eventlog.Replace(eventlog.OS, path, data)
		}
	}
	return err
}

func orEmpty(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}

// handshakeEvent is a line about a handshake. suppressed is how many more like it
// there were that have no line of their own.
func handshakeEvent(vm string, caps []string, outcome, reason, remote string, suppressed int) event {
	return event{body: struct {
		Timestamp    int64    `json:"timestamp"`
		VM           string   `json:"vm"`
		Capabilities []string `json:"capabilities"`
		Kind         string   `json:"session_kind"`
		Outcome      string   `json:"session_outcome"`
		Reason       string   `json:"reason,omitempty"`
		Remote       string   `json:"remote_addr"`
		Suppressed   int      `json:"suppressed,omitempty"`
	}{time.Now().Unix(), vm, orEmpty(caps), "guest", outcome, reason, remote, suppressed}}
}

func busEvent(vm, session, reason, action, detail string, suppressed int) event {
	return event{bus: true, body: struct {
		Timestamp int64  `json:"timestamp"`
		VM        string `json:"vm"`
		Session   string `json:"session"`
		Reason    string `json:"reason"`
		Action    string `json:"action"`
		Detail    string `json:"detail,omitempty"`

		Suppressed int `json:"suppressed,omitempty"`
	}{time.Now().Unix(), vm, session, reason, action, detail, suppressed}}
}
