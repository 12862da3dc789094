package session

import (
	"math/rand/v2"
	"testing"
)

// Sessions come out of the queue in the order in which they went in, none twice and
// none lost, and what has gone through it takes no room.
func TestCouriersQueue(t *testing.T) {
	c := NewCouriers()
	var want []*Session
	rnd := rand.New(rand.NewPCG(1, 2))
	most := 0
	for range 20000 {
		switch {
		case len(want) < 100 && rnd.IntN(2) == 0:
			a, b := &Session{}, &Session{}
			c.Wake(a, b)
			c.Wake(b, a) // they wait already
			want = append(want, a, b)
		case len(want) > 0:
			s := c.next()
			if s != want[0] {
				t.Fatal("not whose turn it was")
			}
			if want = want[1:]; rnd.IntN(3) == 0 {
				c.again(s)
				want = append(want, s)
			}
		}
		most = max(most, len(want))
	}
	if most < 50 || cap(c.queue) > 8*most {
		t.Errorf("the queue has room for %d, and %d were in it at most", cap(c.queue), most)
	}
	for _, s := range c.queue[:c.taken] {
		if s != nil {
			t.Fatal("it holds a session that was attended to")
		}
	}
}
