package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/castrabus/castra/internal/reserve"
)

// BenchmarkLook measures how long the commands that only look take, as a person at a
// prompt waits for them: castrad with few VMs and with many, degraded, and stopped.
func BenchmarkLook(b *testing.B) {
	for _, vms := range []int{10, 10_000} {
		b.Run(fmt.Sprintf("vms=%d", vms), func(b *testing.B) {
			l := newLab(b)
			l.mountSmall(32768)
			l.manyVMs(vms)
			l.hostBus, l.port = l.bus("host"), reserve.Port(b)
			l.write("castrad.toml", `[broker]
listen = ["127.0.0.1:%d"]
vms_dir = %q
[store]
state_dir = %q
log_dir = %q
segment_size = "64KiB"
`, l.port, l.path("vms.d"), l.path("state"), l.path("log"))
			castrad := l.startCastrad("castrad")
			l.answers()
			b.Run("running", func(b *testing.B) { l.looks(b, vms, 0) })

			// Nothing fits on the disk any more, and the next segment finds out.
			if err := fill(l.path("log/ballast")); err == nil {
				b.Fatal("the disk does not get full")
			}
			l.write("big", "%s", strings.Repeat(`"`+strings.Repeat("x", 60_000)+`"`+"\n", 10))
			if _, errs, code := l.exitCode("bus", "publish", "--lines", "@big"); code != 1 {
				b.Fatalf("publishing on a full disk ends with %d: %s", code, errs)
			}
			if out := l.castractl("vm", "show", "vm1", "--json"); !strings.Contains(out, `"state":"degraded: disk full"`) {
				b.Fatalf("castrad is not degraded: %s", out)
			}
			b.Run("degraded", func(b *testing.B) { l.looks(b, vms, 0) })

			l.stop("castrad", castrad)
			b.Run("stopped", func(b *testing.B) { l.looks(b, vms, 5) })
		})
	}
}

// looks runs each command over and over; it must end with the code, and, where it
// ends well, show every VM.
func (l *lab) looks(b *testing.B, vms, code int) {
	for _, args := range [][]string{{"status"}, {"status", "--json"}, {"status", "vm1"}, {"vm", "list"}, {"ports"}} {
		b.Run(strings.Join(args, "-"), func(b *testing.B) {
			for b.Loop() {
				out, errs, got := l.exitCode(args...)
				want, lines := code, vms
				if args[len(args)-1] == "vm1" {
					lines = 1
					if code == 0 {
						want = 3 // it is not there
					}
				}
				if got != want || code == 0 && strings.Count(out, "vm") < lines {
					b.Fatalf("castractl %v ends with %d, want %d: %.200s%s", args, got, want, out, errs)
				}
			}
		})
	}
}

// manyVMs registers vm1 and so on, each with a forward.
func (l *lab) manyVMs(n int) {
	l.Helper()
	if err := os.Mkdir(l.path("vms.d"), 0o755); err != nil {
		l.Fatal(err)
	}
	for i := 1; i <= n; i++ {
		l.write(fmt.Sprintf("vms.d/vm%d.toml", i), "no_key = true\nforwards = [\"tcp:%d:22\"]\n", 10_000+i)
	}
}

// fill writes a file until that fails.
func fill(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close() // what it says of the last bytes does not matter
	block := make([]byte, 1<<20)
	for range 1 << 10 {
		if _, err := f.Write(block); err != nil {
			return err
		}
	}
	return nil
}
