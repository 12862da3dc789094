package eventlog

// Release makes the segments go all of whose records are at or below seq, but
// never the newest. It is for a log whose one reader says when it is done with
// a record, as a guest's spool is. It does not wait; what stands in the way of
// removing one is told to Options.OnError, and tried again with the next.
func (l *Log) Release(seq uint64) {
	l.released.Store(seq)
	l.lookAround()
}

// LastIn gives the number of the newest record of the log in dir, which need not
// be open, 0 if it has none. It changes nothing.
func LastIn(fsys FS, dir string) (uint64, error) {
	s := &stream{fs: fsys, dir: dir}
	if err := s.load(); err != nil {
		return 0, err
	}
	return s.lastMatching(1, ^uint64(0), func(*Record) (bool, error) { return true, nil })
}
