package bubble

import (
	"os"
	"os/signal"
	"sync"
	"testing"
	"time"
)

// Goroutines that find timers due at the same time: with synctest.Test alone the race
// detector ends the process within a second.
func TestTimersAtOnce(t *testing.T) {
	Test(t, func(*testing.T) {
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for range 20000 {
					select {
					case <-time.NewTimer(0).C:
					default:
					}
				}
			})
		}
		wg.Wait()
	})
}

// Nobody has asked for a signal before: the runtime's goroutine for them is not the bubble's.
func TestSignals(t *testing.T) {
	Test(t, func(t *testing.T) {
		_, stop := signal.NotifyContext(t.Context(), os.Interrupt)
		stop()
	})
}
