package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// cursorInterval is how far the file may be behind what was shown; after a crash
// that much is shown again.
const cursorInterval = time.Second

// cursorFile notes the number of the last record that a tail has shown: a decimal
// number in a line of its own.
type cursorFile struct {
	path  string
	shown atomic.Uint64 // set by the tail, read by the goroutine that saves
	saved uint64
}

// load reads the number; 0 when there is no file yet, or an empty one as
// mktemp(1) makes. What cannot be noted later on is said here, before anything is
// shown that would be shown again.
func (c *cursorFile) load() (uint64, error) {
	if err := c.locate(); err != nil {
		return 0, err
	}
	text, err := os.ReadFile(c.path)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("reading the cursor: %w", err)
	}
	text = bytes.TrimSpace(text)
	if len(text) == 0 {
		return 0, nil
	}
	seq, err := strconv.ParseUint(string(text), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s holds no record number; to begin anew, remove it", c.path)
	}
	c.saved = seq
	return seq, nil
}

// locate follows symbolic links to the file, which would else be replaced and not
// what they lead to, and turns down what is no file: root would replace /dev/null
// for the whole machine, and a pipe without a writer would be waited for.
func (c *cursorFile) locate() error {
	if target, err := filepath.EvalSymlinks(c.path); err == nil {
		c.path = target
	}
	if info, err := os.Stat(c.path); err == nil && !info.Mode().IsRegular() {
		return fmt.Errorf("%s is no regular file, and cannot be a cursor; choose another with --cursor-file", c.path)
	}
	probe, err := createBeside(c.path)
	if err != nil {
		return fmt.Errorf("the cursor could not be noted: %w; choose another place with --cursor-file", err)
	}
	return errors.Join(probe.Close(), os.Remove(probe.Name()))
}

// keep runs show and saves the cursor beside it, every cursorInterval and at the
// end. That a save fails ends show: going on would repeat ever more later on.
func (c *cursorFile) keep(ctx context.Context, show func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	var saver sync.WaitGroup
	saver.Go(func() {
		tick := time.NewTicker(cursorInterval)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				if err := c.save(); err != nil {
					cancel(err)
					return
				}
			}
		}
	})
	err := show(ctx)
	cancel(nil)
	saver.Wait()
	if serr := c.save(); serr != nil {
		return serr
	}
	return err
}

// save writes what was shown, if it is news. One goroutine at a time calls it.
func (c *cursorFile) save() error {
	seq := c.shown.Load()
	if seq == 0 || seq == c.saved {
		return nil
	}
	if err := writeReplacing(c.path, strconv.AppendUint(nil, seq, 10)); err != nil {
		return fmt.Errorf("noting the cursor: %w", err)
	}
	c.saved = seq
	return nil
}

// writeReplacing puts a line into a file at once or not at all. The sync before
// the rename keeps a power cut from leaving an empty file, which would read as no
// cursor and skip records.
func writeReplacing(path string, line []byte) (err error) {
	tmp, err := createBeside(path)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(tmp.Name())
		}
	}()
	_, err = tmp.Write(append(line, '\n'))
	err = errors.Join(err, tmp.Sync(), tmp.Close())
	if err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}

// createBeside makes a file in the directory of path, to be renamed to it.
func createBeside(path string) (*os.File, error) {
	return os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
}
