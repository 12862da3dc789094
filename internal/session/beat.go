package session

import "github.com/castrabus/castra/internal/wire"

// maxBeat is longer than a heartbeat is.
const maxBeat = 64

// isBeat tells whether b is a heartbeat and nothing else.
func (w *workspace) isBeat(b []byte) bool {
	if len(b) > maxBeat {
		return false
	}
	w.out = append(w.out[:0], b...) // decoding changes it
	frame, rest, err := wire.NextFrame(w.out)
	return err == nil && frame != nil && len(rest) == 0 &&
		w.dec.Decode(frame, &w.msg) == nil && w.msg.Type == wire.TypeHeartbeat && w.msg.Bad == ""
}

// beat answers a heartbeat on which nobody waits, as burst does any other.
func (s *Session) beat(c *courier, w *workspace) error {
	s.guest.Heard()
	s.guest.Heartbeat()
	s.spent++
	w.out = wire.AppendAckFrame(w.out[:0], &wire.Ack{Kind: "heartbeat"})
	return s.write(c, w.out)
}
