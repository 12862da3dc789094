package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/dbusclient"
)

// Where the record is looked for.
func TestVerifyLogDir(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "bus", "host"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "bus", "host", "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	answers := func(st bus.Status, err error) *fakeClient {
		return &fakeClient{status: func([]string) (bus.Status, error) { return st, err }}
	}
	host, guest := bus.Status{}, bus.Status{}
	host.Broker.LogDir, guest.Broker.Kind = dir, kindGuest

	answer := run(t, answers(host, nil), []string{"bus", "verify"})
	answer.want(t, ExitDone, "note: "+filepath.Join(dir, "bus", "host", "x")+":0: foreign: ", "no damage: 1 stream, 0 files, 0 records, 0 bytes")
	answer = run(t, &fakeClient{}, []string{"bus", "verify", "--log-dir", dir}) // castrad is not asked
	answer.want(t, ExitDone, "note: ", "no damage")
	run(t, answers(guest, nil), []string{"bus", "verify"}).want(t, ExitUsage, "", "castra-guestd keeps no record")
	run(t, answers(bus.Status{}, &bus.Error{Code: bus.CodeAccessDenied, Reason: "no"}), []string{"bus", "verify"}).want(t, ExitFailed, "", "access-denied")
	for _, err := range []error{dbusclient.ErrNotRunning, dbusclient.ErrNoBus} {
		got := run(t, answers(bus.Status{}, err), []string{"bus", "verify"})
		// Whether there is something depends on the machine.
		if _, err := os.Stat(defaultLogDir); err != nil {
			got.want(t, ExitNoCastrad, "", "castrad is not running, and there is no record in /var/log/castra; ")
		} else if !strings.HasPrefix(got.err, "castrad is not running: looking in /var/log/castra; ") {
			t.Errorf("%v: stderr is %q", err, got.err)
		}
	}
}
