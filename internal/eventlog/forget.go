package eventlog

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"time"
)

// VMFiles is what is on disk of one VM.
type VMFiles struct {
	VM      string
	Written time.Time // when its newest segment or its ids were written last
}

// ListVMs gives the VMs that have a stream or ids and that want accepts.
func (l *Log) ListVMs(want func(vm string) bool) ([]VMFiles, error) {
	p := l.perVM
	written := make(map[string]time.Time)
	note := func(vm string, at time.Time) {
		if at.After(written[vm]) {
			written[vm] = at
		}
	}
	entries, err := l.opts.FS.ReadDir(p.opts.Dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if vm := e.Name(); e.IsDir() && !isAside(vm) && want(vm) {
			st, _, err := l.vmStream(vm)
			if err != nil {
				return nil, err
			}
			if segs := st.snapshot(); len(segs) > 0 { // else there is nothing of ours in it
				note(vm, segs[len(segs)-1].modified)
			}
		}
	}
	if entries, err = l.opts.FS.ReadDir(p.opts.IDDir); err != nil {
		return nil, err
	}
	for _, e := range entries {
		if vm, ok := strings.CutSuffix(e.Name(), idSuffix); ok && !e.IsDir() && want(vm) {
			info, err := e.Info()
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, err
			}
			note(vm, info.ModTime())
		}
	}
	all := make([]VMFiles, 0, len(written))
	for vm, at := range written {
		all = append(all, VMFiles{vm, at})
	}
	return all, nil
}

// ForgetVM removes the stream and the ids of a VM. Should it publish again, both begin
// anew; who reads the stream is told of a gap. The error is ctx's, or the disk's: some
// of it is left then, and whole.
func (l *Log) ForgetVM(ctx context.Context, vm string) error {
	p := l.perVM
	req := forgetting{vm: vm, done: make(chan error, 1)}
	select {
	case p.forgettings <- req:
	case <-p.done:
		return ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	}
	return <-req.done
}

// forgetting is a request of ForgetVM's.
type forgetting struct {
	vm   string
	done chan error // room for the one answer
}

// forgetVM is ForgetVM in the goroutine that owns the streams.
func (p *perVM) forgetVM(vm string) error {
	s, err := p.stream([]byte(vm))
	if err != nil {
		return err
	}
	if s.listed { // a failed copy has left something to be written
		return fmt.Errorf("the stream of %s is being written", vm)
	}
	p.open.close(s)
	p.mu.Lock()
	delete(p.streams, vm)
	p.mu.Unlock()
	delete(p.unsynced, vm)
	p.newDirs, p.newIDs = true, true // the next checkpoint makes the removals durable
	fsys := p.log.opts.FS
	if err := s.st.clear(); err != nil {
		return err
	}
	// Where somebody keeps something else in the directory, it stays.
	if entries, err := fsys.ReadDir(s.st.dir); err == nil && len(entries) == 0 {
		if err := fsys.Remove(s.st.dir); err != nil {
			return err
		}
	}
	if err := fsys.Remove(filepath.Join(p.opts.IDDir, vm+idSuffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	p.ids.forget(vm)
	return nil
}

// clear removes every segment, the oldest first: what is left after an error, or a
// power cut, has no hole.
func (s *stream) clear() error {
	for {
		s.mu.Lock()
		if len(s.segs) == 0 {
			s.mu.Unlock()
			return nil
		}
		doomed := s.segs[0]
		s.segs = s.segs[1:]
		s.mu.Unlock()
		if err := s.remove(doomed); err != nil {
			return err
		}
	}
}
