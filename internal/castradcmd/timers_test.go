package castradcmd

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// relaxed is set where the test's program is to relax its timers and say what came of it:
// to the slack that it begins with. Once it has that, said is set.
const (
	relaxed = "CASTRA_TEST_RELAXED"
	said    = "CASTRA_TEST_SAID"
)

func TestMain(m *testing.M) {
	if os.Getenv(relaxed) == "" {
		os.Exit(m.Run())
	}
	if say, err := time.ParseDuration(os.Getenv(relaxed)); err == nil && os.Getenv(said) == "" {
		_ = unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(say), 0, 0, 0)
		_ = os.Setenv(said, "so")
		fmt.Println(syscall.Exec(os.Args[0], os.Args, os.Environ()))
	}
	before, _ := timersSlack()
	err := relaxTimers()
	after, _ := timersSlack()
	fmt.Println(os.Getpid(), before, after, err, os.Args[1:])
}

// The program is the same process with the same arguments, and all its threads, which
// inherit it from its first, have the slack. Where somebody has said how much it is to be,
// that stays.
func TestRelaxTimers(t *testing.T) {
	for _, c := range []struct{ before, after time.Duration }{
		{kernelSlack, timerSlack},
		{timerSlack, timerSlack},
		{time.Microsecond, time.Microsecond},
		{time.Second, time.Second},
	} {
		cmd := exec.Command(os.Args[0], "some", "words")
		cmd.Env = append(os.Environ(), relaxed+"="+c.before.String())
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		if got, want := string(out), fmt.Sprintln(cmd.Process.Pid, c.after, c.after, nil, "[some words]"); got != want {
			t.Errorf("%v: %q and not %q", c.before, got, want)
		}
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
