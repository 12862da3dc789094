package session

import (
	"errors"
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
	a.Code, a.Reason, a.RetryAfterMS = string(r.Code), r.Reason, r.RetryAfter.Milliseconds()
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

// ackKind is the word that an answer to m carries.
func ackKind(m *wire.Message) string {
	switch m.Type {
	case wire.TypePublish:
		return "publish"
	case wire.TypeSubscribe:
		return "subscribe"
	case wire.TypeUnsubscribe:
		return "unsubscribe"
	case wire.TypeHeartbeat:
		return "heartbeat"
	case wire.TypeAck:
		return "ack"
	default:
		return wire.Clip(m.TypeName)
	}
}

// noteLimited records a refusal for the rate, at most one a second.
func (s *Session) noteLimited() {
	if now := time.Now(); now.Sub(s.limitedAt) >= time.Second {
		s.limitedAt = now
		s.broker.Trouble(s, TroubleRateLimited, ActionThrottle, "publish_rate, publish_burst or publish_bytes exceeded")
	}
}
