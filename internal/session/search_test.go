package session

import (
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bubble"
	"github.com/castrabus/castra/internal/eventlog"
)

// looking is a subscription to the topic t that looks for its place.
func looking(t *testing.T, s *Session) *Subscription {
	t.Helper()
	sub, err := s.newSubscription("t", "t", "")
	if err != nil {
		t.Fatal(err)
	}
	return sub
}

// What a search has come to that was given up on, and what has been heard since, are at
// least as many records as were asked for, and all of those if there are fewer; never
// twice as many.
func TestSearchGoesOn(t *testing.T) {
	const n = 3
	for before := range uint64(n + 2) {
		s, _ := alone(t)
		s.guest = lookingUp{}
		var seqs []uint64 // those on the topic
		seq := uint64(0)
		publish := func(topic string) {
			t.Helper()
			seq++
			if err := s.opts.Log.Append(t.Context(), &eventlog.Batch{Entries: []eventlog.Entry{{VM: "a", Topic: []byte(topic)}}}); err != nil {
				t.Fatal(err)
			}
			if topic == "t" {
				seqs = append(seqs, seq)
			}
		}
		for range before {
			publish("t")
			publish("other")
		}
		sub := looking(t, s)
		if _, err := sub.search(n); err != nil {
			t.Fatal(err)
		}
		s.opts.Scans <- struct{}{} // nobody searches all of it once more
		for round := range uint64(3 * n) {
			s.found = sub.found // it was given up on
			for range round % n {
				publish("other")
				publish("t")
			}
			sub = looking(t, s)
			start, err := sub.search(n)
			if err != nil {
				t.Fatal(err)
			}
			heard := uint64(0)
			for _, seq := range seqs {
				if seq >= start {
					heard++
				}
			}
			if heard < min(n, uint64(len(seqs))) || heard >= 2*n || round == 0 && heard != min(n, before) {
				t.Fatalf("of %d, %d before, the last %d are %d", len(seqs), before, n, heard)
			}
			if s.found != nil {
				t.Fatal("it is kept for another who asks for the same later")
			}
		}
	}
}

// A search is of the same topic and as many records, or it is another one.
func TestSearchAnother(t *testing.T) {
	for _, f := range []found{{topic: "t", n: 2, start: 7}, {topic: "u", n: 3, start: 7}} {
		s, _ := alone(t)
		s.guest, s.found = lookingUp{}, &f
		if start, err := looking(t, s).search(3); err != nil || start != 1 {
			t.Errorf("%+v: begins with %d, %v", f, start, err)
		}
	}
}

// lookingUp is the account of a guest that may search the log.
type lookingUp struct{ Guest }

func (lookingUp) Search() bool { return true }
func (lookingUp) SearchDone()  {}

// A search ends with its session and leaves its turn, once it has had as long as others let
// it have: what is nearly done a restart does not cut short.
func TestSearchStops(t *testing.T) {
	for name, end := range map[string]func(*Session){
		"ended":       func(s *Session) { s.End(TroubleSuperseded, "") },
		"handed over": func(s *Session) { s.HandOver() },
	} {
		for _, records := range []int{5, 100} {
			bubble.Test(t, func(t *testing.T) {
				s, _ := alone(t)
				s.guest = lookingUp{}
				b := &eventlog.Batch{}
				for range records {
					b.Entries = append(b.Entries, eventlog.Entry{VM: "a", Topic: []byte("t")})
				}
				if err := s.opts.Log.Append(t.Context(), b); err != nil {
					t.Fatal(err)
				}
				looked := 0
				sub := looking(t, s)
				sub.visible = func(*eventlog.Record) bool {
					if looked++; looked == 3 {
						end(s)
					}
					time.Sleep(searchSlice / 5)
					return true
				}
				if _, err := sub.search(1000); looked != 5 || (err == nil) != (records == 5) {
					t.Errorf("%s: of %d records %d are looked at, %v", name, records, looked, err)
				}
				if len(s.opts.Scans) != 0 {
					t.Errorf("%s: it keeps its turn", name)
				}
				s.opts.Scans <- struct{}{} // somebody else searches
				if _, err := sub.search(1000); err == nil {
					t.Errorf("%s: another one begins", name)
				}
			})
		}
	}
}
