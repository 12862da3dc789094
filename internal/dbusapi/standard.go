package dbusapi

import (
	"bytes"
	"context"
	"encoding/hex"
	"os"
	"slices"
	"strings"
)

var peerMethods = []method{
	{name: "Ping", in: "", run: func(context.Context, *call, []any) ([]any, error) { return nil, nil }},
	{name: "GetMachineId", in: "", run: machineID},
}

// machineID answers with machine-id(5).
func machineID(context.Context, *call, []any) ([]any, error) {
	for _, file := range []string{"/etc/machine-id", "/var/lib/dbus/machine-id"} {
		id, err := os.ReadFile(file)
		id = bytes.TrimSpace(id)
		if _, hexErr := hex.Decode(make([]byte, 16), id); err == nil && hexErr == nil && len(id) == 32 {
			return []any{string(id)}, nil
		}
	}
	return nil, dbusError("org.freedesktop.DBus.Error.FileNotFound", "this machine has no /etc/machine-id")
}

var introspectMethods = []method{
	{name: "Introspect", in: "", heavy: true, run: introspection},
}

func introspection(_ context.Context, c *call, _ []any) ([]any, error) {
	var children []string
	switch {
	case c.path == vmParent:
		for _, vm := range c.link.srv.opts.Bus.Status(nil).VMs {
			children = append(children, escapeLabel(vm.VM))
		}
		slices.Sort(children)
	case strings.HasPrefix(string(c.path), string(vmParent)):
		if _, _, err := propertiesAt(c.link.srv.opts.Bus, c.path); err != nil {
			return nil, err
		}
	case c.path == "/":
		children = []string{"org"}
	default:
		// The one way down from here to a VM.
		child, _, _ := strings.Cut(string(vmParent[len(c.path)+1:]), "/")
		children = []string{child}
	}
	var b strings.Builder
	b.WriteString(doctype + "<node>\n")
	for _, i := range interfacesAt(c.path) {
		b.WriteString(descriptions[i])
	}
	for _, child := range children {
		b.WriteString(" <node name=\"" + child + "\"/>\n") // escaped: letters, digits, _
	}
	b.WriteString("</node>\n")
	return []any{b.String()}, nil
}
