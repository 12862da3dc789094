package cli

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

// maxInput bounds what is read of a payload's source: far above what a payload
// may take, since white space does not count, and far below what would hurt.
const maxInput = 16 << 20 // bytes

// maxInputLine bounds a line that is a message of its own; D-Bus takes no more.
const maxInputLine = 1 << 20 // bytes

// readPayload reads and checks the one message that source names.
func readPayload(cmd *cobra.Command, source string) ([]byte, error) {
	in, closeInput, err := openPayload(cmd.InOrStdin(), source)
	if err != nil {
		return nil, err
	}
	defer closeInput()
	raw, err := io.ReadAll(io.LimitReader(in, maxInput+1))
	if err != nil {
		return nil, unreadable(err)
	}
	if len(raw) > maxInput {
		return nil, fmt.Errorf("the payload is over %d MiB, and may take %d bytes: store it elsewhere and publish where", maxInput>>20, wire.MaxPayload)
	}
	return compactPayload(cmd, raw)
}

// eachPayload calls publish with each line that source holds, as it comes, until
// one fails. Empty lines are no messages.
func eachPayload(cmd *cobra.Command, source string, publish func(payload []byte) error) error {
	in, closeInput, err := openPayload(cmd.InOrStdin(), source)
	if err != nil {
		return err
	}
	defer closeInput()
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, maxInputLine)
	number, stored := 0, 0
	for lines.Scan() {
		number++
		line := bytes.TrimSpace(lines.Bytes())
		if len(line) == 0 {
			continue
		}
		payload, err := compactPayload(cmd, line)
		if err == nil {
			err = publish(payload)
		}
		if err != nil {
			return fmt.Errorf("line %d, with %s before it published: %w", number, plural(stored, "message"), err)
		}
		stored++
	}
	switch err := lines.Err(); {
	case errors.Is(err, bufio.ErrTooLong):
		return fmt.Errorf("line %d is over %d MiB, and a payload may take %d bytes: store it elsewhere and publish where; %s before it published", number+1, maxInputLine>>20, wire.MaxPayload, plural(stored, "message"))
	case err != nil:
		return fmt.Errorf("reading line %d: %w", number+1, err)
	}
	return nil
}

// openPayload opens what source names: a file, standard input, or itself.
func openPayload(stdin io.Reader, source string) (io.Reader, func(), error) {
	switch {
	case source == "-":
		return stdin, func() {}, nil
	case strings.HasPrefix(source, "@"):
		file, err := os.Open(source[1:])
		if err != nil {
			return nil, nil, unreadable(err)
		}
		return file, func() { _ = file.Close() }, nil // only read from
	}
	return strings.NewReader(source), func() {}, nil
}

func unreadable(err error) error {
	return fmt.Errorf("reading the payload: %w; a file is given as @FILE, standard input as -", err)
}

// compactPayload checks a payload and strips it of white space that means nothing.
func compactPayload(cmd *cobra.Command, raw []byte) ([]byte, error) {
	payload, err := wire.Compact(raw)
	switch {
	case len(bytes.TrimSpace(raw)) == 0:
		return nil, usageError(cmd, "the payload is empty, which is no JSON: nothing at all is null")
	case err != nil:
		what := strings.TrimPrefix(err.Error(), wire.ErrProtocol.Error()+": ")
		return nil, usageError(cmd, `the payload is not JSON: %s (text needs its own quotes: '"text"')`, what)
	}
	if len(payload) > wire.MaxPayload {
		return nil, bus.Errorf(bus.CodeTooLarge, "the payload takes %d bytes, of at most %d: store it elsewhere and publish where", len(payload), wire.MaxPayload)
	}
	return payload, nil
}
