package castradcmd

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/castrabus/castra/internal/logging"
)

// warnOfDisk says so where the event log is on a file system that does not keep what it
// said was synced.
func (d *daemon) warnOfDisk() {
	if dev := unjournaled("/sys", d.cfg.Store.LogDir); dev != "" && d.cfg.Store.Sync.Every() >= 0 {
		logging.StorageDoubtful.On(d.log).Warnf("%s is on ext4 without a journal, where a power cut may take records that were acknowledged; to give it one, unmounted: tune2fs -O has_journal /dev/%s",
			d.cfg.Store.LogDir, dev)
	}
}

// unjournaled names the device of dir's file system if that is ext4 without a journal, as
// its kernel tells in sys; "" if it is not, or nobody tells.
func unjournaled(sys, dir string) (dev string) {
	var st syscall.Stat_t
	if syscall.Stat(dir, &st) != nil {
		return ""
	}
	link, err := os.Readlink(fmt.Sprintf("%s/dev/block/%d:%d", sys, unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err != nil {
		return ""
	}
	dev = filepath.Base(link)
	task, err := os.ReadFile(filepath.Join(sys, "fs/ext4", dev, "journal_task"))
	if err != nil || strings.TrimSpace(string(task)) != "<none>" {
		return ""
	}
	return dev
}
