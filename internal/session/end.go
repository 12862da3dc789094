package session

import (
	"errors"
	"io"
	"time"

	"github.com/castrabus/castra/internal/wire"
)

// conclude is the end of whoever read, err being why.
func (s *Session) conclude(err error) {
	if errors.Is(err, errIdle) || errors.Is(err, errHeldUp) {
		return
	}
	defer s.done()
	end := s.ended.Load()
	if end == handingOver {
		if errors.Is(err, errEnded) { // stopped between two frames, and all is well
			s.park()
			return
		}
		s.ended.CompareAndSwap(end, nil)
		end = nil
	}
	if end == nil {
		end = &End{}
		switch {
		case errors.Is(err, io.EOF):
		case errors.Is(err, wire.ErrProtocol):
			end = &End{Reason: TroubleProtocolError, Detail: err.Error()}
		default:
			end = &End{Reason: TroubleIOError, Detail: err.Error()}
		}
		if !s.ended.CompareAndSwap(nil, end) {
			end = s.ended.Load()
		}
	}
	s.bye(*end)
}

// bye says why the session ends, and takes it down. The table of VMs knows it
// before anything is waited for that may take long.
func (s *Session) bye(end End) {
	s.stopSearch()
	for _, sub := range s.subscriptions() {
		s.broker.Unsubscribe(sub)
	}
	_ = s.conn.SetWriteDeadline(time.Unix(1, 0)) // a delivery under way gives the token back
	s.writer <- struct{}{}
	if code := fatalCode(end.Reason); code != "" && (!s.torn || len(s.unsent) > 0) {
		_ = s.conn.SetWriteDeadline(time.Now().Add(lingerFor))
		_, _ = s.conn.Write(wire.AppendErrorFrame(s.unsent, code, end.Detail))
	}
	<-s.writer // whoever takes it now finds the session ended, and writes nothing
	s.broker.Release(s, end)
	linger(s.conn)
	s.deliveries.wait()
	s.background.Wait()
	s.reading <- struct{}{}
	for _, sub := range s.subscriptions() {
		sub.reader.Close()
	}
}

// fatalCode is the wire's word for why a session ends, "" where the guest
// cannot hear it or need not.
func fatalCode(reason string) string {
	switch reason {
	case TroubleProtocolError:
		return "protocol-error"
	case TroubleHeartbeatTimeout:
		return "heartbeat-timeout"
	case TroubleSuperseded:
		return "superseded"
	case TroubleShutdown:
		return "shutting-down"
	case TroubleRevoked:
		return "forbidden"
	default:
		return ""
	}
}
