package eventlog

import (
	"errors"
	"path/filepath"
	"time"
)

// sweepStep is how many VMs' streams are looked at for their age between two
// pieces of copying.
const sweepStep = 64

// sweep applies the retention to the next few VMs' streams, those of VMs that publish
// no more included, and gives when to go on: by age, and by a share that has become
// less.
func (p *perVM) sweep() (next time.Duration, err error) {
	whole := expireEvery(p.opts.MaxAge)
	if p.opts.MaxAge == 0 && p.opts.Share == nil {
		return whole, nil
	}
	if len(p.unswept) == 0 {
		entries, err := p.log.opts.FS.ReadDir(p.opts.Dir)
		if err != nil {
			return whole, err
		}
		for _, e := range entries {
			if e.IsDir() && !isAside(e.Name()) {
				p.unswept = append(p.unswept, e.Name())
			}
		}
	}
	n := min(sweepStep, len(p.unswept))
	for _, vm := range p.unswept[:n] { // one that cannot be looked at must not keep the others'
		err = errors.Join(err, p.sweepVM(vm))
	}
	if p.unswept = p.unswept[n:]; len(p.unswept) == 0 {
		return whole, err
	}
	return time.Second, err
}

func (p *perVM) sweepVM(vm string) error {
	st := &stream{fs: p.log.opts.FS, dir: filepath.Join(p.opts.Dir, vm)}
	if s := p.known(vm); s != nil {
		st = &s.st
	} else {
		if err := st.load(); err != nil {
			return err
		}
		for i := range st.segs { // nobody else has st; nothing was written to it since
			st.segs[i].sealed = p.quiet
		}
	}
	_, _, err := st.expire(p.retention(vm), time.Now(), false)
	return err
}
