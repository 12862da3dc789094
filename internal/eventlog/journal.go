package eventlog

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// The journal is a file of a fixed size that is written over from its beginning
// again and again: that syncs faster than an append, whose length is one more
// block to write. Small commits go to the segment, unsynced, and to the journal,
// synced. When it is full the segment is synced, and the journal begins anew: a
// round. docs/EVENTLOG.md has the format, and what is made of it after a crash.
const (
	journalHead   = "castra journal 1 boot "
	bootDigits    = 32
	journalStart  = len(journalHead) + bootDigits + 1 // the first entry
	journalHeader = 20 + 1 + 20 + 1 + 10 + 1 + 20 + 1 + crcDigits + 1

	// journalRead bounds what is read of a file that may be anything.
	journalRead = 4 << 20
)

// journalRoom is how large a journal is, a multiple of block; the largest commit that goes
// to it; and what is written of it at least, from a multiple of that on: in bytes.
type journalRoom struct{ size, most, block int }

// wholeJournal is what a log has. Larger commits lose more by being written twice than they
// gain, and a larger journal gains nothing.
var wholeJournal = journalRoom{2 << 20, 512 << 10, ioBlock}

// noBoot in the place of the boot's name says that the segment does not have what
// the journal has, whichever boot it is.
var noBoot = strings.Repeat("0", bootDigits)

// journal is the journal of a log. The zero value is none.
type journal struct {
	fs   FS
	path string // "": none
	boot string // this run of the kernel; "": not known, so none is written
	room journalRoom
	lazy bool // none is written

	file File // nil: there is none just now
	at   int64
	head []byte // the first block as it was written last
	tail []byte // from the block on in which at is; all before at is in the file
	// taken: somebody has taken the file away, or cut it, so that no start would find what
	// it has. The next segment has another one.
	taken bool

	// ahead: the segment's bytes from a commit on, up to the committed size, are
	// synced in the journal alone. lost: the segment's sync has failed meanwhile, so
	// that they may be nowhere else.
	ahead, lost bool
	// stale: a start would take what is at path, or may come back there, for what
	// the log acknowledged, and it is not. Nothing may be appended before it is gone.
	stale bool
}

// journaled is what a journal holds: bytes of a segment, one entry behind the other.
type journaled struct {
	boot    string
	segment uint64 // the first number of the segment
	from    int64  // where in it they belong
	data    []byte
	written int64 // when all of them had been written to the segment (ns since 1970)
	// behind are the entries that come after one that is damaged, or are left of earlier
	// rounds.
	behind []place
}

// place is where bytes of a segment end.
type place struct {
	segment uint64
	end     int64
}

// appendEntry appends the entry for data, which stands at off in the segment.
func appendEntry(dst []byte, segment uint64, off, written int64, data []byte) []byte {
	start := len(dst)
	dst = fmt.Appendf(dst, "%020d %020d %010d %020d ", segment, off, len(data), written)
	sum := crc32.Update(crc32.Checksum(dst[start:], castagnoli), castagnoli, data)
	return append(fmt.Appendf(dst, "%0*x\n", crcDigits, sum), data...)
}

// parseEntry takes an entry from the front of b; its length is 0 where there is none.
func parseEntry(b []byte) (e journaled, length int) {
	if len(b) < journalHeader {
		return e, 0
	}
	var n int64
	var errs [4]error
	e.segment, errs[0] = strconv.ParseUint(string(b[:20]), 10, 64)
	e.from, errs[1] = strconv.ParseInt(string(b[21:41]), 10, 64)
	n, errs[2] = strconv.ParseInt(string(b[42:52]), 10, 64)
	e.written, errs[3] = strconv.ParseInt(string(b[53:73]), 10, 64)
	if errors.Join(errs[:]...) != nil || n < 1 || n > int64(len(b)-journalHeader) || e.from < 0 {
		return journaled{}, 0
	}
	length = journalHeader + int(n)
	e.data = b[journalHeader:length]
	if !bytes.Equal(b[:length], appendEntry(nil, e.segment, e.from, e.written, e.data)) {
		return journaled{}, 0
	}
	return e, length
}

// parseJournal gives what the newest round has in a journal of the bytes b, as far as
// it was written. What is left of earlier rounds is not taken for a part of it: in the
// same segment it belongs before where this round began, and each entry must go on
// where the one before it ended. Nor is anything that a guest made up: a line of the
// log ends with a brace, and an entry's first line with a digit.
func parseJournal(b []byte) (j journaled, ok bool) {
	if len(b) < journalStart || string(b[:len(journalHead)]) != journalHead || b[journalStart-1] != '\n' {
		return j, false
	}
	j.boot = string(b[len(journalHead) : journalStart-1])
	for b = b[journalStart:]; ; {
		e, n := parseEntry(b)
		if len(j.data) == 0 {
			j.segment, j.from = e.segment, e.from
		}
		if n == 0 || e.segment != j.segment || e.from != j.from+int64(len(j.data)) {
			break
		}
		j.data, j.written = append(j.data, e.data...), e.written
		b = b[n:]
	}
	for len(b) > 0 {
		var e journaled
		n := 0
		if b[0] >= '0' && b[0] <= '9' { // most of it is newlines, and a start is not to wait
			e, n = parseEntry(b)
		}
		if n > 0 {
			j.behind = append(j.behind, place{e.segment, e.from + int64(len(e.data))})
		} else {
			n = bytes.IndexByte(b, '\n') + 1
		}
		if n == 0 {
			break
		}
		b = b[n:]
	}
	return j, true
}

// open reads what an earlier run has left. An error says that it left something that
// cannot be read, at least not all of it.
func (j *journal) open() (found journaled, err error) {
	if j.path == "" {
		return found, nil
	}
	var aside string
	f, err := openOwn(j.fs, j.path, os.O_RDWR, func(_, name string) { aside = name })
	switch {
	case aside != "":
		return found, fmt.Errorf("the journal %s is no file and now %s", j.path, aside)
	case errors.Is(err, fs.ErrNotExist):
		return found, nil
	}
	j.stale = true // until there is a new one
	j.head = alignedBytes(j.room.block)
	fill(j.head)
	if err == nil {
		j.file = f
		found, err = j.read(j.head)
	}
	if err != nil {
		err = fmt.Errorf("reading the journal %s: %w", j.path, err)
	}
	return found, err
}

// read gives what the journal has, as far as it can be read, and its first block to head.
func (j *journal) read(head []byte) (journaled, error) {
	size, err := j.file.Size()
	if err != nil {
		return journaled{}, err
	}
	b, err := readBlocks(j.file, int(min(size, journalRead)), j.room.block)
	found, ok := parseJournal(b)
	if !ok && err == nil {
		err = errors.New("it is none of version 1")
	}
	copy(head, b)
	return found, err
}

// renew puts an empty journal in the place of whatever is there, or nothing where that
// cannot be, for want of room most likely. The error says that what is there remains.
func (j *journal) renew() error {
	if j.path == "" {
		return nil
	}
	j.close()
	j.taken = false
	if j.boot != "" && !j.lazy {
		j.stale = true // some of what follows may be done, and then an error come
		if j.create() == nil {
			j.stale = false
			return nil
		}
	}
	return j.void()
}

func (j *journal) create() error {
	b := bytes.Repeat(newline, j.room.size) // no NULs: people read what is in log_dir
	copy(b, journalHead+j.boot+"\n")
	if err := Replace(j.fs, j.path, b); err != nil {
		_ = j.fs.Remove(j.path + ".tmp") // it may have taken the last room
		return err
	}
	j.head = alignedBytes(j.room.block)
	copy(j.head, b)
	j.tail = alignedBytes(j.room.block + roundUp(journalHeader+min(j.room.most, j.room.size), j.room.block))
	f, err := openDirect(j.fs, j.path, j.head)
	if err != nil {
		return err
	}
	j.file = f
	j.begin()
	return nil
}

// begin begins a round: all that is in the segment is durable there.
func (j *journal) begin() {
	j.at, j.ahead = int64(journalStart), false
	copy(j.tail, j.head)
}

// void makes durable that a stale journal is gone.
func (j *journal) void() error {
	if !j.stale {
		return nil
	}
	j.close()
	err := j.fs.Remove(j.path)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		err = j.fs.SyncDir(filepath.Dir(j.path))
	}
	if err != nil {
		return fmt.Errorf("removing the old journal: %w", err)
	}
	j.stale = false
	return nil
}

// gone tells whether somebody has taken the journal's file away, or cut it.
func (j *journal) gone() bool {
	if j.file == nil {
		return false
	}
	removed, err := j.file.Removed()
	if err != nil || removed {
		return removed
	}
	size, err := j.file.Size()
	return err == nil && size < int64(j.room.size)
}

// takes tells whether a commit of n bytes goes to the journal.
func (j *journal) takes(n int) bool {
	return j.file != nil && !j.taken && n <= j.room.most && j.at+int64(journalHeader+n) <= int64(j.room.size)
}

// add makes durable that data stands at off in the segment. Blocks are written as a whole,
// past the page cache where that can be: a block that holds other entries holds them again.
func (j *journal) add(segment uint64, off, written int64, data []byte) error {
	block := j.room.block
	used := int(j.at) % block
	end := len(appendEntry(j.tail[:used], segment, off, written, data))
	n := roundUp(end, block)
	fill(j.tail[end:n])
	_, err := j.file.WriteAt(j.tail[:n], j.at-int64(used))
	if err == nil {
		err = j.file.Sync()
	}
	if err != nil {
		j.stale = true // it may hold what is about to be refused
		return fmt.Errorf("writing the journal: %w", err)
	}
	if j.at < int64(block) {
		copy(j.head, j.tail)
	}
	copy(j.tail, j.tail[end-end%block:end])
	j.at, j.ahead = j.at+int64(end-used), true
	return nil
}

// mark makes boot the one that a start finds. That is another one after a power cut anyway,
// so it is not synced.
func (j *journal) mark(boot string) error {
	if j.file == nil {
		return nil
	}
	copy(j.head[len(journalHead):], boot)
	_, err := j.file.WriteAt(j.head, 0)
	return err
}

func (j *journal) close() {
	if j.file != nil {
		_ = j.file.Close() // what was synced is durable, and the rest is void
		j.file = nil
	}
}

// end removes the journal of a log that is closed, unless a start needs it.
func (j *journal) end() error {
	if j.file == nil {
		return nil
	}
	j.close()
	if j.lost {
		return nil
	}
	if err := j.fs.Remove(j.path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil // somebody has removed it already
}
