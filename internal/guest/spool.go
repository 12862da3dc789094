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

	pos uint64 // its place in the spool, counted from 1; given by Append
}

// Spool keeps records from the moment their publisher is told so until the host
// has acknowledged them. Its methods are called by one goroutine at a time and
// must not block.
type Spool interface {
	// Append keeps the record and gives its position. The error is a *bus.Error
	// of the code storage-full where there is no room, and then nothing is kept.
	Append(r Record) (pos uint64, err error)
	// After gives the first record kept behind pos; ok is false if there is none.
	After(pos uint64) (r *Record, ok bool)
	// Release gives up everything up to and including pos.
	Release(pos uint64)
	// Size gives how many records are kept, and what they count against the limit
	// in bytes.
	Size() (records int, bytes int64)
	// Durable says whether what is kept survives the process.
	Durable() bool
}

// maxUnacknowledged is how many records may wait for the host: it remembers at
// least that many ids of each VM (contract 2), so that every retry finds its own.
const maxUnacknowledged = 65536

// recordOverhead is what a kept record counts beyond its text, in bytes: about
// what its bookkeeping costs, so that the limit bounds memory for small ones too.
const recordOverhead = 128

// memorySpool is a Spool that ends with the process.
type memorySpool struct {
	limit   int64    // bytes
	records []Record // records[0] is the oldest
	first   uint64   // position of records[0], or of the next one if there is none
	bytes   int64
}

func newMemorySpool(limit int64) *memorySpool { return &memorySpool{limit: limit, first: 1} }

func (s *memorySpool) Append(r Record) (uint64, error) {
	switch {
	case len(s.records) >= maxUnacknowledged:
		return 0, bus.Errorf(bus.CodeStorageFull, "the spool holds %d messages that the host has not taken yet, the most there may be; try again later", len(s.records))
	case s.bytes+cost(&r) > s.limit:
		return 0, bus.Errorf(bus.CodeStorageFull, "the spool is full: the host has not taken %d messages of %d bytes yet; try again later, or raise spool_size", len(s.records), s.bytes)
	}
	r.pos = s.first + uint64(len(s.records))
	s.bytes += cost(&r)
	s.records = append(s.records, r)
	return r.pos, nil
}

func (s *memorySpool) After(pos uint64) (*Record, bool) {
	i := uint64(0)
	if pos >= s.first {
		i = pos - s.first + 1
	}
	if i >= uint64(len(s.records)) {
		return nil, false
	}
	return &s.records[i], true
}

func (s *memorySpool) Release(pos uint64) {
	n := 0
	for n < len(s.records) && s.records[n].pos <= pos {
		s.bytes -= cost(&s.records[n])
		s.records[n] = Record{} // the array lives on; the payload must not
		n++
	}
	s.records = s.records[n:]
	s.first += uint64(n)
	if len(s.records) == 0 {
		s.records = nil // after a burst an idle agent is as small as before
	}
}

func (s *memorySpool) Size() (int, int64) { return len(s.records), s.bytes }

func (s *memorySpool) Durable() bool { return false }

func cost(r *Record) int64 {
	return int64(len(r.Topic)+len(r.ID)+len(r.Reply)+len(r.Payload)) + recordOverhead
}

// How long a publisher that found the spool full is told to wait.
const (
	retryConnected = time.Second      // room comes with the next acks
	retryAway      = 10 * time.Second // room comes when the host does
)
