package dbusapi

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/godbus/dbus/v5"
)

// FuzzMessage reads whatever bytes as what a message bus passes on: header, and
// arguments where the signature is one that a method takes. Nothing may panic, or
// take more memory than what was sent allows.
func FuzzMessage(f *testing.F) {
	add := func(m *dbus.Message, order binary.ByteOrder) {
		var b bytes.Buffer
		if err := m.EncodeTo(&b, order); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
	}
	for _, args := range [][]any{
		nil,
		{"web1"},
		{[]string{"a", "b"}},
		{"topic", `{"a":1}`, map[string]dbus.Variant{"id": dbus.MakeVariant("x"), "reply": dbus.MakeVariant(uint32(7))}},
		{map[string]dbus.Variant{"lines": dbus.MakeVariant(uint64(1)), "topics": dbus.MakeVariant([]string{"t"})}},
		{uint64(1), uint64(2)},
	} {
		m := &dbus.Message{Type: dbus.TypeMethodCall, Headers: map[dbus.HeaderField]dbus.Variant{
			dbus.FieldPath: dbus.MakeVariant(RootPath), dbus.FieldInterface: dbus.MakeVariant(ManagerInterface),
			dbus.FieldMember: dbus.MakeVariant("Publish"), dbus.FieldSender: dbus.MakeVariant(":1.7"),
		}, Body: args}
		if len(args) > 0 {
			m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(args...))
		}
		add(m, binary.LittleEndian)
		add(m, binary.BigEndian)
	}
	f.Add([]byte("l\x01\x00\x01\xff\xff\xff\xff\x01\x00\x00\x00\xff\xff\xff\xff"))
	taken := map[string]bool{}
	for _, all := range methods {
		for _, m := range all {
			taken[m.in] = true
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := readMessage(bufio.NewReader(bytes.NewReader(data)))
		if err != nil && !errors.Is(err, errHeader) || m == nil || m.frame == nil {
			return
		}
		if len(m.frame) > maxIncoming {
			t.Errorf("a message of %d bytes was kept", len(m.frame))
		}
		_, _ = lookup(&m.header)
		if !taken[m.signature] {
			return
		}
		args, err := m.body()
		if err != nil {
			return
		}
		for _, a := range args {
			if opts, ok := a.(map[string]dbus.Variant); ok {
				_, _ = tailRequest(opts)
			}
		}
	})
}
