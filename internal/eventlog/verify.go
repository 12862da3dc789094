package eventlog

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// FindingKind says in a word, which never changes, what Verify found.
type FindingKind string

// What is damage: something that castrad wrote is lost or changed, or something
// stands where castrad would not have put it.
const (
	BadChecksum FindingKind = "bad-checksum"       // a line is not as it was written
	NotRecord   FindingKind = "not-a-record"       // a line is nothing that castrad writes
	NULBytes    FindingKind = "nul-bytes"          // the same, and it has NUL bytes
	CutShort    FindingKind = "cut-short"          // a sealed segment ends inside a line
	OutOfOrder  FindingKind = "out-of-order"       // a record's number does not rise
	Hole        FindingKind = "hole"               // the host stream lacks numbers
	Differs     FindingKind = "differs-from-host"  // a VM's record is not the host stream's of that number
	Unknown     FindingKind = "not-in-host-stream" // a VM's record is newer than the host stream
	Stranger    FindingKind = "wrong-stream"       // a record is in the stream of a VM that it does not concern
	Missing     FindingKind = "missing"            // a VM's stream lacks records that the host's has
	Unreadable  FindingKind = "unreadable"         // the file system refuses
)

// What is only worth knowing: nothing that was acknowledged is concerned.
const (
	UnfinishedTail FindingKind = "unfinished-tail" // the newest segment ends inside a line
	Void           FindingKind = "void"            // left over from a write that failed
	Aside          FindingKind = "cut-aside"       // what a recovery cut off and kept
	Foreign        FindingKind = "foreign"         // neither a segment nor a directory of segments
)

// Finding is one thing that Verify has to say. Its JSON is what
// `castractl bus verify --json` prints; the keys are never renamed.
type Finding struct {
	Kind   FindingKind `json:"kind"`
	Damage bool        `json:"damage"`
	File   string      `json:"file"`
	Offset int64       `json:"offset"`         // bytes from the file's beginning
	Bytes  int64       `json:"bytes"`          // how many from there on are concerned
	From   uint64      `json:"from,omitempty"` // the records concerned, where their numbers are known
	To     uint64      `json:"to,omitempty"`
	What   string      `json:"what"` // a sentence without its full stop
}

// VerifyOptions say what Verify looks at.
type VerifyOptions struct {
	Dir    string // the host stream's directory
	VMDir  string // holds a directory a VM; "": none are looked at
	FS     FS     // nil: OS
	Sender string // as in PerVMOptions, and so is Owner
	Owner  func(topic []byte) (vm []byte, ok bool)

	window uint64 // 0: verifyWindow
}

// Verified tells how much Verify has read.
type Verified struct {
	Streams, Segments int
	Records           uint64 // whole ones, each copy counted
	Bytes             int64
	Damages           int // findings that are damage
}

const (
	// verifyWindow is how many of the host stream's records are remembered, by
	// their checksums, for the VMs' streams to be compared with: 4 bytes each.
	// Every file is read once, whatever the size of the log.
	verifyWindow = 1 << 21

	// verifyGrace is the least time that a line is given to be written to its end.
	verifyGrace = 300 * time.Millisecond

	noNumber = ^uint64(0) // beyond every record
)

// Verify reads the host stream and every VM's and tells found what is wrong. It
// changes nothing and may run beside the castrad that writes them: what is added
// meanwhile is left out. Its memory depends on the number of files, not on their
// sizes. The error says that it could not look at all; a file that cannot be
// read is a finding.
func Verify(o VerifyOptions, found func(Finding)) (Verified, error) {
	if o.FS == nil {
		o.FS = OS
	}
	if o.window == 0 {
		o.window = verifyWindow
	}
	bufp := buffers.Get().(*[]byte)
	defer buffers.Put(bufp)
	v := &verifier{opts: o, found: found, buf: *bufp, vms: make(map[string]*verified)}
	// In this order: what a VM's stream has, the host stream had before.
	if err := v.listVMs(); err != nil {
		return v.sum, err
	}
	v.host.dir = o.Dir
	if err := v.list(&v.host); err != nil {
		return v.sum, err
	}
	for more := true; more; {
		if v.host.at < len(v.host.segs) {
			v.base = max(v.host.resume, v.host.segs[v.host.at])
		}
		v.sums = v.sums[:0]
		limit := v.base + o.window
		if more = v.read(&v.host, limit, v.remember); !more {
			limit = noNumber
		}
		for _, name := range v.names {
			v.compare(v.vms[name], limit)
		}
	}
	v.settle()
	return v.sum, nil
}

type verifier struct {
	opts  VerifyOptions
	found func(Finding)
	sum   Verified
	buf   []byte

	host  verified
	names []string // of vms, sorted
	vms   map[string]*verified
	tails []verifiedTail

	// sums are the checksums of the host stream's records from base on; 0 where
	// there is none. One record in 2³² has that sum and goes uncompared.
	base uint64
	sums []uint32
}

// verified is one stream and how far it has been read.
type verified struct {
	vm     string // "": the host's
	dir    string
	segs   []uint64 // their first numbers
	at     int      // the segment to go on with,
	off    int64    // where in it,
	resume uint64   // and the number to be found there
	last   uint64   // the newest record read

	// As it was listed, VMs' only: the newest whole record, and the size of the
	// newest segment.
	newest     uint64
	newestSize int64

	// In this window: how many records the host stream has for this VM and how
	// many of those are here, both with their numbers added up; and whether some
	// could not be read, of which has been told.
	owed, have       uint64
	owedSum, haveSum uint64
	excused          bool
}

func (s *verified) path(i int) string { return filepath.Join(s.dir, segmentName(s.segs[i])) }

// verifiedTail is a line without an end at the end of a newest segment: just
// being written, or torn.
type verifiedTail struct {
	file      string
	off, size int64
}

func (v *verifier) tell(f Finding, format string, args ...any) {
	f.What = fmt.Sprintf(format, args...)
	switch f.Kind {
	case UnfinishedTail, Void, Aside, Foreign:
	default:
		f.Damage = true
		v.sum.Damages++
	}
	v.found(f)
}

func (v *verifier) unreadable(file string, err error) {
	v.tell(Finding{Kind: Unreadable, File: file}, "it cannot be read: %v", err)
}

func (v *verifier) listVMs() error {
	if v.opts.VMDir == "" {
		return nil
	}
	entries, err := v.opts.FS.ReadDir(v.opts.VMDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("listing the VMs' streams: %w", err)
	}
	for _, e := range entries {
		s := &verified{vm: e.Name(), dir: filepath.Join(v.opts.VMDir, e.Name())}
		if !e.IsDir() || isAside(e.Name()) {
			v.tell(Finding{Kind: Foreign, File: s.dir}, "it is no VM's stream; castrad passes it over")
			continue
		}
		if err := v.list(s); err != nil {
			v.unreadable(s.dir, err)
			continue
		}
		v.names = append(v.names, s.vm)
		v.vms[s.vm] = s
	}
	return nil
}

// list lists a stream's segments and tells of what else lies there.
func (v *verifier) list(s *verified) error {
	entries, err := v.opts.FS.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("listing segments: %w", err)
	}
	for _, e := range entries {
		first, ok := segmentFirst(e.Name())
		if ok && e.Type().IsRegular() {
			s.segs = append(s.segs, first)
			continue
		}
		f := Finding{Kind: Foreign, File: filepath.Join(s.dir, e.Name())}
		info, err := e.Info()
		switch seg, _, cut := strings.Cut(e.Name(), ".cut-"); {
		case err != nil: // gone meanwhile
		case cut && len(seg) == len(segmentName(1)) && strings.HasSuffix(seg, segmentSuffix):
			f.Kind, f.Bytes = Aside, info.Size()
			v.tell(f, "an unfinished write that castrad cut off when it started, kept aside; nothing in it was acknowledged")
		default:
			v.tell(f, "it is no segment; castrad passes it over")
		}
	}
	slices.Sort(s.segs)
	v.sum.Streams++
	v.sum.Segments += len(s.segs)
	if s.vm != "" && len(s.segs) > 0 {
		v.findNewest(s)
	}
	return nil
}

// findNewest notes where a VM's stream ends just now. What cannot be read here
// is told of when it is read in earnest.
func (v *verifier) findNewest(s *verified) {
	last := len(s.segs) - 1
	s.newest = s.segs[last] - 1 // should the newest segment hold nothing yet
	f, err := v.opts.FS.OpenFile(s.path(last), os.O_RDONLY, 0)
	if err != nil {
		return
	}
	defer func() { _ = f.Close() }() // opened for reading
	size, err := f.Size()
	if err != nil {
		return
	}
	s.newestSize = size
	for n := int64(4 << 10); ; n *= 16 { // most lines are short, and VMs may be many
		b := v.buf[:min(n, size, cursorBuffer)]
		if _, err := f.ReadAt(b, size-int64(len(b))); err != nil && !errors.Is(err, io.EOF) {
			return
		}
		for end := bytes.LastIndexByte(b, '\n'); end > 0; {
			start := bytes.LastIndexByte(b[:end], '\n')
			var rec Record
			if parseRecord(b[start+1:end], &rec, true) == nil {
				s.newest = rec.Seq
				return
			}
			end = start
		}
		if int64(len(b)) < n || n >= cursorBuffer {
			return
		}
	}
}

// remember takes in a record of the host stream.
func (v *verifier) remember(_ *verified, rec *Record, _ Finding) {
	for i := rec.Seq - v.base; uint64(len(v.sums)) < i; {
		v.sums = append(v.sums, 0)
	}
	v.sums = append(v.sums, sumOf(rec))
	v.host.excused = false // what was unreadable was not the end
	if string(rec.VM) != v.opts.Sender {
		v.vms[string(rec.VM)].owe(rec.Seq)
	}
	if vm, ok := v.opts.Owner(rec.Topic); ok && !bytes.Equal(vm, rec.VM) {
		v.vms[string(vm)].owe(rec.Seq)
	}
}

// owe notes that the host stream has the record seq for s.
func (s *verified) owe(seq uint64) {
	if s != nil && len(s.segs) > 0 && seq >= s.segs[0] && seq <= s.newest {
		s.owed++
		s.owedSum += seq
	}
}

// sumOf gives the checksum that a verified record carries.
func sumOf(rec *Record) uint32 {
	var sum uint32
	for _, c := range rec.Line[len(crcPrefix) : len(crcPrefix)+crcDigits] {
		sum = sum<<4 | uint32(c&0xf+c>>6*9) // lower-case hex
	}
	return sum
}

// compare reads a VM's stream up to limit and compares it with the host's.
func (v *verifier) compare(s *verified, limit uint64) {
	v.read(s, limit, v.match)
	if s.have < s.owed && !s.excused {
		at := Finding{Kind: Missing, File: s.dir}
		if missing := s.owed - s.have; missing == 1 {
			at.From = s.owedSum - s.haveSum
			at.To = at.From
			v.tell(at, "record %d of the host stream is missing here", at.From)
		} else {
			at.From, at.To = v.base, v.base+uint64(len(v.sums))-1
			v.tell(at, "%d records are missing here that the host stream has from %d to %d", missing, at.From, at.To)
		}
	}
	s.owed, s.have, s.owedSum, s.haveSum, s.excused = 0, 0, 0, 0, false
}

// match compares a record of a VM's stream with the host stream's.
func (v *verifier) match(s *verified, rec *Record, at Finding) {
	owner, owned := v.opts.Owner(rec.Topic)
	switch i := rec.Seq - v.base; {
	case string(rec.VM) != s.vm && !(owned && string(owner) == s.vm):
		at.Kind = Stranger
		v.tell(at, "record %d was neither published by %s nor sent to it", rec.Seq, s.vm)
	case v.host.at == len(v.host.segs) && rec.Seq > v.host.last && !v.host.excused:
		at.Kind = Unknown
		v.tell(at, "record %d is newer than the host stream, which ends with %d", rec.Seq, v.host.last)
	case rec.Seq < v.base || i >= uint64(len(v.sums)) || v.sums[i] == 0:
		// The host stream has lost it, which is told of there, or has expired it.
	default:
		if v.sums[i] != sumOf(rec) {
			at.Kind = Differs
			v.tell(at, "record %d is not the one that the host stream has under this number", rec.Seq)
		}
		s.have++
		s.haveSum += rec.Seq
	}
}
