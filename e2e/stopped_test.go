package e2e

import (
	"os"
	"syscall"
	"testing"
	"time"
)

// castrad is stopped for longer than a session may be silent, as with the machine that it
// runs on. Its guests went on beating, and their sessions go on.
func TestStoppedCastrad(t *testing.T) {
	l := newLab(t)
	l.loadedConfig("")
	if err := os.Mkdir(l.path("castrad.toml.d"), 0o755); err != nil {
		t.Fatal(err)
	}
	l.write("castrad.toml.d/short.toml", "[broker]\nsession_timeout = \"5s\"\nreachable_within = \"5s\"\n")
	castrad := l.startCastrad("castrad")
	l.answers()
	g := l.guest("beats")
	g.call(`{"type":"heartbeat"}`)
	if err := castrad.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = castrad.Process.Signal(syscall.SIGCONT) }() // or it would not end
	time.Sleep(7 * time.Second)
	if err := g.send([]byte(`{"type":"heartbeat"}`)); err != nil {
		t.Fatal(err)
	}
	if err := castrad.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if f := g.next(); f.Ack != "heartbeat" {
		t.Fatalf("it is answered with %+v", f)
	}
	time.Sleep(2 * time.Second) // it has been looked after, and more than once
	g.call(`{"type":"heartbeat"}`)
}
