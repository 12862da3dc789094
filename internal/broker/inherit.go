package broker

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/castrabus/castra/internal/handover"
	"github.com/castrabus/castra/internal/logging"
	"github.com/castrabus/castra/internal/session"
	"github.com/castrabus/castra/internal/wire"
)

// maxStateLine bounds a VM's line: a session's unsent bytes in base64 and what comes
// with them (session.Frozen), with room to spare.
const maxStateLine = 16 << 20

// inherit takes over what the castrad before left. Whatever is wrong with it, the broker
// does without. It tells whether it has what that castrad knew.
func (b *Broker) inherit() (taken bool) {
	if b.opts.Inherit != nil {
		began := time.Now()
		sessions, err := b.resume()
		if err != nil {
			logging.HandOverFailed.On(b.log).WithError(err).Error("what the castrad before handed over cannot be used; its guests connect anew")
		} else {
			taken = true
			logging.SessionsTakenOver.On(b.log).WithFields(logrus.Fields{"count": sessions, "took": time.Since(began).String()}).Info("sessions taken over from the castrad before")
		}
	}
	return taken
}

// resume fills the table and starts the sessions. After an error nothing was taken over.
func (b *Broker) resume() (n int, err error) {
	state, conns, err := handover.Unpack(b.opts.Inherit)
	if err != nil {
		return 0, err
	}
	defer state.Close()
	header, vms, err := readHandOver(state)
	switch {
	case err != nil:
	case header.Sessions != len(conns):
		err = fmt.Errorf("there are %d connections for %d sessions", len(conns), header.Sessions)
	case b.events.Committed() < header.Head:
		// Positions in another log mean nothing.
		err = fmt.Errorf("the event log ends at record %d and ended at %d then: it was cut or replaced", b.events.Committed(), header.Head)
	}
	if err != nil {
		for _, c := range conns {
			_ = c.Close()
		}
		return 0, err
	}
	elapsed := max(0, handover.Clock()-header.Clock)
	b.table.ResumeRefused(header.Refused, elapsed)
	// Nothing is published before all subscriptions are known again: what is must
	// be delivered by notice, not found by each of them in the log.
	sessions := make([]*session.Session, len(vms))
	var work sync.WaitGroup
	todo := make(chan func()) // unbuffered: no more than can be worked on
	for range runtime.GOMAXPROCS(0) {
		work.Go(func() {
			for f := range todo {
				f()
			}
		})
	}
	for i := range vms {
		vm := &vms[i]
		var conn *handover.Conn
		if vm.Session != nil {
			conn, conns = conns[0], conns[1:]
		}
		todo <- func() { sessions[i] = b.resumeVM(vm, conn, elapsed) }
	}
	close(todo)
	work.Wait()
	for _, s := range sessions {
		if s != nil {
			b.guests.Add(1)
			go s.Resume(b.guests.Done)
			n++
		}
	}
	return n, nil
}

// resumeVM takes in a VM, and gives its session if it has one that can go on.
func (b *Broker) resumeVM(vm *handOverVM, conn *handover.Conn, elapsed time.Duration) *session.Session {
	entry := b.log.WithField("vm", vm.VM)
	var s *session.Session
	if conn != nil {
		var err error
		if s, err = session.Thaw(vm.VM, conn, b, b.sessionOptions(), vm.Session); err != nil {
			logging.SessionNotHandedOver.On(entry).WithError(err).Error("a session cannot be taken over; its guest connects anew")
			_ = conn.Close()
		}
	}
	// As a reload does: a name removed or a key replaced in between ends the session.
	e, registered := b.opts.Registry.Lookup(vm.VM)
	welcome := registered || b.settings.Load().AcceptUnknown
	if s == nil {
		b.table.Resume(&vm.Carried, nil, elapsed)
		if !welcome {
			b.table.Forget(vm.VM)
		}
		return nil
	}
	v := b.table.Resume(&vm.Carried, s, elapsed)
	if !welcome {
		b.table.Forget(vm.VM)
	}
	if v == nil {
		logging.SessionNotHandedOver.On(entry).Error("a session cannot be taken over: the VM has one, or there are too many; its guest connects anew")
		_ = conn.Close()
		return nil
	}
	s.Enrol(&account{VM: v, broker: b, key: e.Key}, vm.Session)
	if !welcome || fingerprint(e.Key) != vm.Key {
		s.End(session.TroubleRevoked, "the VM's registration has changed")
	}
	return s
}

// readHandOver reads what writeHandOver wrote. It is strict: what is not just as
// this version writes it was not written by this version.
func readHandOver(r io.Reader) (h handOverHeader, vms []handOverVM, err error) {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, 64<<10), maxStateLine)
	if !lines.Scan() {
		return h, nil, fmt.Errorf("reading the state: %w", errors.Join(io.ErrUnexpectedEOF, lines.Err()))
	}
	var some struct{ Version int }
	if err := json.Unmarshal(lines.Bytes(), &some); err != nil || some.Version != handOverVersion {
		return h, nil, fmt.Errorf("the state is of version %d and not %d: it was left by another castrad", some.Version, handOverVersion)
	}
	if err := strictly(lines.Bytes(), &h); err != nil {
		return h, nil, fmt.Errorf("reading the state: %w", err)
	}
	names := make(map[string]bool)
	sessions := 0
	for lines.Scan() {
		var vm handOverVM
		if err := strictly(lines.Bytes(), &vm); err != nil {
			return h, nil, fmt.Errorf("reading the state of VM %d: %w", len(vms)+1, err)
		}
		if !wire.ValidName(vm.VM) || wire.Reserved(vm.VM) || names[vm.VM] || len(vms) >= h.VMs {
			return h, nil, fmt.Errorf("the state has a VM %.*q, which is none, is there twice or one too many", wire.MaxName, vm.VM)
		}
		names[vm.VM] = true
		if vm.Session != nil {
			sessions++
		}
		vms = append(vms, vm)
	}
	if err := lines.Err(); err != nil {
		return h, nil, fmt.Errorf("reading the state: %w", err)
	}
	if len(vms) != h.VMs || sessions != h.Sessions {
		return h, nil, fmt.Errorf("the state has %d VMs and %d sessions, and is said to have %d and %d", len(vms), sessions, h.VMs, h.Sessions)
	}
	return h, vms, nil
}

// strictly decodes a line that has one value without unknown members.
func strictly(line []byte, into any) error {
	dec := json.NewDecoder(bytes.NewReader(line))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return err
	}
	if rest := bytes.TrimSpace(line[dec.InputOffset():]); len(rest) > 0 {
		return fmt.Errorf("%.20q stands behind its end", rest)
	}
	return nil
}
