package eventlog

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
)

// noteTail keeps the newest segment as it is before the log is opened.
func (c *crashLife) noteTail() {
	_, node, err := c.disk.find(c.opts.Dir)
	if err != nil || node == nil {
		return
	}
	c.tail, c.tailFile, c.tailSafe = nil, "", false
	for name, n := range node.names {
		if _, ok := segmentFirst(name); ok && name > c.tailFile {
			c.tailFile, c.tail, c.tailSafe = name, bytes.Clone(n.data), bytes.Equal(n.data, n.durable)
		}
	}
}

// checkCut looks for what a recovery has cut off that a crash then ended.
func (c *crashLife) checkCut() {
	_, node, err := c.disk.find(c.opts.Dir)
	if err != nil || node == nil {
		return
	}
	var asides [][]byte
	for name, n := range node.names {
		if strings.Contains(name, ".cut-") {
			asides = append(asides, n.data)
		}
	}
	lost := func(want []byte) bool {
		return !slices.ContainsFunc(asides, func(b []byte) bool { return bytes.Equal(b, want) })
	}
	for _, a := range c.asides {
		if lost(a) {
			c.violated("%d bytes that had been kept aside are gone", len(a))
		}
	}
	if n := node.names[c.tailFile]; c.tail != nil && c.tailSafe && n != nil && len(n.data) < len(c.tail) && lost(c.tail[len(n.data):]) {
		c.violated("%d bytes were cut off and not kept aside", len(c.tail)-len(n.data))
	}
}

func (c *crashLife) contents(path string) []byte {
	_, node, err := c.disk.find(path)
	if err != nil || node == nil {
		c.violated("%s is not there", path)
	}
	return node.data
}

func describe(rec *Record) string {
	return fmt.Sprintf("%s %s %s %s", rec.VM, rec.Topic, rec.ID, rec.Payload)
}

// checkRecovered compares the log that came back with what was promised.
func (c *crashLife) checkRecovered(l *Log, rec *Recovery) {
	if len(rec.Damaged) > 0 {
		c.violated("damage: %v", rec.Damaged)
	}
	if l.Lazy() { // then what was not synced may be lost
		if rec.Last < c.synced {
			c.violated("record %d was synced and is lost", c.synced)
		}
		for len(c.known) > int(rec.Last)+1 {
			c.forget(len(c.known) - 1)
		}
		c.synced = rec.Last
	}
	if rec.Last+1 < uint64(len(c.known)) {
		c.violated("record %d is lost; the last is %d", len(c.known)-1, rec.Last)
	}
	c.checkHost(l)
	for payload, what := range c.unknown {
		c.never[payload] = what
	}
	clear(c.unknown)
	c.checkIDs(l)
	for _, vm := range crashVMs[:3] {
		c.checkVM(l, vm)
	}
	if saved := l.perVM.saved.Load(); saved < c.saved && !l.Lazy() {
		c.violated("the copied position went back from %d to %d", c.saved, saved)
	}
	c.saved = l.perVM.saved.Load()
	if c.crashes%3 == 0 {
		c.checkVerify()
	}
}

func (c *crashLife) checkVerify() {
	if _, err := Verify(VerifyOptions{Dir: c.opts.Dir, VMDir: c.opts.PerVM.Dir, FS: c.disk, Sender: "host", Owner: c.opts.PerVM.Owner}, func(f Finding) {
		if f.Damage {
			c.violated("verify: %s at %d of %s: %s", f.Kind, f.Offset, f.File, f.What)
		}
	}); err != nil {
		c.violated("verify: %v", err)
	}
}

// forget takes the record seq out of what is promised.
func (c *crashLife) forget(seq int) {
	payload := payloadOf(c.known[seq])
	if vm, ok := withID(c.known[seq]); ok {
		c.fewer[vm]++
	}
	delete(c.stored, payload)
	c.never[payload] = c.known[seq]
	c.known = c.known[:seq]
}

// withID gives the VM of a record that has an id.
func withID(what string) (vm string, ok bool) {
	parts := strings.SplitN(what, " ", 4)
	return parts[0], parts[2] != ""
}

func payloadOf(what string) string { return what[strings.LastIndexByte(what, ' ')+1:] }

func (c *crashLife) checkHost(l *Log) {
	if oldest := l.Oldest(); oldest > max(1, c.oldest[c.opts.Dir]) {
		c.violated("the log begins with %d, and nothing from %d on has expired", oldest, c.oldest[c.opts.Dir])
	}
	r := l.NewReader(l.Oldest())
	defer r.Close()
	var rec Record
	for {
		ok, err := r.Next(&rec)
		if err != nil {
			c.violated("reading: %v", err)
		}
		if !ok {
			return
		}
		c.see(&rec)
	}
}

// see takes in a record that the log has given.
func (c *crashLife) see(rec *Record) {
	what := describe(rec)
	switch {
	case rec.Seq < uint64(len(c.known)):
		if c.known[rec.Seq] != what {
			c.violated("record %d was %q and is %q", rec.Seq, c.known[rec.Seq], what)
		}
	case rec.Seq > uint64(len(c.known)):
		c.violated("record %d follows %d", rec.Seq, len(c.known)-1)
	case c.unknown[string(rec.Payload)] != what:
		c.violated("record %d, %q, was not to be there", rec.Seq, what)
	default:
		c.know(what)
	}
}

func (c *crashLife) know(what string) {
	payload := payloadOf(what)
	if seq, ok := c.stored[payload]; ok {
		c.violated("%q is stored twice, as %d and %d", what, seq, len(c.known))
	}
	if vm, ok := withID(what); ok {
		c.fewer[vm] = max(0, c.fewer[vm]-1)
	}
	c.stored[payload] = uint64(len(c.known))
	c.known = append(c.known, what)
	delete(c.unknown, payload)
}

// checkIDs looks up each VM's newest ids, and those whose records were lost.
func (c *crashLife) checkIDs(l *Log) {
	for _, vm := range crashVMs {
		seqs := map[string]uint64{} // 0: not stored
		for _, used := range c.ids[vm] {
			seqs[used.id] = max(seqs[used.id], c.stored[used.payload])
		}
		newest := slices.Sorted(maps.Values(seqs))
		oldest := noNumber
		if i := max(0, len(newest)-crashIDWindow+c.fewer[vm]); i < len(newest) {
			oldest = newest[i]
		}
		for id, want := range seqs {
			if want > 0 && want < oldest {
				continue // it may be forgotten
			}
			if got, err := lookup(l, vm, id); err != nil || got != want {
				c.violated("the id %s of %s is record %d, and is looked up as %d (%v)", id, vm, want, got, err)
			}
		}
	}
}

// lookup gives the number that an id is known under, 0 if it is not.
func lookup(l *Log, vm, id string) (uint64, error) {
	b := &Batch{Entries: []Entry{{VM: vm, ID: []byte(id)}}}
	if err := l.perVM.ids.acquire(context.Background(), b); err != nil {
		return 0, err
	}
	defer l.perVM.ids.release(b)
	return l.perVM.ids.lookup(b, &b.Entries[0])
}

// checkVM compares a VM's stream with all that the host stream ever had for it.
func (c *crashLife) checkVM(l *Log, vm string) {
	st := &stream{fs: c.disk, dir: filepath.Join(c.opts.PerVM.Dir, vm)}
	if err := st.load(); err != nil {
		c.violated("the stream of %s: %v", vm, err)
	}
	r := &cursor{st: st, next: 1}
	defer r.close()
	got := map[uint64]string{}
	first := noNumber
	for {
		var rec Record
		if err := r.read(&rec); err != nil {
			break
		}
		first = min(first, rec.Seq)
		got[rec.Seq] = describe(&rec)
	}
	if r.damaged {
		c.violated("the stream of %s is damaged", vm)
	}
	from := max(1, min(first, c.oldest[st.dir]))
	for seq := from; seq < uint64(len(c.known)); seq++ {
		sender, rest, _ := strings.Cut(c.known[seq], " ")
		want := ""
		if topic, _, _ := strings.Cut(rest, " "); sender == vm || topic == "vm:"+vm || strings.HasPrefix(topic, "vm:"+vm+"/") {
			want = c.known[seq]
		}
		if got[seq] != want {
			c.violated("record %d of %s is %q in its stream, want %q", seq, vm, got[seq], want)
		}
	}
	for seq := range got {
		if seq >= uint64(len(c.known)) {
			c.violated("record %d of %s is not in the host stream", seq, vm)
		}
	}
}

func (c *crashLife) checkDuplicate(e *Entry) {
	for _, used := range slices.Backward(c.ids[e.VM]) {
		if used.id == string(e.ID) && c.stored[used.payload] == e.Seq && e.Seq != 0 {
			return
		}
	}
	c.violated("the id %s of %s is acknowledged as %d, which it is not", e.ID, e.VM, e.Seq)
}
