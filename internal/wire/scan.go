package wire

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"unicode/utf8"
)

// scan checks JSON text (RFC 8259) more strictly than encoding/json: invalid
// UTF-8, lone surrogate escapes and nesting beyond maxLevel are faults.
//
// Its methods take the index of a value's first byte (where they say so, the one
// behind it) and give the index behind the value; -1 means a fault. Indexes are
// passed rather than kept so that they stay in registers.
type scan struct {
	b        []byte
	maxLevel int
	spaces   int    // bytes of insignificant white space so far
	fault    string // what is wrong, and
	at       int    // where
}

// fail notes the first fault and gives the index that stands for one.
func (s *scan) fail(at int, fault string) int {
	s.fault, s.at = fault, at
	return -1
}

func (s *scan) err() error {
	return fmt.Errorf("%w: %s at byte %d", ErrProtocol, s.fault, s.at)
}

// space skips white space from i on.
func (s *scan) space(i int) int {
	from := i
	for i < len(s.b) && (s.b[i] == ' ' || s.b[i] == '\n' || s.b[i] == '\r' || s.b[i] == '\t') {
		i++
	}
	s.spaces += i - from
	return i
}

// value checks the value at i, which lies in level many arrays and objects.
func (s *scan) value(i, level int) int {
	if i >= len(s.b) {
		return s.fail(i, "unexpected end")
	}
	switch s.b[i] {
	case '"':
		end, _ := s.str(i + 1)
		return end
	case '{':
		return s.object(i, level+1)
	case '[':
		return s.array(i, level+1)
	case '-', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9':
		return s.number(i)
	case 't':
		return s.literal(i, "true")
	case 'f':
		return s.literal(i, "false")
	case 'n':
		return s.literal(i, "null")
	}
	return s.fail(i, "no JSON value")
}

func (s *scan) literal(i int, word string) int {
	if len(s.b)-i < len(word) || string(s.b[i:i+len(word)]) != word {
		return s.fail(i, "no JSON value")
	}
	return i + len(word)
}

// array checks the array at i, which is itself at the level.
func (s *scan) array(i, level int) int {
	if level > s.maxLevel {
		return s.fail(i, "nesting too deep")
	}
	if i = s.space(i + 1); i < len(s.b) && s.b[i] == ']' {
		return i + 1
	}
	for {
		if i = s.value(i, level); i < 0 {
			return i
		}
		switch i = s.space(i); {
		case i >= len(s.b):
			return s.fail(i, "unexpected end")
		case s.b[i] == ']':
			return i + 1
		case s.b[i] != ',':
			return s.fail(i, "neither , nor ] after a value")
		}
		i = s.space(i + 1)
	}
}

// object checks the object at i, which is itself at the level.
func (s *scan) object(i, level int) int {
	if level > s.maxLevel {
		return s.fail(i, "nesting too deep")
	}
	if i = s.space(i + 1); i < len(s.b) && s.b[i] == '}' {
		return i + 1
	}
	for {
		if i >= len(s.b) || s.b[i] != '"' {
			return s.fail(i, "no key")
		}
		if i, _ = s.str(i + 1); i < 0 {
			return i
		}
		if i = s.colon(i); i < 0 {
			return i
		}
		if i = s.value(i, level); i < 0 {
			return i
		}
		switch i = s.space(i); {
		case i >= len(s.b):
			return s.fail(i, "unexpected end")
		case s.b[i] == '}':
			return i + 1
		case s.b[i] != ',':
			return s.fail(i, "neither , nor } after a member")
		}
		i = s.space(i + 1)
	}
}

// colon gives the index of the value that belongs to the key that ends at i.
func (s *scan) colon(i int) int {
	if i = s.space(i); i >= len(s.b) || s.b[i] != ':' {
		return s.fail(i, "no : after a key")
	}
	return s.space(i + 1)
}

// number checks the number at i, which begins with a digit or "-".
func (s *scan) number(i int) int {
	b := s.b
	if b[i] == '-' {
		i++
	}
	switch {
	case i < len(b) && b[i] == '0':
		i++
	case i < len(b) && isDigit(b[i]):
		i = digits(b, i)
	default:
		return s.fail(i, "bad number")
	}
	if i < len(b) && b[i] == '.' {
		from := i + 1
		if i = digits(b, from); i == from {
			return s.fail(i, "bad number")
		}
	}
	if i < len(b) && b[i]|0x20 == 'e' {
		i++
		if i < len(b) && (b[i] == '+' || b[i] == '-') {
			i++
		}
		from := i
		if i = digits(b, from); i == from {
			return s.fail(i, "bad number")
		}
	}
	return i
}

func isDigit(c byte) bool { return c-'0' <= 9 }

func digits(b []byte, i int) int {
	for i < len(b) && isDigit(b[i]) {
		i++
	}
	return i
}

// What a byte means inside a string; 0: it stands for itself.
const (
	strEnd     = 1 + iota // the closing quote
	strEscape             // a backslash
	strMulti              // part of a character of several bytes
	strControl            // must have been escaped
)

var stringClass = makeStringClass()

func makeStringClass() (t [256]uint8) {
	for c := range t {
		switch {
		case c == '"':
			t[c] = strEnd
		case c == '\\':
			t[c] = strEscape
		case c < 0x20:
			t[c] = strControl
		case c >= utf8.RuneSelf:
			t[c] = strMulti
		}
	}
	return t
}

// plainRun gives the index of the first byte from i on that a string cannot take
// as it comes, or where fewer than eight are left. It looks at eight at a time:
// subtracting 1 from each byte of a word sets the highest bit of one that was 0,
// or above 0x80, which counts here anyhow. A borrow spoils only bytes behind the
// first one found.
func plainRun(b []byte, i int) int {
	const ones, highs = 0x0101010101010101, 0x8080808080808080
	for ; i+8 <= len(b); i += 8 {
		w := binary.LittleEndian.Uint64(b[i:])
		quote, backslash := w^ones*'"', w^ones*'\\'
		found := ((quote - ones) | (backslash - ones) | (w - ones*' ') | w) & highs
		if found != 0 {
			return i + bits.TrailingZeros64(found)/8
		}
	}
	return i
}

// str checks the string whose opening quote is just before i, and reports
// whether escapes are in it.
func (s *scan) str(i int) (end int, escaped bool) {
	b := s.b
	for i = plainRun(b, i); i < len(b); {
		switch stringClass[b[i]] {
		case 0:
			i = plainRun(b, i+1)
		case strEnd:
			return i + 1, escaped
		case strEscape:
			n := escapeLen(b[i+1:])
			if n == 0 {
				return s.fail(i, "bad escape"), false
			}
			if n < 0 {
				return s.fail(i, "lone surrogate escape"), false
			}
			escaped = true
			i += 1 + n
		case strMulti:
			r, n := utf8.DecodeRune(b[i:])
			if r == utf8.RuneError && n == 1 {
				return s.fail(i, "invalid UTF-8"), false
			}
			i += n
		default:
			return s.fail(i, "control byte in a string"), false
		}
	}
	return s.fail(i, "unexpected end"), false
}

// escapeLen gives the length of the escape that b begins with, its backslash cut
// off: 0 where it is none, -1 where it is half of a surrogate pair.
func escapeLen(b []byte) int {
	if len(b) == 0 {
		return 0
	}
	switch b[0] {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		return 1
	case 'u':
		r := hex4(b[1:])
		switch {
		case r < 0:
			return 0
		case isLow(r):
			return -1
		case !isHigh(r):
			return 5
		case len(b) >= 7 && b[5] == '\\' && b[6] == 'u' && isLow(hex4(b[7:])):
			return 11
		}
		return -1
	}
	return 0
}
