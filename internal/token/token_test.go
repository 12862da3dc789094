package token

import "testing"

func TestLeave(t *testing.T) {
	ch := make(chan struct{}, 1)
	Leave(ch)
	Leave(ch) // waits for nobody
	<-ch
	select {
	case <-ch:
		t.Error("there were two tokens")
	default:
	}
	Leave(ch)
	<-ch
}
