package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

// scriptBus is a small bus in memory, for scripts to run castractl against over a
// real message bus.
type scriptBus struct {
	mu       sync.Mutex
	kind     string
	refusal  *bus.Error // what every publish is answered with
	vms      map[string]bus.VM
	refused  []bus.Refused
	asked    []string // the names whose state was asked for
	keys     int
	lines    []scriptLine
	more     chan struct{} // closed and replaced when lines grew
	watchers map[int]func(bus.VM, bool)
	ids      int
	listen   string
	answers  map[string]string // by topic: the payload that the VM who owns it answers with
}

// scriptLine is a record or a gap; seq is the highest number it stands for.
type scriptLine struct {
	seq   uint64
	topic string
	vm    string
	text  []byte
}

func newScriptBus(kind string) *scriptBus {
	return &scriptBus{kind: kind, listen: "127.0.0.1:7070", vms: make(map[string]bus.VM), answers: make(map[string]string), more: make(chan struct{}), watchers: make(map[int]func(bus.VM, bool))}
}

func (b *scriptBus) head() uint64 {
	if len(b.lines) == 0 {
		return 0
	}
	return b.lines[len(b.lines)-1].seq
}

func (b *scriptBus) append(line scriptLine) {
	b.lines = append(b.lines, line)
	close(b.more)
	b.more = make(chan struct{})
}

func (b *scriptBus) Publish(_ context.Context, req bus.PublishRequest) (uint64, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.refusal != nil {
		return 0, b.refusal
	}
	if b.kind == kindGuest {
		return 0, nil
	}
	seq := b.record("host", req)
	if answer, ok := b.answers[req.Topic]; ok && req.Reply != "" {
		vm, _ := wire.TopicVM(req.Topic)
		b.record(vm, bus.PublishRequest{Topic: req.Reply, Payload: []byte(answer)})
	}
	return seq, nil
}

// record stores a message with a fixed time; b.mu is held.
func (b *scriptBus) record(vm string, req bus.PublishRequest) uint64 {
	seq := b.head() + 1
	text, err := json.Marshal(struct {
		Seq     uint64          `json:"seq"`
		Time    time.Time       `json:"time"`
		VM      string          `json:"vm"`
		Topic   string          `json:"topic"`
		ID      string          `json:"id,omitempty"`
		Reply   string          `json:"reply,omitempty"`
		Payload json.RawMessage `json:"payload"`
	}{seq, timeOf(seq), vm, req.Topic, req.ID, req.Reply, req.Payload})
	if err != nil {
		panic(err)
	}
	b.append(scriptLine{seq, req.Topic, vm, append(text, '\n')})
	return seq
}

// timeOf is when the record of a number was stored.
func timeOf(seq uint64) time.Time { return testNow().Add(time.Duration(seq) * time.Millisecond) }

func (b *scriptBus) gap(from, to uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.append(scriptLine{seq: to, text: fmt.Appendf(nil, `{"type":"gap","from":%d,"to":%d}`+"\n", from, to)})
}

// WaitAck: what was sent to a VM of its own is acknowledged if that VM subscribes.
func (b *scriptBus) WaitAck(ctx context.Context, seq uint64) (string, error) {
	b.mu.Lock()
	var vm bus.VM
	for _, line := range b.lines {
		if name, ok := wire.TopicVM(line.topic); ok && line.seq == seq {
			vm = b.vms[name]
		}
	}
	b.mu.Unlock()
	if vm.BusSubscribed {
		return vm.VM, nil
	}
	<-ctx.Done()
	return "", ctx.Err()
}

func (b *scriptBus) wants(req *bus.TailRequest, line *scriptLine) bool {
	if !req.Until.IsZero() && timeOf(line.seq).After(req.Until) {
		return false
	}
	if line.topic == "" {
		return true // a gap
	}
	if req.VM != "" && line.vm != req.VM && line.topic != "vm:"+req.VM {
		return false
	}
	return len(req.Topics) == 0 || slices.ContainsFunc(req.Topics, func(pattern string) bool {
		p, err := wire.ParsePattern(pattern)
		return err == nil && p.Match(line.topic)
	})
}

func (b *scriptBus) Tail(ctx context.Context, req bus.TailRequest, w io.Writer) error {
	b.mu.Lock()
	next := len(b.lines)
	switch {
	case req.All:
		next = 0
	case !req.Since.IsZero():
		next = slices.IndexFunc(b.lines, func(l scriptLine) bool { return !timeOf(l.seq).Before(req.Since) })
		if next < 0 {
			next = len(b.lines)
		}
	case req.From > 0:
		next = slices.IndexFunc(b.lines, func(l scriptLine) bool { return l.seq >= req.From })
		if next < 0 {
			next = len(b.lines)
		}
	case req.Lines > 0:
		for n := req.Lines; next > 0 && n > 0; {
			if next--; b.wants(&req, &b.lines[next]) {
				n--
			}
		}
	}
	b.mu.Unlock()
	for {
		b.mu.Lock()
		lines, more := b.lines[next:], b.more
		next = len(b.lines)
		b.mu.Unlock()
		for i := range lines {
			if b.wants(&req, &lines[i]) {
				if _, err := w.Write(lines[i].text); err != nil {
					return err
				}
			}
		}
		if !req.Follow {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-more:
		}
	}
}

func (b *scriptBus) Status(names []string) bus.Status {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.asked = append(b.asked, names...)
	if len(names) == 0 {
		names = slices.Sorted(maps.Keys(b.vms))
	}
	st := bus.Status{
		Broker: bus.Broker{
			Faults: []bus.Fault{},
			Kind:   b.kind, Version: "0.1.0", State: "running", PID: 1, UptimeMS: 61_000, Listen: []string{b.listen},
			LogDir: "/var/log/castra", StateDir: "/var/lib/castra", UnknownVMs: "reject", Sync: "always", HeadSeq: b.head(),
		},
		VMs:     []bus.VM{},
		Refused: append([]bus.Refused{}, b.refused...),
	}
	for _, name := range names {
		if vm, ok := b.vms[name]; ok {
			st.VMs = append(st.VMs, vm)
		}
	}
	return st
}

func (b *scriptBus) Watch(fn func(bus.VM, bool)) (cancel func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	id := b.ids
	b.ids++
	b.watchers[id] = fn
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.watchers, id)
	}
}

// set changes a VM; its states are "reachable", "subscribed" and "unreachable".
func (b *scriptBus) set(name, state string) {
	b.mu.Lock()
	vm, ok := b.vms[name]
	if !ok {
		vm = bus.VM{VM: name, Registered: true, Subscriptions: []string{}, Capabilities: []string{}, Forwards: []string{}}
	}
	vm.State, vm.Reachable, vm.BusSubscribed, vm.Subscriptions = state, state != "unreachable", state == "subscribed", []string{}
	if vm.BusSubscribed {
		vm.State, vm.Subscriptions = "reachable", []string{"broadcast", "vm:" + name}
	}
	vm.Session, vm.RemoteAddr, vm.Reason = "", "", ""
	if vm.Reachable {
		vm.Session, vm.RemoteAddr = "sess-0123456789abcdef0123456789abcdef", "127.0.0.1:40001"
		vm.LastHandshakeAgeMS, vm.LastHeartbeatAgeMS, vm.Capabilities = ms(60), ms(3), []string{wire.CapBus}
	}
	b.vms[name] = vm
	watchers := slices.Collect(maps.Values(b.watchers))
	b.mu.Unlock()
	for _, fn := range watchers {
		fn(vm, false)
	}
}

func (b *scriptBus) AddVM(_ context.Context, req bus.AddVMRequest) (bool, []byte, error) {
	b.mu.Lock()
	_, ok := b.vms[req.Name]
	b.mu.Unlock()
	if ok && req.IfMissing {
		return false, nil, nil
	}
	if ok {
		return false, nil, bus.Errorf(bus.CodeVMExists, "%s is registered", req.Name)
	}
	b.set(req.Name, "unreachable")
	b.mu.Lock()
	defer b.mu.Unlock()
	vm := b.vms[req.Name]
	vm.Reason, vm.Keyed, vm.Forwards = "never-seen", !req.NoKey, append([]string{}, req.Forwards...)
	b.vms[req.Name] = vm
	if req.NoKey {
		return true, nil, nil
	}
	return true, b.newKey(), nil
}

func (b *scriptBus) newKey() []byte {
	b.keys++
	return []byte(strings.Repeat(string(rune('a'+b.keys)), 32))
}

func (b *scriptBus) RemoveVM(_ context.Context, name string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.vms[name]; !ok {
		return bus.Errorf(bus.CodeNoSuchVM, "%s is not registered", name)
	}
	delete(b.vms, name)
	return nil
}

func (b *scriptBus) RekeyVM(_ context.Context, name string) ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.vms[name]; !ok {
		return nil, bus.Errorf(bus.CodeNoSuchVM, "%s is not registered", name)
	}
	return b.newKey(), nil
}
