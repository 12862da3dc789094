package wire

import (
	"strings"
	"unicode/utf8"
)

// unhex gives a hex digit's value; more than 15: the byte is none.
var unhex = makeUnhex()

func makeUnhex() (t [256]uint8) {
	for c := range t {
		switch {
		case '0' <= c && c <= '9':
			t[c] = uint8(c - '0')
		case 'a' <= c && c <= 'f':
			t[c] = uint8(c - 'a' + 10)
		case 'A' <= c && c <= 'F':
			t[c] = uint8(c - 'A' + 10)
		default:
			t[c] = 0xff
		}
	}
	return t
}

const hexDigits = "0123456789abcdef"

// AppendString appends s as a JSON string with its quotes. What is not UTF-8 in
// it becomes U+FFFD, byte by byte: a name that somebody made up must not break
// the line of JSON that mentions it.
func AppendString[T string | []byte](dst []byte, s T) []byte {
	dst = append(dst, '"')
	from := 0 // what lies before is appended
	for i := 0; i < len(s); {
		c := s[i]
		if stringClass[c] == 0 && c != 0x7f {
			i++
			continue
		}
		if c >= utf8.RuneSelf {
			// At most one rune's bytes, so that the conversion stays on the stack.
			r, n := utf8.DecodeRuneInString(string(s[i:min(i+utf8.UTFMax, len(s))]))
			if r != utf8.RuneError || n > 1 {
				i += n
				continue
			}
		}
		dst = append(dst, s[from:i]...)
		dst = appendEscape(dst, c)
		i++
		from = i
	}
	dst = append(dst, s[from:]...)
	return append(dst, '"')
}

// appendEscape appends what stands for c, which cannot stand for itself.
func appendEscape(dst []byte, c byte) []byte {
	switch c {
	case '"', '\\':
		return append(dst, '\\', c)
	case '\b':
		return append(dst, `\b`...)
	case '\f':
		return append(dst, `\f`...)
	case '\n':
		return append(dst, `\n`...)
	case '\r':
		return append(dst, `\r`...)
	case '\t':
		return append(dst, `\t`...)
	}
	if c >= utf8.RuneSelf {
		return append(dst, "\uFFFD"...)
	}
	return append(dst, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&0xf])
}

// unescape replaces the escapes in b, the inside of a string that scan.str has
// accepted, in place and gives what is left: an escape is never shorter than
// what it stands for.
func unescape(b []byte) []byte {
	w := 0
	for i := 0; i < len(b); {
		c := b[i]
		if c != '\\' {
			b[w] = c
			w, i = w+1, i+1
			continue
		}
		c = b[i+1]
		i += 2
		switch c {
		case 'b':
			c = '\b'
		case 'f':
			c = '\f'
		case 'n':
			c = '\n'
		case 'r':
			c = '\r'
		case 't':
			c = '\t'
		case 'u':
			r := hex4(b[i:])
			i += 4
			if isHigh(r) {
				r = 0x10000 + (r-surrogateHigh)<<10 + hex4(b[i+2:]) - surrogateLow
				i += 6
			}
			w += utf8.EncodeRune(b[w:], r)
			continue
		}
		b[w] = c
		w++
	}
	return b[:w]
}

// UTF-16's surrogates (RFC 8259, section 7): a character beyond U+FFFF is
// escaped as a high one followed by a low one.
const (
	surrogateHigh = 0xd800 // to 0xdbff
	surrogateLow  = 0xdc00 // to 0xdfff
)

func isHigh(r rune) bool { return surrogateHigh <= r && r < surrogateLow }
func isLow(r rune) bool  { return surrogateLow <= r && r <= 0xdfff }

// hex4 gives the value of the four hex digits that b begins with; -1: it does
// not.
func hex4(b []byte) rune {
	if len(b) < 4 || unhex[b[0]]|unhex[b[1]]|unhex[b[2]]|unhex[b[3]] > 15 {
		return -1
	}
	return rune(unhex[b[0]])<<12 | rune(unhex[b[1]])<<8 | rune(unhex[b[2]])<<4 | rune(unhex[b[3]])
}

// Clip keeps what a peer sent short enough for a message.
func Clip(b []byte) string {
	const most = 64 // bytes
	if len(b) > most {
		return strings.ToValidUTF8(string(b[:most]), "") + "…"
	}
	return string(b)
}
