package bubble

import (
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
