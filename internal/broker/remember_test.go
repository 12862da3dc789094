package broker

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/presence"
	"github.com/castrabus/castra/internal/wire"
)

// What a castrad that ended wrote down of a VM is known to the next one: when it was last
// heard of, and that it was. What the VM says by then is newer and stays.
func TestLastHeardOfAcrossARestart(t *testing.T) {
	o := testOptions(t, t.TempDir())
	b := start(t, o)
	g := connect(t, b.addr, "g")
	g.send(`{"type":"publish","payload":1}`, `{"type":"heartbeat"}`)
	g.expect(`{"ack":"publish"}`)
	g.expect(`{"ack":"heartbeat"}`)
	b.table.Know("new")
	before, _ := b.table.Last("g")
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(b.records.dir, "g.json")
	written, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(b.records.dir, "bad.json"), []byte(`{"timestamp":-1}`), 0o600); err != nil {
		t.Fatal(err)
	}

	b = start(t, testOptions(t, filepath.Dir(o.StateDir)))
	b.table.Know("new")
	var vm bus.VM
	eventually(t, "g is known", func() bool {
		for _, vm = range b.table.Snapshot([]string{"g"}) {
			return true
		}
		return false
	})
	if vm.Reachable || vm.Reason != presence.ReasonRestarted || vm.LastHandshakeAgeMS == nil || vm.LastPublishAgeMS == nil || vm.LastHeartbeatAgeMS == nil {
		t.Errorf("it is %+v", vm)
	}
	if last, _ := b.table.Last("g"); last.Handshake.Unix() != before.Handshake.Unix() || last.Publish.Unix() != before.Publish.Unix() {
		t.Errorf("last heard of at %v and %v, was %v and %v", last.Handshake, last.Publish, before.Handshake, before.Publish)
	}
	for _, vm := range b.table.Snapshot([]string{"new", "bad"}) {
		if vm.VM != "new" || vm.Reason != presence.ReasonNeverSeen || vm.LastHandshakeAgeMS != nil {
			t.Errorf("of what nothing is known: %+v", vm)
		}
	}
	if now, err := os.ReadFile(file); err != nil || string(now) != string(written) {
		t.Errorf("its file is %s, %v", now, err)
	}
	connect(t, b.addr, "g")
	last, err := b.records.vms.read("g")
	if err != nil {
		t.Fatal(err)
	}
	b.table.Remember("g", last) // read late
	if vm := b.table.Snapshot([]string{"g"})[0]; !vm.Reachable || vm.Reason != "" {
		t.Errorf("connected, it is %+v", vm)
	}
}

// A guest may be back before its file was read: what that says of it is not written over.
func TestBackBeforeItsFileWasRead(t *testing.T) {
	table := presence.New(presence.Options{})
	records, err := openRecorder(t.TempDir(), table, nil)
	if err != nil {
		t.Fatal(err)
	}
	b := &Broker{opts: testOptions(t, t.TempDir()), table: table, records: records}
	b.settings.Store(&Settings{AcceptUnknown: true})
	published := time.Unix(1_700_000_000, 0)
	files, err := records.vms.files.Open()
	if err != nil {
		t.Fatal(err)
	}
	before := presence.Last{Handshake: published, Publish: published, Capabilities: []string{wire.CapBus}}
	if err := errors.Join(records.vms.write(files, "g", &before), files.Close()); err != nil {
		t.Fatal(err)
	}
	records.past = &past{recall: b.recall, read: make(map[string]struct{})}

	if _, _, err := table.Connect("g", nil, "127.0.0.1:1", []string{wire.CapBus}); err != nil {
		t.Fatal(err)
	}
	records.handshake("g")
	records.writeDue()
	last, err := records.vms.read("g")
	if err != nil || !last.Publish.Equal(published) || last.Handshake.Equal(published) {
		t.Errorf("its file says %+v, %v", last, err)
	}
	if vm := table.Snapshot(nil)[0]; vm.LastPublishAgeMS == nil {
		t.Errorf("it is %+v", vm)
	}
}
