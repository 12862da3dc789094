package broker

import (
	"io/fs"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/castrabus/castra/internal/eventlog"
)

// fullFS is the machine's file system, on which the event log may have no room.
type fullFS struct {
	eventlog.FS
	full atomic.Bool
}

func (s *fullFS) OpenFile(name string, flag int, perm fs.FileMode) (eventlog.File, error) {
	f, err := s.FS.OpenFile(name, flag, perm)
	if err == nil && strings.Contains(name, "/bus/") {
		f = fullFile{f, s}
	}
	return f, err
}

type fullFile struct {
	eventlog.File
	fs *fullFS
}

func (f fullFile) WriteAt(b []byte, off int64) (int, error) {
	if f.fs.full.Load() {
		return 0, syscall.ENOSPC
	}
	return f.File.WriteAt(b, off)
}

// Who goes while the disk is full, and does not come back, is announced when there is room
// again, also by the castrad after this one: a full disk is what people restart it for.
func TestRestartOnFullDisk(t *testing.T) {
	dir := t.TempDir()
	disk := &fullFS{FS: eventlog.OS}
	open := func() *running {
		o := testOptions(t, dir)
		o.FS = disk
		return start(t, o)
	}
	b := open()
	connect(t, b.addr, "stays-away")
	eventually(t, "it is announced", func() bool { return b.events.Committed() == 1 })
	for range 2 { // nor does a second restart make it forgotten
		disk.full.Store(true)
		_ = b.Close() // it cannot store what it has to say
		b = open()
	}
	disk.full.Store(false)
	eventually(t, "who stayed away is announced", func() bool {
		return count(t, b, `"payload":{"vm":"stays-away","state":"unreachable","reason":"restarted"}`) == 1
	})
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if b = open(); b.left != nil {
		t.Errorf("%v are taken for reachable still", b.left)
	}
}
