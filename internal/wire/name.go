package wire

import (
	"strings"
	"unicode/utf8"
)

// What a byte may be part of.
const (
	inName  = 1 << iota // VM names and the names of subscriptions and cursors
	inTopic             // topics
	isAlnum             // letters and digits, with which a name begins
)

var classes = makeClasses()

func makeClasses() (t [256]uint8) {
	for c := range t {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
			t[c] = inName | inTopic | isAlnum
		case c == '.' || c == '_' || c == '-':
			t[c] = inName | inTopic
		case c == ':' || c == '/':
			t[c] = inTopic
		}
	}
	return t
}

// all reports whether every byte of s is of the class.
func all[T string | []byte](s T, class uint8) bool {
	for i := range len(s) {
		if classes[s[i]]&class == 0 {
			return false
		}
	}
	return true
}

func validName[T string | []byte](s T, limit int) bool {
	return 0 < len(s) && len(s) <= limit && classes[s[0]]&isAlnum != 0 && all(s, inName)
}

// ValidName reports whether s may name a VM: 1 to MaxName of A-Za-z0-9._- that
// begin with a letter or digit. It says nothing about Reserved.
func ValidName(s string) bool { return validName(s, MaxName) }

// Reserved reports whether name is the host's own, in any case.
func Reserved(name string) bool {
	// Not by EqualFold alone, to which "ho\u017ft" is the same: that is no name.
	return len(name) == len(ReservedName) && strings.EqualFold(name, ReservedName)
}

// ValidSubName reports whether s may name a subscription or a cursor: a VM
// name's characters, at most MaxSubName of them.
func ValidSubName[T string | []byte](s T) bool { return validName(s, MaxSubName) }

// ValidID reports whether s may be a publish's id: 1 to MaxID bytes of UTF-8.
func ValidID[T string | []byte](s T) bool {
	return 0 < len(s) && len(s) <= MaxID && utf8.ValidString(string(s))
}

const vmPrefix = "vm:"

// BrokerPrefix begins the topics that only the broker publishes on and only the
// host hears.
const BrokerPrefix = "castra."

// ValidTopic reports whether t may be published to: 1 to MaxTopic of
// A-Za-z0-9._:/- where what begins with "vm:" goes on with a VM's name and then
// ends, or goes on with "/" and at least one more byte.
func ValidTopic[T string | []byte](t T) bool {
	if len(t) == 0 || len(t) > MaxTopic || !all(t, inTopic) {
		return false
	}
	name, owned := TopicVM(t)
	endsInSlash := len(t) == len(vmPrefix)+len(name)+len("/")
	return !owned || len(name) > 0 && !endsInSlash
}

// TopicVM gives the VM to which a "vm:" topic or pattern belongs, and whether it
// is one at all. The name is empty where it is no VM's, as in the pattern "vm:*":
// such a topic belongs to no VM alone.
func TopicVM[T string | []byte](topic T) (name T, ok bool) {
	if len(topic) < len(vmPrefix) || string(topic[:len(vmPrefix)]) != vmPrefix {
		return name, false
	}
	rest, end := topic[len(vmPrefix):], 0
	for end < len(rest) && rest[end] != '/' {
		end++
	}
	if !validName(rest[:end], MaxName) {
		return name, true
	}
	return rest[:end], true
}
