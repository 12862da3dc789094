package guest

import (
	"time"

	"github.com/castrabus/castra/internal/bus"
)

// Record is a publish as it waits for the host: checked, its topics as the host
// knows them, and with an id, so that sending it twice stores it once.
type Record struct {
	Topic   string
	ID      string
	Reply   string // empty: none
	Payload []byte // compact JSON; nil is null
}

// spooled is a record of the spool, in memory.
type spooled struct {
	Record
	cost  int64
	pos   uint64    // its place in front; 0: it is in back
	seq   uint64    // its number in the spool on disk; 0: it is not there
	since time.Time // when it was published; zero: it was loaded from the disk

	done    func(result) // its publisher, who has been told nothing yet; nil: told
	sent    bool         // once at least: the host may have it
	writing bool         // on its way to the disk
	settled bool         // the host has answered for good, or the publisher was refused
}

// maxUnacknowledged is how many records may wait for the host: it remembers at
// least that many ids of each VM (contract 2), so that every retry finds its own.
const maxUnacknowledged = 65536

// recordOverhead is what a kept record counts beyond its text, in bytes: about
// what a line of the log holds beside it (docs/EVENTLOG.md), and what its
// bookkeeping costs in memory.
const recordOverhead = 160

// cost is what a record counts against spool_size: on disk never less than its
// line takes, but for a few digits.
func cost(r *Record) int64 {
	n := len(r.Topic) + len(r.ID) + len(r.Reply) + len(r.Payload) + recordOverhead
	for i := range len(r.ID) {
		if c := r.ID[i]; c < 0x20 || c >= 0x7f || c == '"' || c == '\\' {
			n += 5 // \u00xx
		}
	}
	return int64(n)
}

// How long a publisher that found the spool full is told to wait.
const (
	retryConnected = time.Second      // room comes with the next acks
	retryAway      = 10 * time.Second // room comes when the host does
)

// full refuses a record for which there is no room.
func full(reason string, retry time.Duration) *bus.Error {
	return &bus.Error{Code: bus.CodeStorageFull, Reason: reason, RetryAfter: retry}
}

// backlog is the part of the spool on disk that is not in memory: the numbers from
// next to last, in the order of the disk. It is empty where next is above last.
type backlog struct {
	next, last uint64
	bytes      int64 // what they cost
}

func (b *backlog) records() int { return int(b.last + 1 - b.next) }

func (b *backlog) empty() bool { return b.next > b.last }

// add takes in a record that was just written behind all others.
func (b *backlog) add(seq uint64, cost int64) {
	if b.empty() {
		b.next, b.bytes = seq, 0
	}
	b.last = seq
	b.bytes += cost
}

// pass goes on behind seq, whose record costs no more.
func (b *backlog) pass(seq uint64, cost int64) {
	b.next = seq + 1
	b.bytes = max(0, b.bytes-cost)
	if b.empty() {
		b.bytes = 0
	}
}
