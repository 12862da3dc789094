package e2e

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
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

// castrad is killed the moment that somebody hears who comes or goes. What is said of each
// VM goes on to take turns, and the last of it is that it has gone.
func TestKilledBehindAWord(t *testing.T) {
	l := newLab(t)
	l.loadedConfig("")
	for round := range 20 {
		host := l.startCastrad("castrad")
		l.answers()
		vm := func(n int) string { return fmt.Sprintf("vm%d-%d", round, n) }
		word := []string{vm(0) + ` reachable`, vm(1) + ` reachable`, vm(2) + ` reachable`, vm(0) + ` unreachable`}[rand.IntN(4)]
		tail, lines := l.following("--topic", "castra.presence", "-n", "all")
		heard := make(chan bool)
		go func() {
			defer close(heard)
			for lines.Scan() {
				if wordIn(t, lines.Bytes()) == word {
					_ = host.Process.Kill()
					return
				}
			}
			t.Errorf("%s was not said", word)
		}()
		for n := range 3 {
			if p, err := dialWire(l.port, vm(n)); err == nil { // else it was killed
				defer p.Close()
				if n == 0 {
					defer time.AfterFunc(time.Duration(rand.IntN(20))*time.Millisecond, func() { _ = p.Close() }).Stop()
				}
			}
		}
		<-heard
		_ = host.Wait() // killed
		_ = tail.Process.Kill()
		_ = tail.Wait()
	}
	l.startCastrad("castrad")
	l.answers()
	l.until("all are said to be gone", func() error {
		last := make(map[string]string)
		for line := range strings.Lines(l.castractl("bus", "tail", "--topic", "castra.presence", "-n", "all", "--no-follow", "-o", "json")) {
			vm, state, _ := strings.Cut(wordIn(t, []byte(line)), " ")
			if was, known := last[vm]; was == state || !known && state != "reachable" {
				t.Fatalf("it is said of %s that it is %q, and then %q", vm, was, state)
			}
			last[vm] = state
		}
		for vm, state := range last {
			if state != "unreachable" {
				return fmt.Errorf("the last that is said of %s is that it is %s", vm, state)
			}
		}
		return nil
	})
}

// wordIn gives the VM and its state of a record of castra.presence.
func wordIn(t *testing.T, line []byte) string {
	t.Helper()
	var rec struct {
		Payload struct{ VM, State string }
	}
	if err := json.Unmarshal(line, &rec); err != nil {
		t.Errorf("%q: %v", line, err)
	}
	return rec.Payload.VM + " " + rec.Payload.State
}
