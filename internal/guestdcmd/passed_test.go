package guestdcmd

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/castrabus/castra/internal/sdnotify"
)

// What systemd passes in and is not the local bus's socket is refused, and closed.
func TestOnlySocket(t *testing.T) {
	unix := func() net.Listener {
		ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
		if err != nil {
			t.Fatal(err)
		}
		return ln
	}
	tcp := func() net.Listener {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return ln
	}
	stored, err := os.Create(filepath.Join(t.TempDir(), "stored"))
	if err != nil {
		t.Fatal(err)
	}
	for name, passed := range map[string][]sdnotify.Passed{
		"two":         {{Use: sdnotify.SocketBus, Listener: unix()}, {Use: sdnotify.SocketBus, Listener: unix()}},
		"TCP":         {{Use: sdnotify.SocketBus, Listener: tcp()}},
		"another use": {{Use: sdnotify.SocketHealth, Listener: unix()}},
		"a hand-over": {{Use: sdnotify.HandOver, Stored: stored}},
	} {
		t.Run(name, func(t *testing.T) {
			if ln, err := onlySocket(passed); ln != nil || err == nil {
				t.Errorf("%v, %v; want an error", ln, err)
			}
			for _, p := range passed {
				if err := p.Close(); !errors.Is(err, net.ErrClosed) && !errors.Is(err, os.ErrClosed) {
					t.Errorf("%s was left open: %v", p.Use, err)
				}
			}
		})
	}
	passed := sdnotify.Passed{Use: sdnotify.SocketBus, Listener: unix()}
	if ln, err := onlySocket([]sdnotify.Passed{passed}); ln != passed.Listener || err != nil {
		t.Errorf("%v, %v; want the socket", ln, err)
	}
	_ = passed.Close()
}
