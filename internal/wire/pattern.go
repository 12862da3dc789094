package wire

import (
	"errors"
	"fmt"
	"strings"
)

// Topics live in three spaces, and a pattern selects topics of one alone: so
// that ">" means everything shared, and hears no VM's own topics by accident.
type space uint8

const (
	spaceShared space = iota
	spaceCastra       // "castra.": what the broker publishes
	spaceVM           // "vm:": each VM's own
)

// Pattern selects topics. The zero value selects none.
type Pattern struct {
	text  string
	space space
	// Behind the space's prefix: in spaceVM a VM's name, "*" or ">", and, behind
	// a "/", the tokens of rest; else only rest.
	name    string
	hasRest bool
	rest    string
	literal bool
}

// ParsePattern parses a topic in which "*" may stand for one whole token between
// dots and, at the end, ">" for one or more. What follows a spelled-out
// "castra." or "vm:<name>/" is split into tokens on its own. The name in a "vm:"
// pattern may be "*", any one VM, or ">", every "vm:" topic.
func ParsePattern(s string) (Pattern, error) {
	p, err := parsePattern(s)
	if err != nil {
		return Pattern{}, fmt.Errorf("parsing the pattern %.*q: %w", MaxTopic, s, err)
	}
	return p, nil
}

var (
	errPatternText = fmt.Errorf("a pattern is 1 to %d of A-Za-z0-9._:/-, * and >", MaxTopic)
	errPatternVM   = errors.New(`"vm:" is followed by a VM's name, * or >, and then by nothing or / and more`)
	errPatternWild = errors.New("* stands for one whole token between dots, and > for whole ones at the end")
)

func parsePattern(s string) (Pattern, error) {
	p := Pattern{text: s, hasRest: true, rest: s}
	if len(s) == 0 || len(s) > MaxTopic {
		return p, errPatternText
	}
	wild := false
	for i := range len(s) {
		switch {
		case s[i] == '*' || s[i] == '>':
			wild = true
		case classes[s[i]]&inTopic == 0:
			return p, errPatternText
		}
	}
	p.literal = !wild
	if rest, ok := strings.CutPrefix(s, vmPrefix); ok {
		p.space = spaceVM
		p.name, p.rest, p.hasRest = strings.Cut(rest, "/")
		if p.hasRest && p.rest == "" || p.name != "*" && p.name != ">" && !ValidName(p.name) {
			return p, errPatternVM
		}
		if p.hasRest && p.name == ">" {
			return p, errPatternWild
		}
	} else if rest, ok := strings.CutPrefix(s, BrokerPrefix); ok {
		p.space, p.rest = spaceCastra, rest
	}
	if !wild || !p.hasRest {
		return p, nil
	}
	for more, rest := true, p.rest; more; {
		var token string
		token, rest, more = strings.Cut(rest, ".")
		if len(token) > 1 && strings.ContainsAny(token, "*>") || token == ">" && more {
			return p, errPatternWild
		}
	}
	return p, nil
}

// Match reports whether the pattern selects the topic. It does not allocate.
func (p Pattern) Match(topic string) bool {
	if p.literal || p.text == "" {
		return p.literal && p.text == topic
	}
	if rest, ok := strings.CutPrefix(topic, vmPrefix); ok {
		return p.space == spaceVM && p.matchVM(rest)
	}
	if rest, ok := strings.CutPrefix(topic, BrokerPrefix); ok {
		return p.space == spaceCastra && matchTokens(p.rest, rest)
	}
	return p.space == spaceShared && matchTokens(p.rest, topic)
}

func (p Pattern) matchVM(topic string) bool {
	if p.name == ">" {
		return true
	}
	name, rest, hasRest := strings.Cut(topic, "/")
	if p.name != "*" && p.name != name || p.hasRest != hasRest {
		return false
	}
	return !hasRest || matchTokens(p.rest, rest)
}

// matchTokens compares token by token. An empty token is a token like any other.
func matchTokens(pattern, topic string) bool {
	for {
		want, wants, wantMore := strings.Cut(pattern, ".")
		if want == ">" {
			return true
		}
		have, haves, haveMore := strings.Cut(topic, ".")
		if want != "*" && want != have || wantMore != haveMore {
			return false
		}
		if !wantMore {
			return true
		}
		pattern, topic = wants, haves
	}
}

// Literal reports whether the pattern is a plain topic, without a wildcard.
func (p Pattern) Literal() bool { return p.literal }

// String gives the pattern as it was parsed.
func (p Pattern) String() string { return p.text }

// VM gives the VM whose "vm:" topics alone the pattern can select, and whether it
// selects "vm:" topics at all. The name is empty where it may select several
// VMs': no guest has a right to that.
func (p Pattern) VM() (name string, ok bool) { return TopicVM(p.text) }
