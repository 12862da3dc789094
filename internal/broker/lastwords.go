package broker

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/presence"
	"github.com/castrabus/castra/internal/statefile"
	"github.com/castrabus/castra/internal/wire"
)

const (
	// maxBehind is how many bytes of the log the list may lie behind before it is written
	// for that alone, to whole segments: a start reads them in a fifth of a second.
	maxBehind = 64 << 20

	// listPeriod is how long it may do so where there is less.
	listPeriod = 30 * time.Second

	// recallBytes is how much of the log a start reads at most, but for the rest of a
	// segment, where the list could not be written for long.
	recallBytes = 256 << 20

	// maxReachable is more than the list of any number of VMs that there may be takes, in
	// bytes.
	maxReachable = 64 << 20
)

// lastWords is of which VMs the last word on [presenceTopic] is that they are reachable.
// A castrad that is killed has no time to take that back, and the next one does. The words
// are in the log; the file, a list, saves the next one from reading all of that.
type lastWords struct {
	path string
	log  *eventlog.Log
	// heard is the record up to which there is no word to be heard any more: the largest
	// number, but where the disk failed while a start listened. No list says that it has more.
	heard uint64

	mu        sync.Mutex
	reachable map[string]struct{}
	listed    uint64 // the list has what was said up to this record
	written   time.Time
	// storing: a batch of words is on its way, whose numbers are beyond before, and not in
	// reachable yet.
	storing bool
	before  uint64
}

// recallWords hears what the castrad before has said: the list, and the words that the log
// has behind it, in its newest most bytes, to whole segments. With the error that some of
// it may be missing it gives what there is.
func recallWords(path string, log *eventlog.Log, most int64) (*lastWords, error) {
	w := &lastWords{path: path, log: log, heard: math.MaxUint64, reachable: make(map[string]struct{}), written: time.Now()}
	data, err := statefile.Read(path, maxReachable, statefile.NoFollow)
	if err == nil {
		w.reachable, w.listed, err = parseReachable(data)
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", path, err)
	}
	newest := log.Committed()
	// The log was cut or begun anew, and its numbers come again: the list is not to vouch
	// for any.
	doubted := w.listed > newest
	if doubted {
		w.listed = 0
	}
	first := max(w.listed+1, log.NewestIn(most))
	herr := w.hear(first, newest)
	if first > w.listed+1 {
		herr = errors.Join(herr, &eventlog.Gap{From: w.listed + 1, To: first - 1})
	}
	if herr != nil {
		err = errors.Join(err, fmt.Errorf("looking in the event log for who was reachable: %w", herr))
	}
	if doubted {
		err = errors.Join(err, w.write())
	}
	return w, err
}

// hear takes in the words among the records from first to newest. The error tells of the
// first that are not to be had any more, or cannot be read just now.
func (w *lastWords) hear(first, newest uint64) (missed error) {
	r := w.log.NewReader(first)
	defer r.Close()
	var rec eventlog.Record
	for r.Position() <= newest {
		at := r.Position()
		ok, err := r.Next(&rec)
		if _, isGap := errors.AsType[*eventlog.Gap](err); isGap {
			missed = cmp.Or(missed, err)
			continue
		}
		if err != nil {
			w.heard = at - 1
			return err
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
		if json.Unmarshal(rec.Payload, &word) == nil { // else it is none, whoever wrote it
			w.say(word.VM, word.State == bus.StateReachable)
		}
	}
	return missed
}

func (w *lastWords) say(vm string, reachable bool) {
	if reachable {
		w.reachable[vm] = struct{}{}
	} else {
		delete(w.reachable, vm)
	}
}

// begin is called before words are given to the log, and stored once it is known of which
// of them it has.
func (w *lastWords) begin() {
	w.mu.Lock()
	w.storing, w.before = true, w.log.Committed()
	w.mu.Unlock()
}

func (w *lastWords) stored(words []presence.Change) {
	w.mu.Lock()
	w.storing = false
	for _, c := range words {
		w.say(c.VM, c.Reachable)
	}
	w.mu.Unlock()
}

// names gives the VMs, sorted, and up to which record that is so.
func (w *lastWords) names() (names []string, upTo uint64) {
	w.mu.Lock()
	names = slices.AppendSeq(make([]string, 0, len(w.reachable)), maps.Keys(w.reachable))
	if upTo = w.before; !w.storing {
		upTo = w.log.Committed() // under the lock: nothing is said meanwhile
	}
	w.mu.Unlock()
	slices.Sort(names)
	return names, min(upTo, w.heard)
}

// behind tells whether a start would have much to read.
func (w *lastWords) behind() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	newest := min(w.log.Committed(), w.heard)
	return newest > w.listed && (time.Since(w.written) >= listPeriod || w.log.NewestIn(maxBehind) > w.listed+1)
}

// reachableList is the file.
type reachableList struct {
	Seq       uint64   `json:"seq"` // what was said up to this record is in it
	Reachable []string `json:"reachable"`
}

// write writes the file. It is for one goroutine at a time.
func (w *lastWords) write() error {
	names, upTo := w.names()
	w.mu.Lock()
	w.written = time.Now() // also where it fails: not again at once
	w.mu.Unlock()
	data, err := json.Marshal(reachableList{upTo, names})
	if err == nil {
		err = replace(w.path, append(data, '\n'))
	}
	if err != nil {
		return err
	}
	w.mu.Lock()
	w.listed = upTo
	w.mu.Unlock()
	return nil
}

// parseReachable takes the file apart, without the names that are none.
func parseReachable(data []byte) (names map[string]struct{}, upTo uint64, err error) {
	names = make(map[string]struct{})
	var list reachableList
	if json.Unmarshal(data, &list.Reachable) != nil { // as castrad wrote it before it noted a number
		list.Reachable = nil
		err = json.Unmarshal(data, &list)
	}
	if err != nil {
		return names, 0, err
	}
	for _, name := range list.Reachable {
		if wire.ValidName(name) && !wire.Reserved(name) {
			names[name] = struct{}{}
		}
	}
	return names, list.Seq, nil
}
