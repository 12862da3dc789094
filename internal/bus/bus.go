// Package bus holds the vocabulary that the daemons, their D-Bus service and
// castractl share: what may be asked of a bus and what it answers. It has no
// behaviour beyond formatting and depends on nothing, so that every layer may
// import it.
package bus

import (
	"fmt"
	"time"
)

// HostVM is the sender name of what the host itself publishes. No guest may
// bear it, in any case (contract: `host` is reserved).
const HostVM = "host"

// Code names why a request was refused. The wire, D-Bus and the command line
// use the same word; only its spelling differs (bad-topic, …Error.BadTopic).
type Code string

// The codes a publish or a subscription may be refused with on the wire.
const (
	CodeBadTopic             Code = "bad-topic"
	CodeForbidden            Code = "forbidden"
	CodeTooManySubscriptions Code = "too-many-subscriptions"
	CodeRateLimited          Code = "rate-limited"
	CodeStorageFull          Code = "storage-full"
	CodeUnsupportedType      Code = "unsupported-type"
	CodeTooLarge             Code = "too-large"
	CodeStorageStalled       Code = "storage-stalled"
	CodeBadFrame             Code = "bad-frame"
)

// The codes that only D-Bus callers meet.
const (
	CodeNoSuchVM     Code = "no-such-vm"
	CodeVMExists     Code = "vm-exists"
	CodePortTaken    Code = "port-taken" // by another VM's forward
	CodeInvalidName  Code = "invalid-name"
	CodeInvalidArg   Code = "invalid-argument"
	CodeAccessDenied Code = "access-denied"
	CodeNoAck        Code = "no-ack"
	CodeShuttingDown Code = "shutting-down"
	CodeNotHere      Code = "not-supported" // e.g. `vm add` asked of a guest's daemon, `vm remove` of a VM kept as a file
	CodeInternal     Code = "internal"
)

// Error is a refusal that its receiver is meant to see.
type Error struct {
	Code       Code
	Reason     string        // one sentence: what happened, to what, what to do next
	RetryAfter time.Duration // 0: retrying unchanged will not help
}

// Error gives the code and the reason in one line.
func (e *Error) Error() string { return string(e.Code) + ": " + e.Reason }

// Errorf makes an Error with a formatted reason.
func Errorf(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Reason: fmt.Sprintf(format, args...)}
}

// PublishRequest is one message to be stored and delivered.
type PublishRequest struct {
	Topic   string
	Payload []byte // one JSON value; stored without insignificant white space
	ID      string // makes a retry safe; empty: none
	Reply   string // the topic on which an answer is awaited; empty: none
}

// TailRequest selects the records that a tail shows. A record must match VM and
// one of Topics, where they are given. At most one of Lines, All, From and Since
// says where to begin; with none of them only new records are shown.
type TailRequest struct {
	Topics []string  // patterns; none: every record
	VM     string    // only what this VM published and what was sent to vm:<VM>
	Lines  uint64    // begin with the last Lines matching records
	All    bool      // begin with the oldest record kept
	From   uint64    // begin with this sequence number
	Since  time.Time // begin with the first record at or after this time
	Until  time.Time // leave out records after this time, and end there
	Follow bool      // go on with new records; otherwise end at the newest
}

// Status is what `castractl status --json` prints; its keys are never renamed.
type Status struct {
	Broker  Broker    `json:"broker"`
	VMs     []VM      `json:"vms"`
	Refused []Refused `json:"refused"`
}

// Broker describes the daemon that answered.
type Broker struct {
	Kind       string   `json:"kind"` // "host" (castrad) or "guest" (castra-guestd)
	Version    string   `json:"version"`
	State      string   `json:"state"`  // "running", "degraded: <why>", "stopping"; guest: also "connecting", "refused: <why>"
	Faults     []Fault  `json:"faults"` // all that makes it degraded, the worst first; empty: nothing does
	PID        int      `json:"pid"`
	UptimeMS   int64    `json:"uptime_ms"`
	Listen     []string `json:"listen"` // the listeners' addresses; guest: the host's address
	LogDir     string   `json:"log_dir"`
	StateDir   string   `json:"state_dir"`
	UnknownVMs string   `json:"unknown_vms"` // "reject" or "accept"
	Sync       string   `json:"sync"`        // as configured: "always", "1s", "never"
	HeadSeq    uint64   `json:"head_seq"`    // newest durable record; 0: none yet
	OldestSeq  uint64   `json:"oldest_seq"`  // oldest record kept; 0: none
	Sessions   int      `json:"sessions"`
	Registered int      `json:"registered"`
	Reachable  int      `json:"reachable"`
	SpoolCount int      `json:"spool_count"` // guest: publishes not yet acknowledged by the host
	SpoolBytes int64    `json:"spool_bytes"`
	// SpoolDurable says of a guest whether its spool is on disk: what its publishers
	// were told is kept then survives a power cut. nil: this is a host.
	SpoolDurable *bool `json:"spool_durable,omitempty"`
	// SpoolReason says why it is not on disk, or why the disk takes nothing just now.
	SpoolReason string `json:"spool_reason,omitempty"`
	ConnectedTo string `json:"connected_to,omitempty"` // guest: the host's address while a session is up
	// Limited counts how often each limit was reached since castrad started, by
	// its key in the configuration; those that never were are left out.
	Limited map[string]uint64 `json:"limited"`
}

// Fault is something that keeps a daemon from all that it promises. It ends by
// itself when what is wrong is mended.
type Fault struct {
	Part   string `json:"part"`   // what of it fails: "event-log", "vm-streams", "cursors"
	Cause  string `json:"cause"`  // a few words: "disk full", "disk read-only", …
	Effect string `json:"effect"` // what is not done meanwhile, and what is
	Detail string `json:"detail"` // the error as it came
	Advice string `json:"advice"` // what an operator does next
	AgeMS  int64  `json:"age_ms"`
}

// What [VM.State] is, and what castra.presence says of a VM.
const (
	StateReachable   = "reachable"
	StateUnreachable = "unreachable"
)

// VM describes one virtual machine as the broker knows it now. Ages are
// milliseconds; nil means never seen.
type VM struct {
	VM                 string   `json:"vm"`
	State              string   `json:"state"` // StateReachable or StateUnreachable
	Reachable          bool     `json:"reachable"`
	Reason             string   `json:"reason,omitempty"` // why unreachable: "never-seen", "disconnected", "silent", …
	Registered         bool     `json:"registered"`
	Keyed              bool     `json:"keyed"`
	LastHandshakeAgeMS *int64   `json:"last_handshake_age_ms"`
	LastPublishAgeMS   *int64   `json:"last_publish_age_ms"`
	LastHeartbeatAgeMS *int64   `json:"last_heartbeat_age_ms"`
	BusSubscribed      bool     `json:"bus_subscribed"`
	Subscriptions      []string `json:"subscriptions"` // topics
	Session            string   `json:"session"`       // the token of the live session; it grants nothing. "": no session
	RemoteAddr         string   `json:"remote_addr"`
	Capabilities       []string `json:"capabilities"`
	Lag                uint64   `json:"lag"`          // records committed that its slowest subscription has not passed yet
	Published          uint64   `json:"published"`    // records accepted since castrad started
	RateLimited        uint64   `json:"rate_limited"` // publishes refused since castrad started
	LastLimitedAgeMS   *int64   `json:"last_limited_age_ms"`
	Superseded         uint64   `json:"superseded"` // live sessions that a newer one replaced since castrad started
	Contended          bool     `json:"contended"`  // two guests with this identity keep replacing each other
	Forwards           []string `json:"forwards"`   // as registered: "tcp:HOST:GUEST"
}

// Refused is a name that was turned away lately.
type Refused struct {
	VM     string `json:"vm"` // the name it gave, or its address if none
	Reason string `json:"reason"`
	HasKey bool   `json:"has_key"` // it offered to prove a key of its own
	AgeMS  int64  `json:"age_ms"`
}

// AddVMRequest registers a VM.
type AddVMRequest struct {
	Name      string
	NoKey     bool     // admit the name without proof
	IfMissing bool     // an existing registration is left as it is, and is no error
	Forwards  []string // "tcp:HOST:GUEST" ports that castractl ports lists
}
