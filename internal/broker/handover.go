package broker

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/handover"
	"github.com/castrabus/castra/internal/logging"
	"github.com/castrabus/castra/internal/presence"
	"github.com/castrabus/castra/internal/session"
)

const (
	// handOverVersion is of what is written below, whole. Whoever changes a member
	// there, in what of presence is carried or in session.Frozen raises it: a castrad of
	// another version takes nothing over, and the guests connect again.
	handOverVersion = 2

	// parkTime is how long the sessions may take to stop: a batch that is being
	// committed, and a search of the log, each give up on a stalled disk after five
	// seconds.
	parkTime = 12 * time.Second

	// quietTime is how long the committer may take to answer.
	quietTime = time.Second
)

// handOverHeader is the first line of the state, a line of JSON for each VM behind it.
type handOverHeader struct {
	Version  int           `json:"version"`
	Castrad  string        `json:"castrad"`  // its version, for people
	Clock    time.Duration `json:"clock_ns"` // see handover.Clock
	Head     uint64        `json:"head"`     // the log's newest record
	VMs      int           `json:"vms"`
	Sessions int           `json:"sessions"`

	Refused []presence.CarriedRefusal `json:"refused,omitempty"`
}

// handOverVM is one VM. Connections come in the order of the VMs that have one.
type handOverVM struct {
	presence.Carried
	Key     string          `json:"key_sha256,omitempty"` // of the key that the session has proved to hold
	Session *session.Frozen `json:"session,omitempty"`
}

// HandOver stops the sessions, each between two frames, and has store keep what
// they come to for the castrad that is started next. It tells how many sessions
// that one gets, and Close is what is left to be done. Where there is an error the
// guests are told that castrad ends, as Close does without HandOver.
func (b *Broker) HandOver(store func(*os.File) error) (sessions int, err error) {
	for _, l := range b.listening() {
		if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			logging.HandOverFailed.On(b.log).WithError(err).Warn("cannot close a listening socket")
		}
	}
	b.handshakes.end() // who is not let in yet may ask the next castrad
	kept := false
	defer func() { b.parking.settle(kept) }()
	b.park()
	header, vms, fds := b.freeze()
	parcel, err := handover.Pack(func(w io.Writer) error { return writeHandOver(w, header, vms) }, fds)
	if err != nil {
		return 0, err
	}
	defer parcel.Close()
	if err := store(parcel.Successors()); err != nil {
		return 0, err
	}
	if kept = parcel.Kept(); !kept {
		return 0, errors.New("the service manager keeps nothing for this unit; FileDescriptorStoreMax=1 in it would change that")
	}
	return len(fds), nil
}

// park stops the sessions and waits until they have, or will not.
func (b *Broker) park() {
	all := b.table.Sessions()
	done := b.parking.begin(all)
	for _, s := range all {
		if s, ok := s.(*session.Session); ok && !s.HandOver() {
			b.parking.stopped(s, false) // it has said so before anybody asked, or is about to
		}
	}
	t := time.NewTimer(parkTime)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
		logging.SessionNotHandedOver.On(b.log).WithField("count", b.parking.running()).Warn("some sessions do not stop, and are not handed over")
	}
}

// freeze describes all VMs and the sessions that have stopped.
func (b *Broker) freeze() (handOverHeader, []handOverVM, []int) {
	quiet := b.quiet()
	h := handOverHeader{Version: handOverVersion, Castrad: b.opts.Version, Clock: handover.Clock(), Head: b.events.Committed(), Refused: b.table.CarryRefused()}
	carried, sessions := b.table.Carry()
	var fds []int
	vms := make([]handOverVM, len(carried))
	for i := range carried {
		vm := &vms[i]
		vm.Carried = carried[i]
		s, ok := sessions[i].(*session.Session)
		if !ok || !b.parking.holds(s) {
			continue
		}
		f, fd, err := s.Freeze(quiet)
		if err != nil {
			logging.SessionNotHandedOver.On(b.entry(s)).WithError(err).Warn("a session cannot be handed over")
			continue
		}
		b.parking.take(s)
		vm.Session = f
		if a, ok := s.Account().(*account); ok {
			vm.Key = fingerprint(a.key)
		}
		fds = append(fds, fd)
	}
	h.VMs, h.Sessions = len(vms), len(fds)
	return h, vms, fds
}

// quiet gives a record such that subscriptions have been notified of every one up
// to it, 0 where the committer does not answer.
func (b *Broker) quiet() uint64 {
	committed := b.events.Committed()
	ctx, cancel := context.WithTimeout(context.Background(), quietTime)
	defer cancel()
	// Behind a batch of nothing, all that was committed before it is notified of.
	done := make(chan error, 1) // for the one answer, awaited or not
	b.work.Go(func() { done <- b.events.Append(ctx, &eventlog.Batch{}) })
	select {
	case err := <-done:
		if err == nil {
			return committed
		}
	case <-ctx.Done():
	}
	return 0
}

// fingerprint stands for a key in the state, "" for none.
func fingerprint(key []byte) string {
	if key == nil {
		return ""
	}
	sum := sha256.Sum256(key)
	return hex.EncodeToString(sum[:])
}

func writeHandOver(w io.Writer, h handOverHeader, vms []handOverVM) error {
	out := bufio.NewWriterSize(w, 1<<20)
	enc := json.NewEncoder(out) // each value is followed by a line end
	if err := enc.Encode(h); err != nil {
		return err
	}
	for i := range vms {
		if err := enc.Encode(&vms[i]); err != nil {
			return fmt.Errorf("the state of %s: %w", vms[i].VM, err)
		}
	}
	return out.Flush()
}
