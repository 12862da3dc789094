package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"
)

// TestKill kills castrad again and again, 200 times or CASTRA_KILLS, while
// guests publish as fast as they can. What was acknowledged is in the stream,
// once, under the number in the ack; numbers have no hole; and the guests come
// back by themselves.
func TestKill(t *testing.T) {
	const each = 200 // of one log, so that all that was acknowledged can be remembered
	kills := each
	if n, err := strconv.Atoi(os.Getenv("CASTRA_KILLS")); err == nil {
		kills = n
	}
	for done := 0; done < kills; done += each {
		t.Run(fmt.Sprint(done+1), func(t *testing.T) { killTimes(t, min(each, kills-done)) })
	}
}

func killTimes(t *testing.T, kills int) {
	l := newLab(t)
	l.loadedConfig("segment_size = \"1MiB\"")
	host := l.startCastrad("castrad")
	ld := l.publishing()
	for range kills {
		ld.goOn(100)
		time.Sleep(time.Duration(rand.IntN(100)) * time.Millisecond) // to kill it at any point, not to wait for one
		if err := host.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = host.Wait() // killed
		host = l.startCastrad("castrad")
	}
	l.answers()
	l.castractl("wait", "guest0", "guest1", "--timeout", "60s")
	ld.finish()
	l.stop("castrad", host)
	records := ld.check()
	for _, p := range ld.all {
		if p.count.Load() == 0 {
			t.Errorf("%s has published nothing", p.vm)
		}
	}
	t.Logf("%d kills, %d records, %d acknowledged: none lost, none doubled", kills, records, ld.acked())
}
