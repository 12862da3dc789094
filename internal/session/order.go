package session

import (
	"fmt"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

// Held is a publish of a guest that asked for [wire.CapOrdered], refused for now.
// Until it comes again nothing is stored of what the guest had sent behind it: that
// would take its place in the order.
type Held struct {
	ID           string   `json:"id"`
	Code         bus.Code `json:"code"`
	RetryAfterMS int64    `json:"retry_after_ms"`
}

// overtakes tells whether a publish comes out of its turn; if so, a is its refusal.
func (s *Session) overtakes(a *wire.Ack) bool {
	if s.held == nil {
		return false
	}
	if string(a.ID) == s.held.ID {
		s.held = nil
		return false
	}
	a.Code, a.RetryAfterMS = string(s.held.Code), s.held.RetryAfterMS
	a.Reason = fmt.Sprintf("publish %q was refused before this one; send that one again first", wire.Clip([]byte(s.held.ID)))
	return true
}

// hold notes the refusal of a publish that keeps back those behind it. One without
// an id could not be told when it comes again.
func (s *Session) hold(a *wire.Ack) {
	if s.ordered && len(a.ID) > 0 && a.RetryAfterMS > 0 {
		s.held = &Held{ID: string(a.ID), Code: bus.Code(a.Code), RetryAfterMS: a.RetryAfterMS}
	}
}
