package eventlog

import (
	"maps"
	"slices"
)

// crash makes the disk what the power cut leaves of it, and gives it back ready
// for use. With power false only the process has been killed: nothing is lost. With boot
// false the disk alone went away: as far as its data is older than its own last change of
// a file, so is what it says of that.
func (d *simDisk) crash(power, boot bool) {
	d.ops, d.crashAt, d.rebooted = 0, 0, boot
	if power {
		d.lose(d.root)
	}
}

func (d *simDisk) lose(n *simNode) {
	if !n.dir {
		n.durable = d.survive(n)
		n.pending = n.pending[:0]
		n.data = append(n.data[:0], n.durable...)
		n.reserved = n.durableReserved
		if !d.rebooted || d.rng.IntN(2) == 0 {
			n.changed = n.durableChanged
		}
		return
	}
	// Each name stands as it was after some of its changes, whatever became of
	// the others.
	kept := d.luck()
	for name := range changed(n.changes) {
		for _, c := range n.changes {
			if c.name != name {
				continue
			}
			if d.rng.Float64() >= kept {
				break
			}
			if c.node == nil {
				delete(n.durableNames, name)
			} else {
				n.durableNames[name] = c.node
			}
		}
	}
	n.changes = n.changes[:0]
	n.names = maps.Clone(n.durableNames)
	for _, name := range slices.Sorted(maps.Keys(n.names)) {
		d.lose(n.names[name])
	}
}

// changed gives each name in changes once, in order.
func changed(changes []simName) func(func(string) bool) {
	return func(yield func(string) bool) {
		for i, c := range changes {
			first := !slices.ContainsFunc(changes[:i], func(o simName) bool { return o.name == c.name })
			if first && !yield(c.name) {
				return
			}
		}
	}
}

// luck gives the share of what was not synced that survives: often all or none.
func (d *simDisk) luck() float64 {
	switch d.rng.IntN(4) {
	case 0:
		return 0
	case 1:
		return 1
	}
	return d.rng.Float64()
}

const simSector = 512

// survive gives what a power cut leaves of a file: of what was written since
// the last sync any sectors, one of them torn, in any of the sizes between.
func (d *simDisk) survive(n *simNode) []byte {
	b := n.durable
	if len(n.pending) == 0 {
		return b
	}
	kept := d.luck()
	size := len(b)
	for _, w := range n.pending {
		now := int(w.off)
		if w.data != nil {
			now = max(size, now+len(w.data))
			for at := 0; at < len(w.data); {
				end := min(len(w.data), at+simSector-(int(w.off)+at)%simSector)
				if d.rng.Float64() < kept {
					part := w.data[at:end]
					if d.rng.IntN(8) == 0 {
						part = part[:d.rng.IntN(len(part)+1)]
					}
					b = simWrite{w.off + int64(at), part}.apply(b)
				}
				at = end
			}
		}
		if d.rng.Float64() < kept {
			size = now
		}
	}
	return grow(b, size)[:size]
}
