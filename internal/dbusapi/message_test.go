package dbusapi

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"reflect"
	"testing"

	"github.com/godbus/dbus/v5"
)

// encode gives a message's bytes.
func encode(t testing.TB, m *dbus.Message, order binary.ByteOrder) []byte {
	t.Helper()
	if len(m.Body) > 0 {
		m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(m.Body...))
	}
	var buf bytes.Buffer
	if err := m.EncodeTo(&buf, order); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// methodCall is a call that the bus has stamped with its sender.
func methodCall(path dbus.ObjectPath, iface, member string, body ...any) *dbus.Message {
	return &dbus.Message{Type: dbus.TypeMethodCall, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldPath: dbus.MakeVariant(path), dbus.FieldInterface: dbus.MakeVariant(iface),
		dbus.FieldMember: dbus.MakeVariant(member), dbus.FieldSender: dbus.MakeVariant(":1.7"),
		dbus.FieldDestination: dbus.MakeVariant(BusName),
	}, Body: body}
}

func TestReadMessage(t *testing.T) {
	for _, order := range []binary.ByteOrder{binary.LittleEndian, binary.BigEndian} {
		raw := encode(t, methodCall(RootPath, ManagerInterface, "WaitAck", uint64(7), uint64(8)), order)
		order.PutUint32(raw[8:], 99)
		raw = append(raw, encode(t, methodCall("/x", "a.b", "C"), order)...)
		in := bufio.NewReader(bytes.NewReader(raw))
		m, err := readMessage(in)
		if err != nil {
			t.Fatal(err)
		}
		want := header{typ: dbus.TypeMethodCall, serial: 99, path: RootPath, iface: ManagerInterface, member: "WaitAck", sender: ":1.7", signature: "tt"}
		if m.header != want {
			t.Errorf("header %+v, want %+v", m.header, want)
		}
		if body, err := m.body(); err != nil || !reflect.DeepEqual(body, []any{uint64(7), uint64(8)}) {
			t.Errorf("body %v, %v", body, err)
		}
		if m, err := readMessage(in); err != nil || m.member != "C" {
			t.Errorf("the second message: %v, %v", m, err)
		}
		if _, err := readMessage(in); !errors.Is(err, io.EOF) {
			t.Errorf("at the end: %v", err)
		}
	}
}

func TestReadMessageSkipsWhatIsTooLarge(t *testing.T) {
	large := methodCall("/x", "a.b", "Large", make([]byte, maxIncoming))
	fields := methodCall("/x", "a.b", "Fields")
	fields.Headers[dbus.FieldPath] = dbus.MakeVariant(dbus.ObjectPath("/" + string(bytes.Repeat([]byte("x"), maxFields))))
	var raw []byte
	for _, m := range []*dbus.Message{large, fields, methodCall("/x", "a.b", "Next")} {
		raw = append(raw, encode(t, m, binary.LittleEndian)...)
	}
	in := bufio.NewReader(bytes.NewReader(raw))
	m, err := readMessage(in)
	if err != nil || m.frame != nil || m.member != "Large" || m.sender != ":1.7" {
		t.Errorf("a large body: %+v, %v", m, err)
	}
	if _, err := readMessage(in); !errors.Is(err, errHeader) {
		t.Errorf("large fields: %v", err)
	}
	if m, err := readMessage(in); err != nil || m.member != "Next" {
		t.Errorf("the message after them: %+v, %v", m, err)
	}
}

func TestReadMessageUnusualHeader(t *testing.T) {
	raw := encode(t, methodCall("/x", "a.b", "C"), binary.LittleEndian)
	for _, at := range []int{17, 18, 19, 20} { // the first field's signature and its value's length
		bad := bytes.Clone(raw)
		bad[at] ^= 0xff
		in := bufio.NewReader(bytes.NewReader(append(bad, raw...)))
		if _, err := readMessage(in); !errors.Is(err, errHeader) {
			t.Errorf("byte %d: %v", at, err)
		}
		if m, err := readMessage(in); err != nil || m.member != "C" {
			t.Errorf("byte %d: the message after it: %+v, %v", at, m, err)
		}
	}
}

func FuzzReadMessage(f *testing.F) {
	f.Add(encode(f, methodCall(RootPath, ManagerInterface, "Publish", "t", "{}", map[string]dbus.Variant{"id": dbus.MakeVariant("x")}), binary.LittleEndian))
	f.Add(encode(f, methodCall(RootPath, ManagerInterface, "Describe", []string{"a"}), binary.BigEndian))
	f.Fuzz(func(t *testing.T, raw []byte) {
		in := bufio.NewReader(bytes.NewReader(raw))
		for {
			m, err := readMessage(in)
			if errors.Is(err, errHeader) {
				continue
			}
			if err != nil {
				return
			}
			if len(m.frame) > len(raw) {
				t.Fatalf("%d bytes out of %d", len(m.frame), len(raw))
			}
			_, _ = m.body() // must not panic
		}
	})
}
