// Package dbusapi serves org.castra.Bus1 on the message bus: a manager object,
// one object a VM, and the signals that keep a watcher up to date. It knows the
// bus it serves only as the small interface Bus, so that castrad and
// castra-guestd offer the same thing.
//
// # Anybody may call
//
// The system bus lets every local user send us messages, so nothing here is
// sized by a caller. One goroutine reads the connection and admits calls: at
// most so many, and so many bytes, a sender and in all. What it does not admit it
// answers itself before it reads on, so a flood is slowed by the socket and costs
// neither memory nor goroutines. A call's arguments are decoded only if they have
// the method's types.
//
// # Order
//
// Calls that change something are carried out one after the other for each
// sender, in the order in which they arrived, so the records of a program that
// does not wait for each answer are stored in the order in which it sent them.
//
// # Objects
//
// VM objects are not kept. A path is turned into a name and the name looked up
// when somebody asks. All that a VM costs until then is what was signalled of it
// last, some 300 bytes.
package dbusapi

import (
	"strings"

	"github.com/godbus/dbus/v5"
)

// The service's names on the message bus.
const (
	BusName          = "org.castra.Bus1"
	RootPath         = dbus.ObjectPath("/org/castra/Bus1")
	ManagerInterface = "org.castra.Bus1.Manager"
	VMInterface      = "org.castra.Bus1.VM"

	vmParent = RootPath + "/vm"
)

// The interfaces and names that every service shares (D-Bus Specification,
// "Standard Interfaces" and "Message Bus Messages").
const (
	driverName = "org.freedesktop.DBus"
	driverPath = dbus.ObjectPath("/org/freedesktop/DBus")

	ifaceDriver     = "org.freedesktop.DBus"
	ifacePeer       = "org.freedesktop.DBus.Peer"
	ifaceIntrospect = "org.freedesktop.DBus.Introspectable"
	ifaceProperties = "org.freedesktop.DBus.Properties"
	ifaceObjects    = "org.freedesktop.DBus.ObjectManager"
)

// VMPath gives the object path of a VM.
func VMPath(name string) dbus.ObjectPath {
	return vmParent + "/" + dbus.ObjectPath(escapeLabel(name))
}

// vmOfPath is VMPath read backwards; ok is false for a path that VMPath never
// gives, so that no VM has two paths.
func vmOfPath(path dbus.ObjectPath) (name string, ok bool) {
	label, ok := strings.CutPrefix(string(path), string(vmParent)+"/")
	if !ok {
		return "", false
	}
	name, ok = unescapeLabel(label)
	return name, ok && escapeLabel(name) == label
}

const hexDigits = "0123456789abcdef"

// escapeLabel encodes s as one element of an object path, as systemd's
// sd_bus_path_encode does: letters and digits stay, but for a digit in front;
// any other byte becomes _xx; nothing at all becomes _.
func escapeLabel(s string) string {
	if s == "" {
		return "_"
	}
	var b strings.Builder
	for i := range len(s) {
		c := s[i]
		if isLetter(c) || i > 0 && isDigit(c) {
			b.WriteByte(c)
			continue
		}
		b.Write([]byte{'_', hexDigits[c>>4], hexDigits[c&15]})
	}
	return b.String()
}

func unescapeLabel(s string) (string, bool) {
	if s == "_" {
		return "", true
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '_' {
			b.WriteByte(s[i])
			continue
		}
		if i+2 >= len(s) {
			return "", false
		}
		hi, lo := strings.IndexByte(hexDigits, s[i+1]), strings.IndexByte(hexDigits, s[i+2])
		if hi < 0 || lo < 0 {
			return "", false
		}
		b.WriteByte(byte(hi<<4 | lo))
		i += 2
	}
	return b.String(), true
}

func isLetter(c byte) bool { return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' }

func isDigit(c byte) bool { return c >= '0' && c <= '9' }
