package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// slowHang is hang for what takes longer beside other work: a VM without KVM, whose boot
// takes ten seconds alone, or a million records.
const slowHang = 5 * time.Minute

// A console is the far end of a VM's serial port.
type console struct {
	l    *lab
	conn net.Conn

	mu  sync.Mutex
	got []byte // all that the VM has said
	err error  // why there will be no more
}

// dialConsole connects to a console's socket as soon as there is one.
func (l *lab) dialConsole(path string) *console {
	l.Helper()
	c := &console{l: l}
	l.until("the VM's console is there", func() (err error) {
		c.conn, err = net.Dial("unix", path)
		return err
	})
	var reader sync.WaitGroup
	reader.Go(c.read)
	l.Cleanup(func() {
		c.conn.Close()
		reader.Wait()
		if l.Failed() {
			l.Logf("the VM's console:\n%s", c.got)
		}
	})
	return c
}

func (c *console) read() {
	buf := make([]byte, 4096)
	for {
		n, err := c.conn.Read(buf)
		c.mu.Lock()
		c.got = append(c.got, buf[:n]...)
		c.err = err
		c.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// said is all that the VM has said.
func (c *console) said() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return bytes.Clone(c.got)
}

// booted waits for the shell's prompt.
func (c *console) booted() {
	c.l.Helper()
	c.l.within(slowHang, "the VM's shell is there", func() error {
		if c.run(""); !bytes.Contains(c.said(), []byte("# ")) {
			time.Sleep(time.Second)
			return errors.New("there is no prompt")
		}
		return nil
	})
}

// expect waits until the VM says text after the first from bytes that it said, and
// returns how many it had said by then.
func (c *console) expect(from int, text string) int {
	c.l.Helper()
	var at int
	c.l.within(slowHang, fmt.Sprintf("the VM's console says %q", text), func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		if i := bytes.Index(c.got[from:], []byte(text)); i >= 0 {
			at = from + i + len(text)
			return nil
		}
		return errors.Join(errors.New("it has not"), c.err)
	})
	return at
}

// run types a command at the VM's shell.
func (c *console) run(command string) {
	c.l.Helper()
	if _, err := io.WriteString(c.conn, command+"\n"); err != nil {
		c.l.Fatal(err)
	}
}
