package cli

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strconv"
	"strings"
)

// Socket states in /proc/net/*, in hex (include/net/tcp_states.h).
const (
	tcpListen  = "0A"
	udpUnbound = "07" // TCP_CLOSE: a UDP socket with no peer, which is one that serves
)

// openPorts reads which of the host's ports have a listener, on any address, from
// the tables of /proc/net: one that is missing (IPv6 switched off) has none.
func openPorts(proc fs.FS) (map[socketPort]bool, error) {
	open := make(map[socketPort]bool)
	for _, name := range []string{"tcp", "tcp6", "udp", "udp6"} {
		file, err := proc.Open("net/" + name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reading the host's sockets: %w", err)
		}
		proto := name[:3]
		err = scanSockets(file, func(port uint16, state string) {
			if proto == "tcp" && state == tcpListen || proto == "udp" && state == udpUnbound {
				open[socketPort{proto, port}] = true
			}
		})
		_ = file.Close() // only read from
		if err != nil {
			return nil, fmt.Errorf("reading /proc/net/%s: %w", name, err)
		}
	}
	return open, nil
}

// scanSockets reads one table (proc_pid_net(5)): a heading, then a socket a line,
// "sl local_address rem_address st …", where an address is hex, a colon and the
// port in hex.
func scanSockets(r io.Reader, found func(port uint16, state string)) error {
	lines := bufio.NewScanner(r)
	lines.Scan() // the heading
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 4 {
			return fmt.Errorf("unexpected line %q", lines.Text())
		}
		_, hex, _ := strings.Cut(fields[1], ":")
		port, err := strconv.ParseUint(hex, 16, 16)
		if err != nil {
			return fmt.Errorf("unexpected address %q", fields[1])
		}
		found(uint16(port), fields[3])
	}
	return lines.Err()
}
