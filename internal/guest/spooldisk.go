package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/logging"
	"github.com/castrabus/castra/internal/wire"
)

const (
	// segmentShare and leastSegment: a released segment goes as a whole, so what is
	// on disk is spool_size, a segment that is partly released and the blocks
	// reserved for the newest: a quarter more.
	segmentShare = 8
	leastSegment = 64 << 10

	// releasedFile says how far the spool is released: {"seq":N}.
	releasedFile = "released"
	// asideMark parts a VM's name from what makes a directory or a file another
	// thing than its spool. No name has it.
	asideMark = "~"
)

// disk is the spool of one VM on disk: an event log in a directory called after the
// VM, and beside its segments how far it is released.
type disk struct {
	log      *eventlog.Log
	fs       eventlog.FS
	dir, vm  string
	lock     *os.File
	logger   *logrus.Entry
	found    backlog // what was there at the start
	released uint64  // likewise

	failing bool // of the loader: said, and not yet over
}

// diskOptions are what a spool on disk needs.
type diskOptions struct {
	dir  string
	vm   string
	size int64
	fs   eventlog.FS
	log  *logrus.Entry
}

// openDisk opens the VM's spool, recovers what a crash left and finds what the host
// has not taken. Only one process may have it open, which the error says.
func openDisk(opts diskOptions) (*disk, error) {
	if err := eventlog.MakeDir(opts.fs, opts.dir); err != nil {
		return nil, err
	}
	lock, err := lockFile(filepath.Join(opts.dir, opts.vm+asideMark+"lock"))
	if err != nil {
		return nil, err
	}
	d := &disk{fs: opts.fs, dir: filepath.Join(opts.dir, opts.vm), vm: opts.vm, lock: lock, logger: opts.log}
	other, err := d.open(opts.size)
	if err == nil && other != "" {
		// Sent as this VM's they would be a lie, and deleted they would be lost.
		var aside string
		if aside, err = d.setAside(); err == nil {
			logging.SpoolOther.On(d.logger).WithFields(logrus.Fields{"other": other, "directory": aside}).Error("the spool under this VM's name holds messages of another VM; they are kept aside and not sent: move them to where they belong, or remove them")
			_, err = d.open(opts.size)
		}
	}
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	d.others(opts.dir)
	if n := d.found.records(); n > 0 {
		logging.SpoolFound.On(d.logger).WithFields(logrus.Fields{"records": n, "directory": d.dir}).Info("the spool holds messages from before; they go to the host first")
	}
	return d, nil
}

// lockFile keeps two processes off one spool; the kernel lets go of it however the
// process ends.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o640)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close() // nothing was written
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s is held by another process", path)
		}
		return nil, fmt.Errorf("locking %s: %w", path, err)
	}
	return f, nil
}

// open opens the log and reads what is not released. It gives the name of another
// VM that a record bears, with nothing left open.
func (d *disk) open(size int64) (other string, err error) {
	log, rec, err := eventlog.Open(eventlog.Options{
		Dir: d.dir, FS: d.fs,
		SegmentSize: max(leastSegment, size/segmentShare),
		StallAfter:  storePatience,
		Recent:      1, // of the last write alone: what is to be sent is in memory anyway
		OnState:     d.state,
		OnError: func(err error) {
			logging.SpoolDegraded.On(d.logger).WithError(err).Warn("the spool has trouble on disk")
		},
		OnCut:    d.wasCut,
		OnDamage: d.damaged,
	})
	if err != nil {
		return "", err
	}
	d.log = log
	if err := d.recover(rec); err != nil {
		return "", errors.Join(err, log.Close())
	}
	if other, err = d.scan(rec.Last); err != nil || other != "" {
		return other, errors.Join(err, log.Close())
	}
	return "", nil
}

// recover finds how far the spool is released, and clears away what is.
func (d *disk) recover(rec *eventlog.Recovery) error {
	released, err := readReleased(d.fs, d.dir)
	if err != nil {
		logging.SpoolDegraded.On(d.logger).WithError(err).Warn("the spool does not say how far the host has taken it; all that is left in it is sent again")
	}
	if released > rec.Last {
		// Numbers given from now on must not count as released.
		logging.SpoolDegraded.On(d.logger).WithFields(logrus.Fields{"released": released, "last": rec.Last, "directory": d.dir}).Warn("the spool ends before what the host has taken of it: it was replaced, or its newest file removed")
		released = rec.Last
		if err := d.save(released); err != nil {
			return err
		}
	}
	d.released = released
	kept := ""
	if c := rec.Cut; c != nil {
		kept = filepath.Base(c.Aside)
		d.wasCut(*c)
	}
	entries, err := d.fs.ReadDir(d.dir)
	if err != nil {
		return err
	}
	for _, e := range entries { // of earlier crashes; or they would grow without bound
		if strings.Contains(e.Name(), ".jsonl.cut-") && e.Name() != kept {
			if err := d.fs.Remove(filepath.Join(d.dir, e.Name())); err != nil {
				logging.SpoolDegraded.On(d.logger).WithError(err).Warn("the spool has trouble on disk")
			}
		}
	}
	d.log.Release(released)
	return nil
}

func (d *disk) wasCut(c eventlog.Cut) {
	logging.WriteCutOff.On(d.logger).WithFields(logrus.Fields{"file": c.File, "offset": c.Offset, "bytes": c.Bytes, "kept": c.Aside}).Info("the spool ended in an unfinished write, of which nobody had been told; it was cut off and kept aside")
}

// scan reads what is not released, up to last.
func (d *disk) scan(last uint64) (other string, err error) {
	d.found = backlog{next: max(d.released+1, d.log.Oldest()), last: last}
	r := d.log.NewReader(d.found.next)
	defer r.Close()
	for {
		var rec eventlog.Record
		ok, err := r.Next(&rec)
		if _, damaged := errors.AsType[*eventlog.Gap](err); damaged {
			continue // the loader comes to it, and tells
		}
		if err != nil {
			return "", err
		}
		if !ok {
			break
		}
		if string(rec.VM) != d.vm {
			return wire.Clip(rec.VM), nil
		}
		own := fromLine(&rec)
		d.found.bytes += cost(&own)
	}
	return "", nil
}

// setAside gives the VM's directory a name under which no spool is looked for.
func (d *disk) setAside() (name string, err error) {
	for i := 1; ; i++ {
		name = fmt.Sprintf("%s%s%d", d.dir, asideMark, i)
		if _, err := d.fs.ReadDir(name); err == nil {
			continue
		} else if !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
		if err := d.fs.Rename(d.dir, name); err != nil {
			return "", err
		}
		return name, d.fs.SyncDir(filepath.Dir(name))
	}
}

// others tells of what other VMs' spools beside this one hold: an image was cloned
// with a spool in it, or the VM was given another name.
func (d *disk) others(dir string) {
	entries, err := d.fs.ReadDir(dir)
	if err != nil {
		logging.SpoolDegraded.On(d.logger).WithError(err).Warn("the spool has trouble on disk")
		return
	}
	for _, e := range entries {
		name := e.Name()
		if !e.IsDir() || name == d.vm || !wire.ValidName(name) {
			continue
		}
		if n := left(d.fs, filepath.Join(dir, name)); n > 0 {
			logging.SpoolOther.On(d.logger).WithFields(logrus.Fields{"other": name, "records": n, "directory": filepath.Join(dir, name)}).Warn("the spool of another VM is on this disk, with messages that the host has not taken; they are kept and not sent: only a castra-guestd of that name sends them")
		}
	}
}

// entry is a record as the log takes it.
func (d *disk) entry(r *Record) eventlog.Entry {
	return eventlog.Entry{VM: d.vm, Topic: []byte(r.Topic), ID: []byte(r.ID), Reply: []byte(r.Reply), Payload: r.Payload}
}

// save notes that the host has everything up to seq, and removes what that leaves
// without use: first, since on a full disk that is what makes room for the note. A
// segment that is gone counts as released, note or not.
func (d *disk) save(seq uint64) error {
	d.log.Release(seq)
	return eventlog.Replace(d.fs, filepath.Join(d.dir, releasedFile), fmt.Appendf(nil, "{\"seq\":%d}\n", seq))
}

func readReleased(fsys eventlog.FS, dir string) (uint64, error) {
	f, err := fsys.OpenFile(filepath.Join(dir, releasedFile), os.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Close() // opened for reading
	var b [64]byte
	n, _ := f.ReadAt(b[:], 0) // it ends before the buffer does
	var at struct {
		Seq uint64 `json:"seq"`
	}
	if err := json.Unmarshal(b[:n], &at); err != nil {
		return 0, fmt.Errorf("%s: %w", filepath.Join(dir, releasedFile), err)
	}
	return at.Seq, nil
}

// close ends the log. What of it hangs on the disk it leaves behind after patience.
func (d *disk) close(patience time.Duration) {
	closed := make(chan error, 1) // room for the one result, should nobody wait any more
	go func() { closed <- errors.Join(d.log.Close(), d.lock.Close()) }()
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case err := <-closed:
		if err != nil {
			logging.SpoolDegraded.On(d.logger).WithError(err).Warn("the spool could not be closed in good order; the next start looks at its end again")
		}
	case <-late.C:
		logging.SpoolDegraded.On(d.logger).Warn("the spool's disk does not answer; ending without it")
	}
}

// state tells of how the disk takes writes.
func (d *disk) state(s eventlog.State) {
	if s.Degraded == "" {
		logging.SpoolRecovered.On(d.logger).Info("the spool's disk takes messages again")
	} else {
		logging.SpoolDegraded.On(d.logger).WithFields(logrus.Fields{"state": s.Degraded, "reason": fmt.Sprint(s.Err), "directory": d.dir}).Error("the spool cannot be written; while the host is away, publishers are refused")
	}
}

// failed and works tell, once each, that the loader's disk fails and no longer does.
func (d *disk) failed(doing string, err error) {
	if !d.failing {
		logging.SpoolDegraded.On(d.logger).WithError(err).Errorf("%s; trying again at times", doing)
	}
	d.failing = true
}

func (d *disk) works() {
	if d.failing {
		logging.SpoolRecovered.On(d.logger).Info("the spool can be read and released again")
	}
	d.failing = false
}

// damaged tells of a place on disk where a record should be.
func (d *disk) damaged(at eventlog.Damage) {
	logging.SpoolDamaged.On(d.logger).WithFields(logrus.Fields{"file": at.File, "offset": at.Offset}).Error("the spool is damaged here; what is readable behind it is sent")
}

// lost tells of records that their publishers were told are kept.
func (d *disk) lost(gap *eventlog.Gap) {
	logging.MessagesLost.On(d.logger).WithFields(logrus.Fields{"from": gap.From, "to": gap.To, "records": gap.To - gap.From + 1}).Error("kept messages cannot be read from the spool any more; they are lost")
}

// left counts what the host has not taken of a spool that is not open; it may count
// some that are damaged.
func left(fsys eventlog.FS, dir string) uint64 {
	released, err := readReleased(fsys, dir)
	if err != nil {
		return 0
	}
	last, err := eventlog.LastIn(fsys, dir)
	if err != nil || last <= released {
		return 0
	}
	return last - released
}

// spoolDisk opens the spool on disk where there is one to be had. Otherwise why says
// what stands in the way.
func spoolDisk(opts Options) (d *disk, why string) {
	if opts.SpoolDir == "" {
		return nil, "spool_dir is empty"
	}
	d, err := openDisk(diskOptions{dir: opts.SpoolDir, vm: opts.Name, size: opts.SpoolSize, fs: opts.fs, log: opts.Log})
	if err != nil {
		return nil, err.Error()
	}
	return d, ""
}
