package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
)

// guestIn starts castra-guestd for a VM, with a message bus of its own; more is what
// else its [identity] is to say.
func (l *lab) guestIn(vm, more string) *exec.Cmd {
	l.Helper()
	address := l.bus(vm)
	config := l.write(vm+".toml", `[broker]
address = "127.0.0.1:%d"
[identity]
vm = %q
%s
[bus]
socket = %q
spool_dir = %q
`, l.port, vm, more, l.path(vm+".sock"), l.path(vm+".spool"))
	return l.start(vm, []string{"DBUS_SYSTEM_BUS_ADDRESS=" + address}, bin(l.TB, "castra-guestd"), "--config", config)
}

// inGuest is castractl as it runs in a VM that guestIn was called for.
func (l *lab) inGuest(vm string, args ...string) *exec.Cmd {
	l.Helper()
	cmd := exec.CommandContext(l.Context(), bin(l.TB, "castractl"), args...)
	cmd.Dir, cmd.Env = l.dir, append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS=unix:path="+l.path(vm+".bus"))
	return cmd
}

// tailInGuest follows a topic in a VM until the test ends.
func (l *lab) tailInGuest(vm, topic string) {
	l.Helper()
	l.start(vm+"-tail", []string{"DBUS_SYSTEM_BUS_ADDRESS=unix:path=" + l.path(vm+".bus")},
		bin(l.TB, "castractl"), "bus", "tail", "--topic", topic, "-n", "0", "-o", "json")
	l.castractl("wait", vm, "--for", "subscribed", "--timeout", "60s")
}

// exitCode runs castractl beside castrad and gives all that it says and how it ends.
func (l *lab) exitCode(args ...string) (stdout, stderr string, code int) {
	l.Helper()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(l.Context(), bin(l.TB, "castractl"), args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = l.dir, &out, &errs
	cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS="+l.hostBus)
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return out.String(), errs.String(), exit.ExitCode()
	}
	if err != nil {
		l.Fatal(fmt.Errorf("castractl %v: %w", args, err))
	}
	return out.String(), errs.String(), 0
}
