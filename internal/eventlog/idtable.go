package eventlog

import (
	"container/list"
	"crypto/sha256"
	"encoding/binary"
	"unsafe"
)

const (
	idHash  = 16         // bytes of an id's SHA-256 that stand for it
	idEntry = idHash + 8 // of the file: the hash, then seq, big-endian
)

type idKey [idHash]byte

func hashID(id []byte) idKey {
	sum := sha256.Sum256(id)
	return idKey(sum[:idHash])
}

// idTable is the newest ids of one VM: 24 bytes each in the order of their
// numbers, and 4 to 8 in a hash table of their places.
type idTable struct {
	vm    string
	ready chan struct{} // closed when it is loaded
	err   error         // why it could not be; valid once ready is closed

	entries []idSeq
	index   []uint32 // place in entries plus one, 0: free; linear probing, a power of two long
	last    uint64   // the newest number in it
	fresh   int      // ids at the end whose records are not committed yet

	// Under idIndex.mu.
	pins    int // batches under way that need it
	counted int // bytes of it in idIndex.bytes
	elem    *list.Element
	gone    chan struct{} // closed when it is dropped; nil: it is not to make room
}

type idSeq struct {
	key idKey
	seq uint64
}

// size gives the bytes that t takes.
func (t *idTable) size() int {
	const fixed = 256 // itself, its places in a map and a list, its channel
	return fixed + len(t.vm) + cap(t.entries)*int(unsafe.Sizeof(idSeq{})) + 4*len(t.index)
}

// fill takes in a file's entries.
func (t *idTable) fill(data []byte) {
	t.entries = make([]idSeq, 0, len(data)/idEntry)
	for ; len(data) > 0; data = data[idEntry:] {
		t.entries = append(t.entries, idSeq{idKey(data), binary.BigEndian.Uint64(data[idHash:])})
	}
	if n := len(t.entries); n > 0 {
		t.last = t.entries[n-1].seq
	}
	t.reindex(0)
}

// reindex makes the index anew, at least size long.
func (t *idTable) reindex(size int) {
	size = max(size, 8)
	for size*2 < len(t.entries)*3 {
		size *= 2
	}
	if len(t.index) == size {
		clear(t.index)
	} else {
		t.index = make([]uint32, size)
	}
	for i := range t.entries {
		t.place(i)
	}
}

// slot gives where in the index to look for key first.
func (t *idTable) slot(key *idKey) int {
	return int(binary.LittleEndian.Uint32(key[:])) & (len(t.index) - 1)
}

func (t *idTable) place(i int) {
	s := t.slot(&t.entries[i].key)
	for t.index[s] != 0 {
		s = (s + 1) & (len(t.index) - 1)
	}
	t.index[s] = uint32(i) + 1
}

// find gives the number of the record with this id, 0 if there is none.
func (t *idTable) find(key idKey) uint64 {
	for s := t.slot(&key); t.index[s] != 0; s = (s + 1) & (len(t.index) - 1) {
		if e := &t.entries[t.index[s]-1]; e.key == key {
			return e.seq
		}
	}
	return 0
}

// add remembers an id that find does not. When the table is a quarter larger
// than the window the oldest go, so that the index is made anew seldom; those that
// may yet be undone do not count, or as many would be missing then.
func (t *idTable) add(key idKey, seq uint64, window int) {
	spare := max(1, window/4)
	n, keep := len(t.entries), window+t.fresh
	if n >= window+spare && n-keep >= (spare+1)/2 {
		n = copy(t.entries, t.entries[n-keep:])
		t.entries = t.entries[:n]
		t.reindex(len(t.index))
	}
	if n == cap(t.entries) {
		room := min(window+spare, max(4, 2*n))
		if n >= room {
			room = n + spare
		}
		t.entries = append(make([]idSeq, 0, room), t.entries...)
	}
	t.entries = append(t.entries, idSeq{key, seq})
	t.last = max(t.last, seq)
	if len(t.index)*2 < len(t.entries)*3 {
		t.reindex(2 * len(t.index))
	} else {
		t.place(len(t.entries) - 1)
	}
}

// undo forgets the ids whose records are not committed.
func (t *idTable) undo() {
	t.entries, t.last = t.entries[:len(t.entries)-t.fresh], 0
	if n := len(t.entries); n > 0 {
		t.last = t.entries[n-1].seq
	}
	t.reindex(len(t.index))
}
