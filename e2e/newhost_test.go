package e2e

import (
	"os"
	"testing"
)

// TestHostBegunAnew takes the host's log away under a guest that listens and an operator
// who follows, as where a host is installed anew: what is published then is heard, and
// requests are answered, though the new log is shorter than what was heard of the old.
func TestHostBegunAnew(t *testing.T) {
	l := newLab(t)
	l.loadedConfig("")
	host := l.startCastrad("castrad")
	l.answers()
	l.guestIn("web1", "")
	l.castractl("wait", "web1", "--timeout", "60s")
	l.tailInGuest("web1", "vm:web1")
	l.start("follow", []string{"DBUS_SYSTEM_BUS_ADDRESS=" + l.hostBus}, bin(t, "castractl"), "bus", "tail", "-o", "json")
	for range 30 {
		l.castractl("bus", "publish", "--vm", "web1", `"old"`)
	}
	l.castractl("bus", "publish", "--vm", "web1", `"the last"`)
	l.untilFile("web1-tail.log", "the last")
	l.untilFile("follow.log", "the last")

	l.stop("castrad", host)
	for _, dir := range []string{"state", "log"} {
		if err := os.RemoveAll(l.path(dir)); err != nil {
			t.Fatal(err)
		}
	}
	l.startCastrad("another")
	l.answers()
	l.castractl("wait", "web1", "--for", "subscribed", "--timeout", "60s")
	l.untilFile("web1.log", "ends before what this guest has heard of it")
	l.untilFile("follow.log", "going on with what is new")
	l.castractl("bus", "publish", "--vm", "web1", `"new"`)
	l.untilFile("web1-tail.log", `"new"`)
	l.untilFile("follow.log", `"new"`)
	if out, err := l.inGuest("web1", "bus", "publish", "--print-seq", "1").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}

	l.start("answer", []string{"DBUS_SYSTEM_BUS_ADDRESS=" + l.hostBus}, "sh", "-c",
		bin(t, "castractl")+` bus tail --topic ask -n 0 -o json | while read -r request; do
			`+bin(t, "castractl")+` bus publish --topic "$(echo "$request" | jq -r .reply)" '"yes"'
		done`)
	l.until("the request of a guest is answered", func() error {
		_, err := l.inGuest("web1", "bus", "request", "ask", "--timeout", "2s").Output()
		return err
	})
}
