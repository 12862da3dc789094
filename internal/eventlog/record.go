package eventlog

import (
	"bytes"
	"encoding/json"
	"errors"
	"hash/crc32"
	"strconv"
	"time"
)

// A record is one line:
//
//	{"crc":"1c291ca3","synced":41,"seq":42,"time":"2026-11-23T21:03:00.123456Z","vm":"web1","topic":"t","id":"x","reply":"r","payload":null}
//
// crc is the CRC-32C (RFC 3720, appendix B.4) in lower-case hex of every byte
// between the comma behind it and the line's end. synced stands in the first
// record of a write only: the highest sequence number known durable just then.
// id and reply stand only where they were given.
const (
	crcPrefix  = `{"crc":"`
	crcDigits  = 8
	crcCovered = len(crcPrefix) + crcDigits + len(`",`) // first byte that crc covers

	timeLayout = "2006-01-02T15:04:05.000000Z" // RFC 3339, UTC, microseconds: always 27 bytes
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errBadRecord says that a line is no record: damaged, cut short or foreign.
var errBadRecord = errors.New("not a valid record")

// Record is a stored record. Its byte slices alias a buffer that is used again: they are
// valid for as long as whoever gave the record says.
type Record struct {
	Seq     uint64
	Time    []byte // RFC 3339, UTC, microseconds
	VM      []byte // the sender
	Topic   []byte
	ID      []byte // as JSON, quotes included; nil: none was given
	Reply   []byte // a topic; nil: none was given
	Payload []byte // one compact JSON value
	// Body is the line from `"seq":` to the closing brace: everything that a
	// delivery carries, so that a delivery is a prefix and one copy.
	Body []byte
	// Line is the whole line without its newline.
	Line []byte
	// Synced is the durable mark that the line carries; 0: none.
	Synced uint64
}

// When gives the record's time; the zero time where it cannot be parsed.
func (r *Record) When() time.Time {
	t, err := time.Parse(timeLayout, string(r.Time))
	if err != nil {
		return time.Time{}
	}
	return t
}

// appendRecord appends e's line, newline included.
func appendRecord(dst []byte, e *Entry, seq, synced uint64, when string) []byte {
	start := len(dst)
	dst = append(dst, `{"crc":"00000000",`...)
	if synced != 0 {
		dst = append(dst, `"synced":`...)
		dst = strconv.AppendUint(dst, synced, 10)
		dst = append(dst, ',')
	}
	dst = append(dst, `"seq":`...)
	dst = strconv.AppendUint(dst, seq, 10)
	dst = append(dst, `,"time":"`...)
	dst = append(dst, when...)
	dst = append(dst, `","vm":"`...)
	dst = append(dst, e.VM...)
	dst = append(dst, `","topic":"`...)
	dst = append(dst, e.Topic...)
	dst = append(dst, '"')
	if len(e.ID) > 0 {
		dst = append(dst, `,"id":`...)
		dst = appendQuoted(dst, e.ID)
	}
	if len(e.Reply) > 0 {
		dst = append(dst, `,"reply":"`...)
		dst = append(dst, e.Reply...)
		dst = append(dst, '"')
	}
	dst = append(dst, `,"payload":`...)
	if len(e.Payload) == 0 {
		dst = append(dst, `null`...)
	} else {
		dst = append(dst, e.Payload...)
	}
	dst = append(dst, '}')
	line := dst[start:]
	putHex(line[len(crcPrefix):len(crcPrefix)+crcDigits], crc32.Checksum(line[crcCovered:], castagnoli))
	return append(dst, '\n')
}

// recordOverhead is an upper bound of what a line holds beside the values of
// its entry: names, punctuation, crc, two 20-digit numbers and the time.
const recordOverhead = 224

// appendQuoted appends s, a string of valid UTF-8, as JSON.
func appendQuoted(dst, s []byte) []byte {
	for _, c := range s {
		if c < 0x20 || c >= 0x7f || c == '"' || c == '\\' {
			q, err := json.Marshal(string(s))
			if err != nil { // a string always marshals
				return append(dst, `""`...)
			}
			return append(dst, q...)
		}
	}
	dst = append(dst, '"')
	dst = append(dst, s...)
	return append(dst, '"')
}

func putHex(dst []byte, v uint32) {
	const digits = "0123456789abcdef"
	for i := range crcDigits {
		dst[i] = digits[v>>(28-4*i)&0xf]
	}
}

// parseRecord takes a line without its newline apart. With verify the checksum
// is computed and compared byte by byte: hex read without regard to case would
// miss a flipped bit 5.
func parseRecord(line []byte, rec *Record, verify bool) error {
	if len(line) < crcCovered || string(line[:len(crcPrefix)]) != crcPrefix ||
		line[crcCovered-2] != '"' || line[crcCovered-1] != ',' {
		return errBadRecord
	}
	rest := line[crcCovered:]
	if verify {
		var want [crcDigits]byte
		putHex(want[:], crc32.Checksum(rest, castagnoli))
		if string(want[:]) != string(line[len(crcPrefix):len(crcPrefix)+crcDigits]) {
			return errBadRecord
		}
	}
	*rec = Record{Line: line}
	var ok bool
	if after, found := bytes.CutPrefix(rest, []byte(`"synced":`)); found {
		if rec.Synced, rest, ok = cutUint(after); !ok || len(rest) == 0 || rest[0] != ',' {
			return errBadRecord
		}
		rest = rest[1:]
	}
	rec.Body = rest
	if rest, ok = bytes.CutPrefix(rest, []byte(`"seq":`)); !ok {
		return errBadRecord
	}
	if rec.Seq, rest, ok = cutUint(rest); !ok || rec.Seq == 0 {
		return errBadRecord
	}
	if rec.Time, rest, ok = cutString(rest, `,"time":"`); !ok {
		return errBadRecord
	}
	if rec.VM, rest, ok = cutString(rest, `,"vm":"`); !ok {
		return errBadRecord
	}
	if rec.Topic, rest, ok = cutString(rest, `,"topic":"`); !ok {
		return errBadRecord
	}
	if after, found := bytes.CutPrefix(rest, []byte(`,"id":`)); found {
		end := quotedEnd(after)
		if end < 0 {
			return errBadRecord
		}
		rec.ID, rest = after[:end], after[end:]
	}
	if reply, after, found := cutString(rest, `,"reply":"`); found {
		rec.Reply, rest = reply, after
	}
	if rest, ok = bytes.CutPrefix(rest, []byte(`,"payload":`)); !ok || len(rest) < 2 || rest[len(rest)-1] != '}' {
		return errBadRecord
	}
	rec.Payload = rest[:len(rest)-1]
	return nil
}

// cutUint takes a decimal number from the front of b.
func cutUint(b []byte) (v uint64, rest []byte, ok bool) {
	i := 0
	for i < len(b) && b[i]-'0' <= 9 {
		if i == 20 {
			return 0, b, false
		}
		v = v*10 + uint64(b[i]-'0')
		i++
	}
	return v, b[i:], i > 0
}

// cutString takes prefix and then everything up to the next quote, which it
// drops, from the front of b. Only values that never need escaping are read so.
func cutString(b []byte, prefix string) (val, rest []byte, ok bool) {
	if len(b) < len(prefix) || string(b[:len(prefix)]) != prefix {
		return nil, b, false
	}
	b = b[len(prefix):]
	i := bytes.IndexByte(b, '"')
	if i < 0 {
		return nil, b, false
	}
	return b[:i], b[i+1:], true
}

// quotedEnd gives the length of the JSON string at the front of b, -1 if there
// is none.
func quotedEnd(b []byte) int {
	if len(b) == 0 || b[0] != '"' {
		return -1
	}
	for i := 1; i < len(b); i++ {
		switch b[i] {
		case '\\':
			i++
		case '"':
			return i + 1
		}
	}
	return -1
}
