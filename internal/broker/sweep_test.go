package broker

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/castrabus/castra/internal/bubble"
	"github.com/castrabus/castra/internal/presence"
)

// A reload that makes a deadline shorter holds at once, also where nobody was there.
func TestReloadWakesSweep(t *testing.T) {
	dir := t.TempDir()
	bubble.Test(t, func(t *testing.T) {
		opts := presence.Options{ReachableWithin: 45 * time.Second, SessionTimeout: time.Minute}
		table := presence.New(opts)
		records, err := openRecorder(dir, table, nil)
		if err != nil {
			t.Fatal(err)
		}
		records.words = &lastWords{log: testLog(t, t.TempDir())}
		b := &Broker{table: table, records: records}
		b.ctx2, b.cancel2 = context.WithCancel(t.Context())
		b.work.Go(b.sweep)
		defer b.work.Wait()
		defer b.cancel2()
		time.Sleep(time.Hour + 2*time.Second) // a sweep has just been
		opts.ReachableWithin = time.Second
		table.Configure(opts)
		table.Attend("web1", "127.0.0.1:1", []string{"exec"})
		time.Sleep(opts.ReachableWithin * 3 / 2)
		synctest.Wait()
		if vm := table.Snapshot(nil)[0]; vm.Reachable {
			t.Error("it is still reachable")
		}
	})
}
