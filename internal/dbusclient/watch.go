package dbusclient

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/godbus/dbus/v5"

	"github.com/castrabus/castra/internal/token"
)

// WatchVMs returns a channel that has something to receive when a VM may have
// changed since the last receive, and when the daemon came or went: look with
// Describe then. It is never closed, and the watch ends with ctx.
func (c *Client) WatchVMs(ctx context.Context) (<-chan struct{}, error) {
	changes, remove := c.hub.add()
	rules := [][]dbus.MatchOption{
		{dbus.WithMatchSender(busName), dbus.WithMatchPathNamespace(root)},
		{
			dbus.WithMatchSender("org.freedesktop.DBus"), dbus.WithMatchInterface("org.freedesktop.DBus"),
			dbus.WithMatchMember("NameOwnerChanged"), dbus.WithMatchArg(0, busName),
		},
	}
	for _, rule := range rules {
		// The rules stay for as long as the connection: a client watches once.
		if err := c.conn.AddMatchSignalContext(ctx, rule...); err != nil {
			remove()
			return nil, c.explain(ctx, err)
		}
	}
	context.AfterFunc(ctx, remove)
	return changes, nil
}

// hub tells watches that a signal came. It keeps no signals, since all a watch does
// with one is look again; so one that does not receive costs nothing. godbus's own
// signal handlers queue without a bound.
type hub struct {
	mu      sync.Mutex
	watches map[chan struct{}]struct{}
}

func (h *hub) add() (changes <-chan struct{}, remove func()) {
	ch := make(chan struct{}, 1) // one is enough to say: look again
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.watches == nil {
		h.watches = make(map[chan struct{}]struct{})
	}
	h.watches[ch] = struct{}{}
	return ch, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.watches, ch)
	}
}

// DeliverSignal is called by godbus for each signal, from the goroutine that reads
// the connection.
func (h *hub) DeliverSignal(_, member string, s *dbus.Signal) {
	if !strings.HasPrefix(string(s.Path), string(root)) && member != "NameOwnerChanged" {
		return
	}
	h.mu.Lock()
	watches := slices.Collect(maps.Keys(h.watches))
	h.mu.Unlock()
	for _, ch := range watches {
		token.Leave(ch)
	}
}
