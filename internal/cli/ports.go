package cli

import (
	"context"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/castrabus/castra/internal/bus"
)

// The states of a port.
const (
	portReserved = "broker-reserved" // the bus listens there itself
	portDeclared = "declared"        // registered; its VM is not there, and neither is a listener
	portActive   = "active"          // the VM is reachable and the host's port is open
	portInactive = "inactive"        // one of the two is missing
	portConflict = "conflict"        // claimed twice
)

// port is one line of `ports`: a listener of the bus, or a forward.
type port struct {
	VM      string `json:"vm"`                // "": a listener of the bus
	Address string `json:"address,omitempty"` // a listener's
	Host    uint16 `json:"host"`              // 0: not a port but a path, in Address
	Guest   uint16 `json:"guest,omitempty"`   // 0: a listener of the bus
	Proto   string `json:"proto"`
	Status  string `json:"status"`
	Why     string `json:"why,omitempty"`
}

func newPortsCmd(f *Factory) *cobra.Command {
	var active, asJSON bool
	cmd := &cobra.Command{
		Use:   "ports",
		Short: "List the bus's listeners and the VMs' forwarded ports",
		Long: `List the bus's own listeners and the forwarded ports of the registered VMs, as
the host's sockets show them. castrad is not started for this.

STATUS is broker-reserved for a listener of the bus. A forward is active when
its VM is reachable and the host's port is open, declared when neither is so,
inactive when one of the two is missing, and a conflict when two claim the same
port.

Exit codes: 0 done, 5 castrad is not to be had.`,
		Example: `  castractl ports
  castractl ports --active --json | jq -r '.ports[].host'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.runPorts(cmd.Context(), active, asJSON)
		},
	}
	cmd.Flags().BoolVar(&active, "active", false, "only the listeners and the forwards in use")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (f *Factory) runPorts(ctx context.Context, active, asJSON bool) error {
	st, err := f.lookUp(ctx, nil)
	if err != nil {
		return err
	}
	// castrad's network may be private to it: the host's sockets are looked at here.
	open, err := openPorts(f.Proc)
	if err != nil {
		return err
	}
	ports := listPorts(&st, open)
	if active {
		ports = activePorts(ports)
	}
	if asJSON {
		return f.printJSON(struct {
			bus.Status
			Ports []port `json:"ports"`
		}{st, ports})
	}
	return f.paged(func(w io.Writer) error { return f.writePorts(w, ports) })
}

// socketPort is a port number of one protocol, "tcp" or "udp".
type socketPort struct {
	proto string
	port  uint16
}

// listPorts judges each listener and forward by what is open on the host.
func listPorts(st *bus.Status, open map[socketPort]bool) []port {
	ports := make([]port, 0, len(st.Broker.Listen))
	claims := make(map[socketPort]int)
	for _, address := range st.Broker.Listen {
		p := port{Address: address, Proto: "unix", Status: portReserved}
		if _, service, err := net.SplitHostPort(address); err == nil {
			if n, err := strconv.ParseUint(service, 10, 16); err == nil {
				p.Proto, p.Host = "tcp", uint16(n)
				claims[socketPort{"tcp", p.Host}]++
			}
		}
		ports = append(ports, p)
	}
	reserved := len(ports)
	reachable := make(map[string]bool)
	for i := range st.VMs {
		vm := &st.VMs[i]
		reachable[vm.VM] = vm.Reachable
		for _, text := range vm.Forwards {
			p, err := parseForward(text)
			if err != nil {
				// castrad took it once: a newer one may know more kinds.
				p = port{Address: text, Status: portInactive, Why: "of an unknown kind"}
			} else {
				claims[socketPort{p.Proto, p.Host}]++
			}
			p.VM = vm.VM
			ports = append(ports, p)
		}
	}
	for i := reserved; i < len(ports); i++ {
		p := &ports[i]
		if p.Status == "" {
			at := socketPort{p.Proto, p.Host}
			p.Status, p.Why = judgePort(claims[at] > 1, open[at], reachable[p.VM])
		}
	}
	return ports
}

func judgePort(claimed, open, reachable bool) (status, why string) {
	switch {
	case claimed:
		return portConflict, "another VM or the bus has the same port"
	case open && reachable:
		return portActive, ""
	case open:
		return portInactive, "VM not reachable"
	case reachable:
		return portInactive, "nothing listens on the host's port"
	}
	return portDeclared, ""
}

// parseForward reads "tcp:HOST:GUEST", two port numbers; udp is taken too.
func parseForward(text string) (port, error) {
	parts := strings.Split(text, ":")
	if len(parts) != 3 || parts[0] != "tcp" && parts[0] != "udp" {
		return port{}, fmt.Errorf("%q is no forward: write it as tcp:HOST:GUEST, with two port numbers", text)
	}
	p := port{Proto: parts[0]}
	for i, to := range []*uint16{&p.Host, &p.Guest} {
		n, err := strconv.ParseUint(parts[i+1], 10, 16)
		if err != nil || n == 0 {
			return port{}, fmt.Errorf("%q is no forward: %q is no port number from 1 to 65535", text, parts[i+1])
		}
		*to = uint16(n)
	}
	return p, nil
}

func activePorts(ports []port) []port {
	kept := ports[:0]
	for _, p := range ports {
		if p.Status == portReserved || p.Status == portActive {
			kept = append(kept, p)
		}
	}
	return kept
}

func (f *Factory) writePorts(w io.Writer, ports []port) error {
	t := table{columns: []column{
		{title: "VM", yield: cutMiddle},
		{title: "HOST"},
		{title: "GUEST"},
		{title: "PROTO"},
		{title: "STATUS"},
	}}
	for _, p := range ports {
		host, guest, status := p.Address, "", p.Status
		if host == "" && p.Host > 0 {
			host = strconv.Itoa(int(p.Host))
		}
		if p.Guest > 0 {
			guest = strconv.Itoa(int(p.Guest))
		}
		if p.Status == portInactive {
			status += " (" + p.Why + ")"
		}
		t.add(cell{p.VM, plain}, cell{host, plain}, cell{guest, plain}, cell{p.Proto, plain}, cell{status, portStyle(p.Status)})
	}
	return t.write(w, &f.IO, !f.NoLegend)
}

func portStyle(status string) style {
	switch status {
	case portActive:
		return green
	case portConflict:
		return red
	case portInactive:
		return yellow
	}
	return plain
}
