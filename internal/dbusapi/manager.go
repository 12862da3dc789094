package dbusapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

// maxRawPayload bounds a payload as it was sent, white space and all, in bytes;
// what is left of it must fit wire.MaxPayload.
const maxRawPayload = 1 << 20

// maxWait bounds WaitAck: a day, which also keeps the sum of times in range.
const maxWait = 24 * time.Hour

var managerMethods = []method{
	{name: "Publish", in: "ssa{sv}", action: actionPublish, ordered: true, run: publish},
	{name: "WaitAck", in: "tt", action: actionPublish, run: waitAck},
	{name: "Tail", in: "a{sv}", action: actionTail, run: tail},
	{name: "Describe", in: "as", heavy: true, run: describe},
	{name: "AddVM", in: "sa{sv}", action: actionManage, ordered: true, run: addVM},
	{name: "RemoveVM", in: "s", action: actionManage, ordered: true, run: removeVM},
	{name: "RekeyVM", in: "s", action: actionManage, ordered: true, run: rekeyVM},
}

func publish(ctx context.Context, c *call, args []any) ([]any, error) {
	req := bus.PublishRequest{Topic: args[0].(string)}
	payload := args[1].(string)
	opts := options(args[2].(map[string]dbus.Variant))
	_, hasID := opts["id"]
	if err := errors.Join(take(opts, "id", &req.ID), take(opts, "reply", &req.Reply), opts.done()); err != nil {
		return nil, err
	}
	switch {
	case !wire.ValidTopic(req.Topic):
		return nil, badTopic("topic", req.Topic)
	case req.Reply != "" && !wire.ValidTopic(req.Reply):
		return nil, badTopic("reply", req.Reply)
	case hasID && !wire.ValidID(req.ID):
		return nil, bus.Errorf(bus.CodeInvalidArg, "id must have 1 to %d bytes, not %d", wire.MaxID, len(req.ID))
	case len(payload) > maxRawPayload:
		return nil, bus.Errorf(bus.CodeTooLarge, "the payload has %d bytes; at most %d are stored, white space aside", len(payload), wire.MaxPayload)
	}
	var err error
	if req.Payload, err = wire.Compact([]byte(payload)); err != nil {
		return nil, bus.Errorf(bus.CodeInvalidArg, "the payload is no JSON value that can be stored (%s); a string needs quotes of its own", err)
	}
	if len(req.Payload) > wire.MaxPayload {
		return nil, bus.Errorf(bus.CodeTooLarge, "the payload has %d bytes without white space; at most %d are stored", len(req.Payload), wire.MaxPayload)
	}
	seq, err := c.link.srv.opts.Bus.Publish(ctx, req)
	return []any{seq}, err
}

func badTopic(what, topic string) error {
	const shown = 64 // bytes: enough to know it by
	return bus.Errorf(bus.CodeBadTopic, "%s %.*q is none: 1 to %d of A-Za-z0-9._:/-, and after vm: a VM's name", what, shown, topic, wire.MaxTopic)
}

func waitAck(ctx context.Context, c *call, args []any) ([]any, error) {
	seq, timeout := args[0].(uint64), maxWait
	if usec := args[1].(uint64); usec < uint64(maxWait/time.Microsecond) {
		timeout = time.Duration(usec) * time.Microsecond
	}
	held, release, err := c.link.hold(ctx, c)
	if err != nil {
		return nil, err
	}
	defer release()
	held, cancel := context.WithTimeout(held, timeout)
	defer cancel()
	vm, err := c.link.srv.opts.Bus.WaitAck(held, seq)
	if errors.Is(err, context.DeadlineExceeded) {
		err = bus.Errorf(bus.CodeNoAck, "no guest acknowledged record %d within %s", seq, timeout)
	}
	return []any{text(vm)}, err
}

func describe(_ context.Context, c *call, args []any) ([]any, error) {
	st := c.link.srv.opts.Bus.Status(args[0].([]string))
	// Readers expect lists, also where there is nothing to list.
	st.VMs, st.Refused, st.Broker.Listen = list(st.VMs), list(st.Refused), list(st.Broker.Listen)
	st.Broker.Faults = list(st.Broker.Faults)
	st.Broker.Limited = counts(st.Broker.Limited)
	for i := range st.VMs {
		vm := &st.VMs[i]
		vm.Subscriptions, vm.Capabilities, vm.Forwards = list(vm.Subscriptions), list(vm.Capabilities), list(vm.Forwards)
	}
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(st); err != nil {
		return nil, fmt.Errorf("encoding the status: %w", err)
	}
	return []any{strings.TrimSuffix(out.String(), "\n")}, nil
}

func list[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

func addVM(ctx context.Context, c *call, args []any) ([]any, error) {
	req := bus.AddVMRequest{Name: args[0].(string)}
	opts := options(args[1].(map[string]dbus.Variant))
	if err := errors.Join(take(opts, "no-key", &req.NoKey), take(opts, "if-missing", &req.IfMissing), take(opts, "forwards", &req.Forwards), opts.done()); err != nil {
		return nil, err
	}
	r, err := c.registry(req.Name)
	if err != nil {
		return nil, err
	}
	created, key, err := r.AddVM(ctx, req)
	return []any{created, list(key)}, err
}

func removeVM(ctx context.Context, c *call, args []any) ([]any, error) {
	r, err := c.registry(args[0].(string))
	if err != nil {
		return nil, err
	}
	return nil, r.RemoveVM(ctx, args[0].(string))
}

func rekeyVM(ctx context.Context, c *call, args []any) ([]any, error) {
	r, err := c.registry(args[0].(string))
	if err != nil {
		return nil, err
	}
	key, err := r.RekeyVM(ctx, args[0].(string))
	return []any{list(key)}, err
}

// registry is where the VM called name is admitted.
func (c *call) registry(name string) (Registry, error) {
	switch r := c.link.srv.opts.Registry; {
	case r == nil:
		return nil, bus.Errorf(bus.CodeNotHere, "%s admits no VMs; ask castrad, on the host; where that is this machine too: systemctl start castrad", c.link.srv.daemon)
	case !wire.ValidName(name):
		return nil, bus.Errorf(bus.CodeInvalidName, "%.*q is no VM's name: 1 to %d of A-Za-z0-9._-, beginning with a letter or digit", wire.MaxName, name, wire.MaxName)
	case wire.Reserved(name):
		return nil, bus.Errorf(bus.CodeInvalidName, "the name %q is the host's own", name)
	default:
		return r, nil
	}
}

// options are the a{sv} that a method was given. Each is taken out by its name,
// and none may be left then: a misspelt option is an error, not ignored.
type options map[string]dbus.Variant

// take moves the option called key to dst, if it was given. Its D-Bus type must be
// the one that dst has.
func take[T any](o options, key string, dst *T) error {
	v, ok := o[key]
	if !ok {
		return nil
	}
	delete(o, key)
	if *dst, ok = v.Value().(T); !ok {
		return bus.Errorf(bus.CodeInvalidArg, "option %q must be of the type %s, not %s", key, dbus.SignatureOf(*dst), v.Signature())
	}
	return nil
}

// done names what is left.
func (o options) done() error {
	if len(o) == 0 {
		return nil
	}
	return bus.Errorf(bus.CodeInvalidArg, "unknown options %.200q", slices.Sorted(maps.Keys(o)))
}
