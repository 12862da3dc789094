package eventlog

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

const (
	// asideAfter is how long what one VM has on disk may keep all VMs' copies back.
	asideAfter = time.Minute

	// asideMark is in the name of what was set aside then, and in no VM's.
	asideMark = "~"
)

func isAside(name string) bool { return strings.Contains(name, asideMark) }

// vmError is what keeps a VM's stream, or its ids, from being read or written.
type vmError struct {
	s    *vmStream
	path string // of the stream's directory, or of the file of ids
	err  error
}

func (e *vmError) Error() string { return e.err.Error() }

func (e *vmError) Unwrap() error { return e.err }

func (s *vmStream) streamFault(doing string, err error) error {
	return &vmError{s, s.st.dir, fmt.Errorf("%s the stream of %s: %w", doing, s.vm, err)}
}

func (s *vmStream) idsFault(doing string, err error) error {
	return &vmError{s, s.p.ids.path(s.vm), fmt.Errorf("%s the ids of %s: %w", doing, s.vm, err)}
}

// passOver sets aside what one VM has on disk where nothing else has kept the copies of
// all VMs back for asideAfter, err being the newest reason: the host stream would be kept
// until the disk is full, and a start takes no record before all is copied. Of what
// befalls others as well, a full disk for one, it would only make more. Each file is set
// aside once: on a disk that fails the next one is no better.
func (p *perVM) passOver(err error) {
	bad, ok := errors.AsType[*vmError](err)
	if cause := Cause(err); !ok || cause != CauseDenied && cause != CauseDiskError || p.passed[bad.path] {
		p.bad = ""
		return
	}
	if bad.path != p.bad {
		p.bad, p.badSince = bad.path, time.Now()
	}
	if time.Since(p.badSince) < asideAfter {
		return
	}
	if bad.path == p.ids.path(bad.s.vm) && bad.s.shortenIDs() == nil {
		p.passed[bad.path] = true // that it could not be written need not mean that it cannot be read
		p.forget()
		return
	}
	name, err := setAside(p.log.opts.FS, bad.path, asideMark)
	if err != nil {
		return // somebody has to help
	}
	p.passed[bad.path] = true
	p.forget()
	if p.opts.OnAside != nil {
		p.opts.OnAside(bad.path, name)
	}
}
