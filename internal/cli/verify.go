package cli

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/dbusclient"
	"github.com/castrabus/castra/internal/eventlog"
	"github.com/castrabus/castra/internal/wire"
)

// defaultLogDir is castrad's log_dir where its configuration names none.
const defaultLogDir = "/var/log/castra"

func newVerifyCmd(f *Factory) *cobra.Command {
	var logDir string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Check the record on disk",
		Long: `Read every stream on disk, the host's and each VM's, and say which file is
damaged where, and how. Nothing is changed; castrad may run meanwhile, and is
not started for this.

Exit codes: 1 on damage, 0 without; 5 when castrad is not there to say where the
record is, and none is where it is by default. Lines that begin with "note:" are
no damage.`,
		Example: `  castractl bus verify
  castractl bus verify --log-dir /mnt/backup/castra --json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if logDir == "" {
				var err error
				if logDir, err = f.findLogDir(cmd); err != nil {
					return err
				}
			}
			return f.runVerify(logDir, asJSON)
		},
	}
	cmd.Flags().StringVar(&logDir, "log-dir", "", "look in `DIR`, and not where castrad says that it writes")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, an object a finding")
	_ = cmd.MarkFlagDirname("log-dir")
	return cmd
}

// findLogDir asks castrad where its records are. Where it does not run they are
// looked for where they are by default: a host that is down is when this matters.
func (f *Factory) findLogDir(cmd *cobra.Command) (string, error) {
	b, err := f.broker(cmd.Context(), NoStart)
	switch {
	case errors.Is(err, dbusclient.ErrNotRunning), errors.Is(err, dbusclient.ErrNoBus):
		if _, err := os.Stat(filepath.Join(defaultLogDir, "bus")); errors.Is(err, fs.ErrNotExist) {
			return "", exitf(ExitNoCastrad, "castrad is not running, and there is no record in %s; name castrad's log_dir: castractl bus verify --log-dir DIR", defaultLogDir)
		}
		f.note("castrad is not running: looking in %s; elsewhere with --log-dir", defaultLogDir)
		return defaultLogDir, nil
	case err != nil:
		return "", err
	case b.LogDir == "":
		return "", usageError(cmd, "castra-guestd keeps no record; run this on the host, or name castrad's log_dir with --log-dir")
	}
	return b.LogDir, nil
}

func (f *Factory) runVerify(logDir string, asJSON bool) error {
	w := bufio.NewWriter(f.IO.Out)
	var werr error // of the first write that failed: the reader has gone
	damaged := make(map[string]bool)
	sum, err := eventlog.Verify(eventlog.VerifyOptions{
		Dir: filepath.Join(logDir, "bus", "host"), VMDir: filepath.Join(logDir, "bus", "vm"),
		Sender: bus.HostVM, Owner: wire.TopicVM[[]byte],
	}, func(found eventlog.Finding) {
		if found.Damage {
			damaged[found.File] = true
		}
		if werr == nil {
			werr = f.writeFinding(w, &found, asJSON)
		}
	})
	if werr == nil {
		werr = w.Flush()
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("there is no record in %s (%w); name castrad's log_dir: castractl bus verify --log-dir DIR", logDir, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("the record in %s cannot be read: %w; run this as root or as castrad's user", logDir, err)
	case err != nil:
		return fmt.Errorf("checking the record in %s: %w; see: castractl logs", logDir, err)
	}
	if sum.Damages > 0 {
		// Whatever became of the output, a script must not take this for health.
		return exitf(ExitFailed, "damaged in %s, in %s: the rest is served, and readers are told what is missing; keep a copy of what is damaged and check the disk",
			plural(sum.Damages, "place"), plural(len(damaged), "file"))
	}
	if werr == nil && !asJSON {
		f.note("no damage: %s, %s, %s, %d bytes", plural(sum.Streams, "stream"), plural(sum.Segments, "file"), plural(int(sum.Records), "record"), sum.Bytes)
	}
	return werr
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// writeFinding writes a line, or an object a line.
func (f *Factory) writeFinding(w *bufio.Writer, found *eventlog.Finding, asJSON bool) error {
	if asJSON {
		line, err := json.Marshal(found)
		if err == nil {
			_, err = w.Write(append(line, '\n'))
		}
		return err
	}
	head, look := "note", plain
	if found.Damage {
		head, look = "damage", red
	}
	_, err := fmt.Fprintf(w, "%s %s:%d: %s: %s\n", f.IO.paint(look, head+":"), escape(found.File), found.Offset, found.Kind, escape(found.What))
	return err
}
