package session

import "time"

const (
	// farBehind is by how many records a session lags that reads up, and is not merely
	// late: more than the log keeps in memory of those of an ordinary size.
	farBehind = 16 << 10

	// readUpFor is how long a session that reads up may go on while others live on what
	// is committed meanwhile, and readUpRest how long it then leaves the processors to
	// them: one that reads as fast as it can takes a whole one, and its guest another.
	readUpFor  = 200 * time.Microsecond
	readUpRest = time.Millisecond

	// livelyFor is how long after a commit somebody counts as waiting for the next.
	livelyFor = 100 * time.Millisecond
)

// readingUp is a session that lags far behind.
type readingUp struct {
	began     time.Time // of this turn; zero: it has not begun
	lag       uint64    // at the end of the last one
	committed uint64    // the newest record that was seen
	lively    time.Time // when a new one was
}

// rest tells how long to deliver nothing, being lag records behind committed: not at
// all where the log stands still, nor where that would have it fall back further.
func (r *readingUp) rest(now time.Time, committed, lag uint64) time.Duration {
	if committed != r.committed {
		if r.committed != 0 {
			r.lively = now
		}
		r.committed = committed
	}
	if r.began.IsZero() { // not since the rest was due to end: that may have been long ago
		r.began = now
		if r.lag == 0 {
			r.lag = lag
		}
	}
	if now.Sub(r.began) < readUpFor {
		return 0
	}
	gains := lag < r.lag
	r.began, r.lag = time.Time{}, lag
	if !gains || now.Sub(r.lively) > livelyFor {
		return 0
	}
	return readUpRest
}

// rests is readingUp.rest for the session, after a delivery of which there is more.
// Only who delivers calls it.
func (s *Session) rests() time.Duration {
	lag := s.Lag()
	if lag < farBehind {
		s.up = nil
		return 0
	}
	if s.up == nil {
		s.up = &readingUp{}
	}
	return s.up.rest(time.Now(), s.opts.Log.Committed(), lag)
}
