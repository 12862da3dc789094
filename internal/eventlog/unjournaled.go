package eventlog

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Unjournaled names the device of dir's file system if that is ext4 without a journal,
// which may lose in a power cut what it said was synced; "" if it is not, or nobody tells.
func Unjournaled(dir string) (dev string) { return unjournaled("/sys", dir) }

// unjournaled is Unjournaled where the kernel tells of itself in sys.
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
