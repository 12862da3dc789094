package eventlog

import (
	"errors"
	"io/fs"
	"syscall"
)

// What can be wrong with a disk, in the words of [Cause] and of [State].
const (
	CauseFull      = "disk full" // of bytes, of inodes or of a quota
	CauseReadOnly  = "disk read-only"
	CauseDenied    = "permission denied"
	CauseFiles     = "too many open files"
	CauseStalled   = "disk stalled"
	CauseRemoved   = "log files removed" // or renamed, by somebody else, while they were in use
	CauseDiskError = "disk error"        // all else
)

// Cause names what kind of trouble err is.
func Cause(err error) string {
	switch {
	case errors.Is(err, ErrStalled):
		return CauseStalled
	case errors.Is(err, errRemoved), errors.Is(err, fs.ErrNotExist):
		return CauseRemoved
	case isFull(err):
		return CauseFull
	case errors.Is(err, syscall.EROFS):
		return CauseReadOnly
	case errors.Is(err, fs.ErrPermission):
		return CauseDenied
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		return CauseFiles
	default:
		return CauseDiskError
	}
}

func isFull(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }
