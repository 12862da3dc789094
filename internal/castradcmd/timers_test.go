package castradcmd

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"
)

// relaxed is set where the test's program is to relax its timers and say what came of it.
const relaxed = "CASTRA_TEST_RELAXED"

func TestMain(m *testing.M) {
	if os.Getenv(relaxed) == "" {
		os.Exit(m.Run())
	}
	before, _ := timersSlack()
	err := relaxTimers()
	after, _ := timersSlack()
	fmt.Println(os.Getpid(), before, after, err, os.Args[1:])
}

// The program is the same process with the same arguments, and all its threads, which
// inherit it from its first, have the slack. What has it already is not started anew.
func TestRelaxTimers(t *testing.T) {
	cmd := exec.Command(os.Args[0], "some", "words")
	cmd.Env = append(os.Environ(), relaxed+"=1")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := string(out), fmt.Sprintln(cmd.Process.Pid, timerSlack, timerSlack, nil, "[some words]"); got != want {
		t.Errorf("%q and not %q", got, want)
	}
}

// The unit has it said beforehand.
func TestUnitRelaxesTimers(t *testing.T) {
	unit, err := os.ReadFile("../../systemd/castrad.service")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`(?m)^TimerSlackNSec=(.*)$`).FindStringSubmatch(string(unit))
	if found == nil {
		t.Fatal("the unit does not say TimerSlackNSec=")
	}
	if got, err := time.ParseDuration(strings.TrimSpace(found[1])); err != nil || got < timerSlack {
		t.Errorf("TimerSlackNSec=%s and not %v: castrad starts itself anew each time", found[1], timerSlack)
	}
}
