package e2e

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// example is a fenced block of a document.
type example struct {
	line int    // where its fence is
	kind string // "bash", "bash service" or "bash in-guest"
	text string
	want *string // what it prints, where the document shows that
}

var fence = regexp.MustCompile("(?ms)^```([a-z -]*)\n(.*?)^```$")

// examples gives the blocks of a document; one that could not be run is an error.
func examples(t *testing.T, path string) []example {
	t.Helper()
	doc, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var all []example
	for _, m := range fence.FindAllSubmatchIndex(doc, -1) {
		kind, text := string(doc[m[2]:m[3]]), string(doc[m[4]:m[5]])
		line := 1 + bytes.Count(doc[:m[0]], []byte("\n"))
		switch kind {
		case "bash", "bash service", "bash in-guest":
			all = append(all, example{line: line, kind: kind, text: text})
		case "text":
			if len(all) == 0 || all[len(all)-1].want != nil {
				t.Fatalf("%s:%d: output of no command", path, line)
			}
			all[len(all)-1].want = &text
		default:
			t.Fatalf("%s:%d: a block of kind %q, which nothing runs", path, line, kind)
		}
	}
	if len(all) == 0 {
		t.Fatalf("%s has no examples", path)
	}
	return all
}

// TestScriptingExamples runs every example of docs/SCRIPTING.md, as it stands there.
func TestScriptingExamples(t *testing.T) {
	l := newLab(t)
	l.castrad()
	vms := []string{"web1", "web2"}
	for _, vm := range vms {
		l.castractl("vm", "add", "--no-key", vm)
		l.guestd(vm)
	}
	for _, vm := range []string{"node1", "node2", "node3", "node4", "node5", "node6", "node7", "node8", "node9", "node10"} {
		l.castractl("vm", "add", "--no-key", vm)
		p, err := dialWire(l.port, vm)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = p.Close() })
	}
	l.castractl("wait", "web1", "web2", "--timeout", "60s")
	if err := os.Mkdir(l.path("work"), 0o755); err != nil { // the lab's own files have names that examples may use
		t.Fatal(err)
	}
	all := examples(t, "../docs/SCRIPTING.md")
	for _, e := range all { // what answers has to be there first, as in the guests of a fleet
		if e.kind == "bash in-guest" {
			for _, vm := range vms {
				l.service(vm+"-service", "unix:path="+l.path(vm+".bus"), e.text)
			}
		}
	}
	l.castractl(append([]string{"wait", "--for", "subscribed", "--timeout", "60s"}, vms...)...)
	l.service("acks", "unix:path="+l.path("web1.bus"), "castractl bus tail --topic vm:web1 -n 0")
	l.until("web1 listens to both", func() error {
		_, err := l.tryShell(`castractl status --json web1 | jq -e '.vms[0].subscriptions | length == 2'`)
		return err
	})
	for _, e := range all {
		switch e.kind {
		case "bash":
			got, err := l.tryShell(e.text)
			if err != nil {
				t.Errorf("SCRIPTING.md:%d: %v", e.line, err)
			}
			if e.want != nil && got != *e.want {
				t.Errorf("SCRIPTING.md:%d prints %q, and the document says %q", e.line, got, *e.want)
			}
		case "bash service":
			l.service("service", l.hostBus, e.text)
			l.untilFile("service.log", "web2 reachable\n")
		}
	}
}

// shell is bash as the document has it.
func (l *lab) shell(bus, text string) (argv, env []string) {
	return []string{"bash", "-euo", "pipefail", "-c", text}, []string{
		"DBUS_SYSTEM_BUS_ADDRESS=" + bus, "PATH=" + strings.TrimSuffix(bin(l.TB, "castractl"), "/castractl") + ":" + os.Getenv("PATH"),
	}
}

func (l *lab) tryShell(text string) (string, error) {
	argv, env := l.shell(l.hostBus, text)
	ctx, cancel := context.WithTimeout(l.Context(), 2*hang)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.WaitDelay = time.Second // what bash has started may hold the pipes
	cmd.Dir, cmd.Env = l.path("work"), append(os.Environ(), env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), &shellError{err, errs.String()}
	}
	return out.String(), nil
}

type shellError struct {
	error
	said string
}

func (e *shellError) Error() string { return e.error.Error() + ": " + e.said }

// service runs a script until the test ends, with all that it has started.
func (l *lab) service(name, bus, text string) {
	l.Helper()
	argv, env := l.shell(bus, text)
	cmd := l.start(name, env, append([]string{"setsid", "--wait"}, argv...)...)
	l.Cleanup(func() {
		// setsid forks if it leads a group of its own, which it does not here.
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM)
	})
}
