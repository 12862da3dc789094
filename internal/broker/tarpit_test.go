package broker

import "testing"

// A guest behind a full queue of silent connections is let in within half the time that
// it may take for its handshake; the rest is for its kernel, which asks again after a
// second and after two more where the queue has no room.
func TestTurnBehindSilentConnections(t *testing.T) {
	const queue, handshake = 4096, 5 // Backlog= of castrad.socket; seconds, contract 2
	if wait := queue / strangers.Records; wait > handshake/2.0 {
		t.Errorf("its turn comes after %.1f s", wait)
	}
}
