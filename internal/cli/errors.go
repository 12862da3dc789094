package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/dbusclient"
)

// The exit codes that scripts rely on (contract, section 7).
const (
	ExitDone        = 0
	ExitFailed      = 1
	ExitUsage       = 2 // an unknown word or flag, or a value that can never be right
	ExitUnreachable = 3 // a VM is not reachable, or nobody acknowledged in time
	ExitNoSuchVM    = 4
	ExitNoCastrad   = 5 // castrad is not to be had
)

// ExitError is an error with the exit code that castractl ends with because of
// it. Err is what the person is told, in one line, with the next step.
type ExitError struct {
	Code int
	Err  error
}

func (e *ExitError) Error() string { return e.Err.Error() }
func (e *ExitError) Unwrap() error { return e.Err }

func exitf(code int, format string, args ...any) error {
	return &ExitError{Code: code, Err: fmt.Errorf(format, args...)}
}

// usageError is a mistake in the command line; it ends by naming the help.
func usageError(cmd *cobra.Command, format string, args ...any) error {
	return exitf(ExitUsage, format+"; see: %s --help", append(args, cmd.CommandPath())...)
}

// report prints err, if there is something to print, and returns the exit code.
func (f *Factory) report(err error) int {
	if err == nil || isBrokenPipe(err) {
		// A reader that has gone has seen what it wanted: `castractl status | head -1`
		// is no failure.
		return ExitDone
	}
	code, text := explain(err)
	// One line, whatever the error holds: a reason may quote what a guest sent.
	fmt.Fprintf(f.IO.Err, "castractl: %s\n", escape(strings.Join(strings.Fields(text), " ")))
	return code
}

// explain gives an error's exit code and the line a person is told.
func explain(err error) (int, string) {
	if exit, ok := errors.AsType[*ExitError](err); ok {
		return exit.Code, err.Error()
	}
	if errors.Is(err, dbusclient.ErrNotRunning) || errors.Is(err, dbusclient.ErrNoBus) {
		return ExitNoCastrad, err.Error()
	}
	if refusal, ok := errors.AsType[*bus.Error](err); ok {
		return explainRefusal(refusal, err)
	}
	if broken, ok := errors.AsType[*fs.PathError](err); ok && broken.Path == os.Stdout.Name() {
		// What was done before it could not be told stays in the text.
		why := fmt.Sprintf("writing to standard output: %v; what it holds is incomplete", broken.Err)
		return ExitFailed, strings.Replace(err.Error(), broken.Error(), why, 1)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return ExitNoCastrad, "castrad did not answer in time; see what it is doing: castractl logs"
	}
	return ExitFailed, err.Error()
}

func explainRefusal(refusal *bus.Error, err error) (int, string) {
	// What came before the refusal ("publishing to x") stays; the code's word is
	// kept, since it is what the documentation and a search find.
	text := err.Error()
	switch refusal.Code {
	case bus.CodeNoSuchVM:
		return ExitNoSuchVM, text
	case bus.CodeNoAck:
		return ExitUnreachable, text
	case bus.CodeBadTopic, bus.CodeInvalidName, bus.CodeInvalidArg:
		return ExitUsage, text
	case bus.CodeRateLimited, bus.CodeStorageFull, bus.CodeStorageStalled:
		if refusal.RetryAfter > 0 {
			text += fmt.Sprintf("; try again in %v", refusal.RetryAfter)
		}
	case bus.CodeShuttingDown:
		text += "; try again in a moment"
	}
	return ExitFailed, text
}

// errNoSuchVM says that castrad does not know the names.
func errNoSuchVM(names ...string) error {
	verb := "no VM is named %s"
	if len(names) > 1 {
		verb = "no VMs are named %s"
	}
	return exitf(ExitNoSuchVM, verb+"; see the known ones: castractl vm list", strings.Join(names, ", "))
}
