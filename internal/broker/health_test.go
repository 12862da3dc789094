package broker

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/sirupsen/logrus/hooks/test"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/eventlog"
)

// Every cause has advice that names where to look, and goes by itself.
func TestFaults(t *testing.T) {
	log, hook := test.NewNullLogger()
	o := testOptions(t, t.TempDir())
	o.Log = log
	b := start(t, o)
	told := make(chan bus.Status, 64) // more than there are changes
	unwatch := b.Watch(func(vm bus.VM, _ bool) {
		if vm.VM == "" {
			told <- b.Status([]string{""})
		}
	})
	defer unwatch()
	file := o.LogDir + "/bus/vm/web1/1.jsonl"
	at := func(errno syscall.Errno) error {
		return fmt.Errorf("writing: %w", &fs.PathError{Op: "write", Path: file, Err: errno})
	}
	for _, c := range []struct {
		part               part
		err                error
		state, cause, mend string
	}{
		{partLog, at(syscall.ENOSPC), "degraded: disk full", eventlog.CauseFull, "make room on the file system of " + o.LogDir},
		{partLog, at(syscall.EDQUOT), "degraded: disk full", eventlog.CauseFull, "make room"},
		{partLog, eventlog.ErrStalled, "degraded: disk stalled", eventlog.CauseStalled, "keeps the disk under " + o.LogDir},
		{partLog, at(syscall.ENOENT), "degraded: log files removed", eventlog.CauseRemoved, "leave what is under " + o.LogDir},
		{partVMStreams, at(syscall.EROFS), "degraded: VM streams: disk read-only", eventlog.CauseReadOnly, "-T " + o.LogDir + "/bus/vm/web1)"},
		{partVMStreams, at(syscall.EACCES), "degraded: VM streams: permission denied", eventlog.CauseDenied, "ls -ld " + o.LogDir + "/bus/vm/web1 " + file},
		{partVMStreams, at(syscall.EMFILE), "degraded: VM streams: too many open files", eventlog.CauseFiles, "LimitNOFILE="},
		{partCursors, errors.New("unknown"), "degraded: cursors: disk error", eventlog.CauseDiskError, "the disk under " + o.StateDir},
	} {
		hook.Reset()
		b.note(c.part, c.err)
		b.note(c.part, c.err) // told once
		st := toldOf(t, told)
		if b := st.Broker; b.State != c.state || len(b.Faults) != 1 || b.Faults[0].Cause != c.cause || b.Faults[0].Part != partWords[c.part].name ||
			b.Faults[0].Detail != c.err.Error() || !strings.Contains(b.Faults[0].Advice, c.mend) {
			t.Errorf("%v: %+v; want %q and %q", c.err, b, c.state, c.mend)
		}
		if lost := c.cause == eventlog.CauseRemoved; c.part == partLog && lost == strings.Contains(st.Broker.Faults[0].Effect, "nothing acknowledged is lost") {
			t.Errorf("%v: its effect is %q", c.err, st.Broker.Faults[0].Effect)
		}
		if n := len(hook.AllEntries()); n != 1 || !strings.Contains(hook.LastEntry().Message, c.mend) || hook.LastEntry().Level != logrus.ErrorLevel {
			t.Errorf("%v: the journal has %d lines, the last: %q", c.err, n, hook.LastEntry().Message)
		}
		b.note(c.part, nil)
		if st := toldOf(t, told); st.Broker.State != "running" || len(st.Broker.Faults) != 0 {
			t.Errorf("mended: %+v", st.Broker)
		}
	}
	// The worst one names the state.
	b.note(partCursors, at(syscall.ENOSPC))
	b.note(partLog, at(syscall.EIO))
	if st := b.Status(nil).Broker; st.State != "degraded: disk error" || len(st.Faults) != 2 || st.Faults[1].Part != "cursors" {
		t.Errorf("two at once: %+v", st)
	}
	b.note(partLog, nil)
	if st := b.State(); st != "degraded: cursors: disk full" {
		t.Errorf("one of the two is mended: %s", st)
	}
}

func toldOf(t *testing.T, told <-chan bus.Status) bus.Status {
	t.Helper()
	select {
	case st := <-told:
		return st
	case <-time.After(hang):
		t.Fatal("nobody is told")
		return bus.Status{}
	}
}
