package broker

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"sync"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/presence"
	"github.com/castrabus/castra/internal/statefile"
	"github.com/castrabus/castra/internal/wire"
)

const (
	// maxBehind is how many records the list may lie behind the log before it is written
	// for that alone: a start reads them in a few hundredths of a second.
	maxBehind = 1 << 16

	// maxRecall is how many of the newest records a start looks through at most, in half
	// a second, where the list could not be written for long.
	maxRecall = 1 << 20

	// maxReachable is more than the list of any number of VMs that there may be takes, in
	// bytes.
	maxReachable = 64 << 20
)

// announced is of which VMs the last word on [presenceTopic] is that they are reachable.
// A castrad that is killed has no time to take that back, and the next one does. The words
// are in the log; the file saves the next one from reading all of that.
type announced struct {
	path string
	log  *eventlog.Log

	mu        sync.Mutex
	reachable map[string]struct{}
	listed    uint64 // the file has what was said up to this record
	// storing: a batch of words is on its way, whose numbers are beyond before, and not in
	// reachable yet.
	storing bool
	before  uint64
}

// recall reads what the castrad before has said. After an error it may be incomplete.
func recallAnnounced(path string, log *eventlog.Log) (*announced, error) {
	a := &announced{path: path, log: log, reachable: make(map[string]struct{})}
	data, err := statefile.Read(path, maxReachable, statefile.NoFollow)
	if err == nil {
		a.reachable, a.listed, err = parseReachable(data)
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", path, err)
	}
	return a, errors.Join(err, a.replay())
}

// replay hears what was said after the list was written.
func (a *announced) replay() error {
	newest := a.log.Committed()
	first := a.listed + 1
	if newest > maxRecall {
		first = max(first, newest-maxRecall+1)
	}
	r := a.log.NewReader(first)
	defer r.Close()
	var rec eventlog.Record
	for r.Position() <= newest {
		ok, err := r.Next(&rec)
		if _, isGap := errors.AsType[*eventlog.Gap](err); isGap {
			continue
		}
		if err != nil {
			return fmt.Errorf("looking in the event log for who was reachable: %w", err)
		}
		if !ok {
			break
		}
		if string(rec.Topic) != presenceTopic || string(rec.VM) != bus.HostVM {
			continue
		}
		var word struct {
			VM    string `json:"vm"`
			State string `json:"state"`
		}
		if err := json.Unmarshal(rec.Payload, &word); err != nil {
			return fmt.Errorf("record %d of the event log: %w", rec.Seq, err)
		}
		a.say(word.VM, word.State == bus.StateReachable)
	}
	return nil
}

func (a *announced) say(vm string, reachable bool) {
	if reachable {
		a.reachable[vm] = struct{}{}
	} else {
		delete(a.reachable, vm)
	}
}

// begin is called before words are given to the log, and stored once it is known of which
// of them it has.
func (a *announced) begin() {
	a.mu.Lock()
	a.storing, a.before = true, a.log.Committed()
	a.mu.Unlock()
}

func (a *announced) stored(words []presence.Change) {
	a.mu.Lock()
	a.storing = false
	for _, c := range words {
		a.say(c.VM, c.Reachable)
	}
	a.mu.Unlock()
}

// names gives the VMs, sorted, and up to which record that is so.
func (a *announced) names() (names []string, upTo uint64) {
	a.mu.Lock()
	names = slices.AppendSeq(make([]string, 0, len(a.reachable)), maps.Keys(a.reachable))
	if upTo = a.before; !a.storing {
		upTo = a.log.Committed() // under the lock: nothing is said meanwhile
	}
	a.mu.Unlock()
	slices.Sort(names)
	return names, upTo
}

// behind tells whether a start would have much to read.
func (a *announced) behind() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.log.Committed() > a.listed+maxBehind
}

// reachableList is the file.
type reachableList struct {
	Seq       uint64   `json:"seq"` // what was said up to this record is in it
	Reachable []string `json:"reachable"`
}

// write writes the file. It is for one goroutine at a time.
func (a *announced) write() error {
	names, upTo := a.names()
	data, err := json.Marshal(reachableList{upTo, names})
	if err == nil {
		err = replace(a.path, append(data, '\n'))
	}
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.listed = upTo
	a.mu.Unlock()
	return nil
}

// parseReachable takes the file apart, without the names that are none.
func parseReachable(data []byte) (names map[string]struct{}, upTo uint64, err error) {
	names = make(map[string]struct{})
	var list reachableList
	if err := json.Unmarshal(data, &list); err != nil {
		return names, 0, err
	}
	for _, name := range list.Reachable {
		if wire.ValidName(name) && !wire.Reserved(name) {
			names[name] = struct{}{}
		}
	}
	return names, list.Seq, nil
}
