package session

import (
	"errors"
	"fmt"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/wire"
)

// refuse makes a the refusal of a frame. The wire has no word for an end or a
// fault of castrad's own; storage-stalled says what the guest needs to know:
// that it is open whether the record was stored, and to retry.
func refuse(a *wire.Ack, err error) {
	r := Refuse(err)
	if r.Code == bus.CodeInternal || r.Code == bus.CodeShuttingDown {
		r.Code, r.RetryAfter = bus.CodeStorageStalled, time.Second
	}
	a.Code, a.Reason, a.RetryAfterMS = string(r.Code), r.Reason, wholeMS(r.RetryAfter)
}

// wholeMS gives a wait in milliseconds for a guest. A part of one counts whole: who
// comes back after exactly that long must not be refused again.
func wholeMS(wait time.Duration) int64 {
	return int64((wait + time.Millisecond - 1) / time.Millisecond)
}

// Refuse gives the refusal that a caller is to see for an error of the broker
// or of the log. The error is new: the caller may change it.
func Refuse(err error) *bus.Error {
	var refusal *bus.Error
	var write *eventlog.WriteError
	switch {
	case errors.As(err, &refusal):
		own := *refusal
		return &own
	case errors.Is(err, eventlog.ErrStalled):
		refusal = bus.Errorf(bus.CodeStorageStalled, "the host's disk does not answer; retry with the same id")
		refusal.RetryAfter = 5 * time.Second
	case errors.As(err, &write) && write.Full:
		refusal = bus.Errorf(bus.CodeStorageFull, "the host's disk is full; nothing was stored")
		refusal.RetryAfter = time.Second
	case errors.As(err, &write):
		refusal = bus.Errorf(bus.CodeStorageFull, "the host cannot write its log (%v); nothing was stored", write.Err)
		refusal.RetryAfter = time.Second
	case errors.Is(err, eventlog.ErrClosed):
		refusal = bus.Errorf(bus.CodeShuttingDown, "castrad is ending; retry when it is back")
		refusal.RetryAfter = time.Second
	default:
		refusal = bus.Errorf(bus.CodeInternal, "%v", err)
	}
	return refusal
}

// notes holds when a session's run into a limit was last recorded, and how often it
// has done so since. Each limit is its reader's or its writer's to note.
type notes struct {
	rate, subscriptions, slow note
}

// notes gives them. Few sessions ever run into a limit, and the others keep none.
func (s *Session) notes() *notes {
	if p := s.noted.Load(); p != nil {
		return p
	}
	s.noted.CompareAndSwap(nil, &notes{})
	return s.noted.Load()
}

type note struct {
	at    time.Time
	count int
}

// noteInterval is how often at most a session's run into one limit is recorded.
const noteInterval = 10 * time.Second

// due counts one, and gives how many there are to be recorded: 0, or all since the
// last time.
func (n *note) due() int {
	n.count++
	now := time.Now()
	if !n.at.IsZero() && now.Sub(n.at) < noteInterval {
		return 0
	}
	count := n.count
	n.at, n.count = now, 0
	return count
}

// noteLimited records refusals for the rate.
func (s *Session) noteLimited() {
	if n := s.notes().rate.due(); n > 0 {
		s.broker.Trouble(s, TroubleRateLimited, ActionThrottle, fmt.Sprintf("publish_rate, publish_burst or publish_bytes exceeded, %d refused", n))
	}
}

// noteSubscriptions records subscriptions refused because there are enough.
func (s *Session) noteSubscriptions() {
	if n := s.notes().subscriptions.due(); n > 0 {
		s.broker.Trouble(s, TroubleQueueFull, ActionReject, fmt.Sprintf("max_subscriptions: a session may have %d, %d more refused", s.opts.MaxSubscriptions, n))
	}
}
