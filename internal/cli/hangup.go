package cli

import (
	"context"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// endWithReader gives a context that is done too when the reader of a pipe has
// gone. Without it, `castractl bus tail | head -1` would stay until the next
// record comes along to fail on. release waits for the watch to end.
func endWithReader(ctx context.Context, out io.Writer) (_ context.Context, release func()) {
	file, ok := out.(*os.File)
	if !ok {
		return ctx, func() {}
	}
	info, err := file.Stat()
	if err != nil || info.Mode()&(os.ModeNamedPipe|os.ModeSocket) == 0 {
		return ctx, func() {}
	}
	// The watch blocks in poll; the end of this pipe is what calls it off.
	off, stop, err := os.Pipe()
	if err != nil {
		return ctx, func() {} // the next write finds out
	}
	ctx, cancel := context.WithCancel(ctx)
	var watch sync.WaitGroup
	watch.Go(func() {
		fds := []unix.PollFd{{Fd: int32(file.Fd())}, {Fd: int32(off.Fd())}}
		for {
			_, err := unix.Poll(fds, -1)
			if err == unix.EINTR {
				continue
			}
			if fds[0].Revents != 0 {
				cancel()
			}
			return
		}
	})
	return ctx, func() {
		_ = stop.Close()
		watch.Wait()
		_ = off.Close()
		cancel()
	}
}
