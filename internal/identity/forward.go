package identity

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// maxForwards keeps a VM's file well below maxFile.
const maxForwards = 1024

var errPortTaken = errors.New("leads to another VM already")

// checkForwards checks e's forwards, also against those of the other VMs: a port
// of the host leads to one of them.
func (r *Registry) checkForwards(e Entry) error {
	if len(e.Forwards) > maxForwards {
		return fmt.Errorf("%d forwards are too many: a VM may have %d", len(e.Forwards), maxForwards)
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	own := make(map[string]bool, len(e.Forwards))
	for _, fwd := range e.Forwards {
		if err := checkForward(fwd); err != nil {
			return err
		}
		port := portOf(fwd)
		if owner, taken := r.ports[port]; taken {
			return fmt.Errorf("forward %s: the host's port %s %w, %s; choose another", fwd, port, errPortTaken, owner)
		}
		if own[port] {
			return fmt.Errorf("forward %s: the host's port %s is given twice", fwd, port)
		}
		own[port] = true
	}
	return nil
}

func checkForward(fwd string) error {
	proto, ports, _ := strings.Cut(fwd, ":")
	host, guest, _ := strings.Cut(ports, ":")
	if proto != "tcp" && proto != "udp" || !validPort(host) || !validPort(guest) {
		return fmt.Errorf("%q is no forward; write it as tcp:HOSTPORT:GUESTPORT or udp:HOSTPORT:GUESTPORT, with ports from 1 to 65535", fwd)
	}
	return nil
}

// validPort takes a port in the one way to write it, so that portOf finds equal
// ones equal.
func validPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0 && s == strconv.FormatUint(n, 10)
}

// portOf gives what a valid forward takes of the host, "tcp:2222".
func portOf(fwd string) string { return fwd[:strings.LastIndexByte(fwd, ':')] }
