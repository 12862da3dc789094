package broker

import (
	"errors"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/sirupsen/logrus/hooks/test"

	"github.com/castrabus/castra/internal/bubble"
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
