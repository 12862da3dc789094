package presence

import (
	"sync/atomic"
	"time"
)

// VM is what is known of one VM. Its methods may be called by anybody.
type VM struct {
	name  string
	table *Table

	// When last, in ns since the table began; 0: never.
	frame, publish, heartbeat, limitedAt atomic.Int64
	silent                               atomic.Bool // the sweep found it so
	published, limited                   atomic.Uint64

	// Limit is its share of what the broker takes, and Frames of what it looks at,
	// kept across its sessions.
	Limit, Frames Bucket
	searching     atomic.Bool

	// Under the table's lock:
	reachable    bool
	reason       string
	session      Session
	remote       string
	caps         []string
	topics       []string
	handshake    time.Time // with the monotonic clock; zero: never
	subscribed   time.Time // the last change of its subscriptions
	recorded     int64     // when what there is of it was taken to be written down; 0: never
	beatRecorded bool      // a heartbeat was in it
	handshakeOK  bool      // reachable by a handshake-only guest's word
	known        bool      // registered: kept however many names there are
	forgotten    bool      // goes when its session does
	pace         Bucket    // of its handshakes
	rivals       rivalry
}

// Heard notes that a frame arrived.
func (v *VM) Heard() {
	v.frame.Store(v.table.now())
	if v.silent.Load() {
		v.table.awake(v)
	}
}

// Heartbeat notes a heartbeat frame.
func (v *VM) Heartbeat() { v.heartbeat.Store(v.table.now()) }

// Published notes n records accepted from the VM.
func (v *VM) Published(n int) {
	v.publish.Store(v.table.now())
	v.published.Add(uint64(n))
}

// Limited notes a publish refused for its rate.
func (v *VM) Limited() {
	v.limitedAt.Store(v.table.now())
	v.limited.Add(1)
}

// Search tells whether the VM may search the log: only where it is not doing so
// already, be it for a session that has ended. SearchDone must follow.
func (v *VM) Search() bool { return v.searching.CompareAndSwap(false, true) }

// SearchDone tells that the search is over.
func (v *VM) SearchDone() { v.searching.Store(false) }

// Name gives the VM's name.
func (v *VM) Name() string { return v.name }
