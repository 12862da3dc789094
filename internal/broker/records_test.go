package broker

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/sirupsen/logrus/hooks/test"

	"github.com/castrabus/castra/internal/bubble"
	"github.com/castrabus/castra/internal/presence"
	"github.com/castrabus/castra/internal/wire"
)

// A full disk refuses the files of ten thousand VMs one by one: the journal, which most
// likely is on it, is told of the first, and after a minute of how many there were.
func TestRefusedFilesDoNotFillTheJournal(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		log, hook := test.NewNullLogger()
		r := &recorder{log: log}
		told := func(want ...int) {
			t.Helper()
			var got []int
			for _, e := range hook.AllEntries() {
				if n, ok := e.Data["count"].(int); ok && e.Level == logrus.ErrorLevel {
					got = append(got, n)
				}
			}
			if len(got) != len(hook.AllEntries()) || len(got) != len(want) {
				t.Fatalf("the journal has %d entries with the counts %d, want %d", len(hook.AllEntries()), got, want)
			}
			for i := range want {
				if got[i] != want[i] {
					t.Fatalf("the journal counts %d, want %d", got, want)
				}
			}
		}
		r.note(nil)
		told()
		for range 1000 {
			r.note(errors.New("no room"))
		}
		told(1)
		time.Sleep(time.Minute)
		r.note(errors.New("no room"))
		told(1, 1000)
		time.Sleep(time.Minute)
		r.note(nil)
		told(1, 1000)
	})
}

// The file of a VM that is gone is written again where that failed: nothing else of it would
// make it due, and it would go on telling of a session.
func TestVMFileWrittenAgain(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		log, _ := test.NewNullLogger()
		table := presence.New(presence.Options{})
		dir := filepath.Join(t.TempDir(), "handshakes")
		r, err := openRecorder(dir, table, log)
		if err != nil {
			t.Fatal(err)
		}
		r.words = &lastWords{log: testLog(t, t.TempDir())}
		guest, _, err := table.Connect("g", nil, "127.0.0.1:1", []string{wire.CapBus})
		if err != nil {
			t.Fatal(err)
		}
		if !table.Disconnect(guest, nil) {
			t.Fatal("it is connected")
		}
		if err := errors.Join(os.Rename(dir, dir+"-away"), os.WriteFile(dir, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
		r.handshake("g")
		r.writeDue()
		if err := errors.Join(os.Remove(dir), os.Rename(dir+"-away", dir)); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			time.Sleep(handshakePeriod - time.Second)
			r.refresh()
			r.writeDue()
			if _, err := r.vms.read("g"); !errors.Is(err, fs.ErrNotExist) {
				t.Fatalf("tried again too soon: %v", err)
			}
			r.tried = time.Now() // as if it had failed once more
		}
		time.Sleep(handshakePeriod)
		r.refresh()
		r.writeDue()
		if last, err := r.vms.read("g"); err != nil || last.Handshake.IsZero() {
			t.Errorf("%+v, %v", last, err)
		}
		if names := r.again(); names != nil {
			t.Errorf("%q are to be written again", names)
		}
	})
}
