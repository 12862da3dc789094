package cli

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
)

// pager is a writer that holds back what fits the terminal, and hands over to a
// pager what does not. Close writes what is held back or waits for the pager to
// end.
type pager struct {
	out, errs io.Writer
	rows      int // 0: no pager

	held  bytes.Buffer
	cmd   *exec.Cmd
	pipe  io.WriteCloser
	calm  chan os.Signal
	plain bool // the decision is made: straight to out
}

// Write implements io.Writer.
func (p *pager) Write(b []byte) (int, error) {
	if p.rows == 0 || p.plain {
		return p.out.Write(b)
	}
	if p.pipe != nil {
		return p.pipe.Write(b)
	}
	p.held.Write(b)
	// One row stays for the shell's prompt. A long line takes several rows; a table's
	// lines fit, and a pager that comes a little late harms nobody.
	if bytes.Count(p.held.Bytes(), []byte{'\n'}) < p.rows {
		return len(b), nil
	}
	if !p.start() {
		p.plain = true
	}
	_, err := p.release()
	return len(b), err
}

// start runs the pager and tells whether there is one.
func (p *pager) start() bool {
	argv := []string{"less"}
	if name, set := os.LookupEnv("PAGER"); set {
		argv = strings.Fields(name)
	}
	if len(argv) == 0 || argv[0] == "cat" {
		return false
	}
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return false
	}
	cmd := exec.Command(path, argv[1:]...)
	// castractl may run under a sudo rule for castractl alone: less must then not
	// hand out a shell or an editor.
	cmd.Env = append(os.Environ(), "LESSSECURE=1")
	if os.Getenv("LESS") == "" {
		cmd.Env = append(cmd.Env, "LESS=FRSXMK")
	}
	cmd.Stdout, cmd.Stderr = p.out, p.errs
	pipe, err := cmd.StdinPipe()
	if err != nil || cmd.Start() != nil {
		return false
	}
	p.cmd, p.pipe = cmd, pipe
	// Ctrl-C is the pager's while it has the terminal: if castractl died of it, the
	// shell and the pager would read the keyboard at the same time. One slot, never
	// read.
	p.calm = make(chan os.Signal, 1)
	signal.Notify(p.calm, os.Interrupt)
	return true
}

func (p *pager) release() (int64, error) {
	if p.pipe != nil {
		return p.held.WriteTo(p.pipe)
	}
	return p.held.WriteTo(p.out)
}

// Close ends the output.
func (p *pager) Close() error {
	_, err := p.release()
	if p.pipe == nil {
		return err
	}
	err = errors.Join(err, p.pipe.Close())
	_ = p.cmd.Wait() // how the person left the pager says nothing about the output
	signal.Stop(p.calm)
	return err
}
