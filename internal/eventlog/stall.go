package eventlog

import "time"

// stalledState is how a log is whose gate is shut.
var stalledState = State{Degraded: CauseStalled, Err: ErrStalled}

// stallGate is shut when the disk has taken too long and replaced by an open
// one when it answered, so that any number of waiting publishers cost no timer
// each.
type stallGate struct{ stalled chan struct{} }

func (g *stallGate) shut() bool {
	select {
	case <-g.stalled:
		return true
	default:
		return false
	}
}

// beginWrite and endWrite enclose each round of who commits: all that it
// asks of the disk, since any of it may block. stuck is called if one does; nil: nothing is.
func (l *Log) beginWrite(stuck func()) {
	l.stallMu.Lock()
	l.stuck = stuck
	l.writing.Store(max(1, int64(time.Since(l.startedAt))))
	if !l.watched {
		l.watched = true
		l.stall.Reset(l.opts.StallAfter)
	}
	l.stallMu.Unlock()
}

// endWrite leaves the timer as it is: most rounds take less than a change of it costs the
// processor, which may have to wake another thread for it.
func (l *Log) endWrite() {
	l.stallMu.Lock()
	l.writing.Store(0)
	l.stuck = nil
	shut := l.gate.Load().shut()
	if shut {
		l.gate.Store(&stallGate{stalled: make(chan struct{})})
	}
	l.stallMu.Unlock()
	if shut {
		l.stateChanged()
	}
}

// stalled is called by the timer when the round that set it would have taken too long, and
// again for the one that it finds, if any. The lock keeps it from shutting a gate that the
// end of that round has just left open, which nothing would ever open again.
func (l *Log) stalled() {
	var stuck func()
	l.stallMu.Lock()
	gate := l.gate.Load()
	writing, left := l.writing.Load() != 0, l.opts.StallAfter-l.Writing()
	late := left <= 0 && !gate.shut()
	l.watched = writing && left > 0
	if l.watched {
		l.stall.Reset(max(left, time.Millisecond)) // whatever the clocks do, it does not spin
	}
	if late {
		close(gate.stalled)
		l.fault.Store(&stalledState)
		stuck, l.stuck = l.stuck, nil
	}
	l.stallMu.Unlock()
	if late {
		l.stateChanged()
	}
	if stuck != nil {
		stuck()
	}
}

// stateChanged makes the state be reported.
func (l *Log) stateChanged() {
	select {
	case l.changed <- struct{}{}:
	default:
	}
}

// State tells how the log is.
func (l *Log) State() State {
	if l.gate.Load().shut() {
		return stalledState
	}
	return *l.state.Load()
}

// reportState tells OnState of changes until the committer has ended. It is the
// only caller, so that what is told last is true. A fault that is over by then is
// told first: one sync that failed is something that an operator must know.
func (l *Log) reportState() {
	defer close(l.reported)
	last := ""
	tell := func(s State) {
		if s.Degraded == last {
			return
		}
		last = s.Degraded
		if l.opts.OnState != nil {
			l.opts.OnState(s)
		}
	}
	for ended := false; !ended; {
		select {
		case <-l.changed:
		case <-l.done:
			ended = true
		}
		if fault := l.fault.Swap(nil); fault != nil {
			tell(*fault)
		}
		tell(l.State())
	}
}
