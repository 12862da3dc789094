package dbusapi

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/godbus/dbus/v5"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
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

// FuzzArguments calls the methods that change something with whatever arguments of
// the right types: what reaches the bus and the registry is what the wire takes too.
func FuzzArguments(f *testing.F) {
	f.Add("t", `{"a": 1}`, "i", "r", "web1", false)
	f.Add("vm:web1/x", `"\ud800"`, "", "vm:", "HOST", true)
	f.Add("vm:../x", "{}{}", strings.Repeat("i", 129), "castra.x", "../../etc/passwd", false)
	f.Add("", "\xff", "\xff", "\x00", "", true)
	b, reg := newFakeBus(), &fakeRegistry{}
	var asked bus.PublishRequest
	b.publish = func(_ context.Context, req bus.PublishRequest) (uint64, error) {
		asked = req
		return 1, nil
	}
	c := &call{message: &message{}, link: &link{srv: &Server{opts: Options{Bus: b, Registry: reg}, daemon: "castrad"}}}
	f.Fuzz(func(t *testing.T, topic, payload, id, reply, name string, flag bool) {
		opts := map[string]dbus.Variant{"id": dbus.MakeVariant(id), "reply": dbus.MakeVariant(reply)}
		if flag {
			opts[name] = dbus.MakeVariant(flag)
		}
		if _, err := publish(t.Context(), c, []any{topic, payload, opts}); err == nil {
			if !wire.ValidTopic(asked.Topic) || asked.Reply != "" && !wire.ValidTopic(asked.Reply) || !wire.ValidID(asked.ID) || !json.Valid(asked.Payload) || len(asked.Payload) > wire.MaxPayload {
				t.Errorf("the bus was asked for %+v", asked)
			}
			if flag && name != "id" && name != "reply" {
				t.Errorf("the option %q is taken", name)
			}
		}
		reg.added, b.requests = nil, nil
		for key, value := range map[string]any{"no-key": flag, "forwards": []string{topic}, name: flag} {
			_, _ = addVM(t.Context(), c, []any{name, map[string]dbus.Variant{key: dbus.MakeVariant(value)}})
		}
		_, rerr := removeVM(t.Context(), c, []any{name})
		_, kerr := rekeyVM(t.Context(), c, []any{name})
		if valid := wire.ValidName(name) && !wire.Reserved(name); !valid && (rerr == nil || kerr == nil || len(reg.asked()) > 0) {
			t.Errorf("%q is taken for a VM's name: %v, %v, %+v", name, rerr, kerr, reg.asked())
		}
	})
}
