package identity

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/castrabus/castra/internal/bus"
	"github.com/castrabus/castra/internal/wire"
)

type dirs struct{ vms, dropins string }

func newDirs(t *testing.T) dirs {
	t.Helper()
	d := dirs{filepath.Join(t.TempDir(), "vms"), filepath.Join(t.TempDir(), "vms.d")}
	for _, dir := range []string{d.vms, d.dropins} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

func (d dirs) open(t *testing.T) (*Registry, []Problem) {
	t.Helper()
	r, problems, err := Open(d.vms, d.dropins)
	if err != nil {
		t.Fatal(err)
	}
	return r, problems
}

func write(t *testing.T, text string, path ...string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(path...), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path ...string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(path...))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// files lists a directory.
func files(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

func code(err error) bus.Code {
	if e, ok := errors.AsType[*bus.Error](err); ok {
		return e.Code
	}
	return ""
}

func add(t *testing.T, r *Registry, req bus.AddVMRequest) []byte {
	t.Helper()
	created, key, err := r.Add(req)
	if err != nil || !created {
		t.Fatalf("adding %s: %v, %v", req.Name, created, err)
	}
	return key
}

func names(r *Registry) []string {
	var all []string
	for _, e := range r.List() {
		all = append(all, e.Name)
	}
	return all
}

func TestWhatCommandsDoSurvivesARestart(t *testing.T) {
	d := newDirs(t)
	r, _ := d.open(t)
	forwards := []string{"tcp:2201:22", "udp:2201:53"}
	key := add(t, r, bus.AddVMRequest{Name: "web1", Forwards: forwards})
	if len(key) != KeySize {
		t.Fatalf("a key of %d bytes", len(key))
	}
	if key := add(t, r, bus.AddVMRequest{Name: "open", NoKey: true}); key != nil {
		t.Errorf("the key %x without being asked for", key)
	}
	if other := add(t, r, bus.AddVMRequest{Name: "Web1"}); bytes.Equal(other, key) {
		t.Error("the same key for two")
	}
	// check compares what a fresh Open reads with what the registry knows.
	check := func(want ...string) *Registry {
		t.Helper()
		again, problems := d.open(t)
		if !slices.Equal(names(again), want) || !slices.EqualFunc(again.List(), r.List(), equal) || len(problems) > 0 {
			t.Fatalf("read again: %+v, %v\nwant %q, as in %+v", again.List(), problems, want, r.List())
		}
		if again.Len() != len(want) {
			t.Errorf("%d VMs, want %d", again.Len(), len(want))
		}
		return again
	}
	check("Web1", "open", "web1")
	if e, ok := r.Lookup("web1"); !ok || !bytes.Equal(e.Key, key) || !slices.Equal(e.Forwards, forwards) || e.DropIn || e.created == 0 {
		t.Errorf("web1 is %+v", e)
	}
	if e, ok := r.Lookup("open"); !ok || e.Key != nil {
		t.Errorf("open is %+v", e)
	}

	fresh, err := r.Rekey("web1")
	if err != nil || len(fresh) != KeySize || bytes.Equal(fresh, key) {
		t.Errorf("a new key: %x, %v; the old one is %x", fresh, err, key)
	}
	if _, err := r.Rekey("open"); err != nil {
		t.Error(err)
	}
	if e, _ := r.Lookup("open"); len(e.Key) != KeySize {
		t.Error("a VM without a key cannot be given one")
	}
	r = check("Web1", "open", "web1")

	if err := r.Remove("web1"); err != nil {
		t.Fatal(err)
	}
	if _, ok := r.Lookup("web1"); ok {
		t.Error("a removed VM is known")
	}
	check("Web1", "open")
	add(t, r, bus.AddVMRequest{Name: "web2", Forwards: forwards}) // the ports are free again
	check("Web1", "open", "web2")
}

func equal(a, b Entry) bool {
	return a.Name == b.Name && bytes.Equal(a.Key, b.Key) && (a.Key == nil) == (b.Key == nil) &&
		slices.Equal(a.Forwards, b.Forwards) && a.Source == b.Source && a.DropIn == b.DropIn && a.created == b.created
}

func TestFormatOnDisk(t *testing.T) {
	d := newDirs(t)
	r, _ := d.open(t)
	add(t, r, bus.AddVMRequest{Name: "open", NoKey: true})
	e, _ := r.Lookup("open")
	want := fmt.Sprintf(`{"vm":"open","created":%d,"key":"","forwards":[]}`+"\n", e.created)
	if got := read(t, d.vms, "open.json"); got != want {
		t.Errorf("got %s want %s", got, want)
	}
	for _, path := range []string{d.vms, filepath.Join(d.vms, "open.json")} { // the directory was there, for all to read
		if st, err := os.Stat(path); err != nil || st.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s may be read by others: %v, %v", path, st.Mode(), err)
		}
	}
}

func TestRefusals(t *testing.T) {
	d := newDirs(t)
	write(t, "no_key = true\nforwards = [\"tcp:8080:80\"]\n", d.dropins, "file1.toml")
	write(t, "no_key = maybe\n", d.dropins, "broken1.toml")
	write(t, "{", d.vms, "broken2.json")
	r, _ := d.open(t)
	write(t, "no_key = true\n", d.dropins, "late1.toml")
	add(t, r, bus.AddVMRequest{Name: "web1", Forwards: []string{"udp:53:53"}})
	many := make([]string, maxForwards+1)
	for i := range many {
		many[i] = fmt.Sprintf("tcp:%d:1", 10000+i)
	}
	before := slices.Concat(files(t, d.vms), files(t, d.dropins))

	tests := []struct {
		req  bus.AddVMRequest
		code bus.Code
		says string
	}{
		{bus.AddVMRequest{Name: "web1"}, bus.CodeVMExists, "vm rekey web1"},
		{bus.AddVMRequest{Name: "file1"}, bus.CodeVMExists, "vms.d/file1.toml"},
		{bus.AddVMRequest{Name: "broken1"}, bus.CodeVMExists, "vms.d/broken1.toml"},
		{bus.AddVMRequest{Name: "broken2"}, bus.CodeVMExists, "vms/broken2.json"},
		{bus.AddVMRequest{Name: "broken2", IfMissing: true}, bus.CodeVMExists, "vm remove broken2"},
		{bus.AddVMRequest{Name: "late1"}, bus.CodeVMExists, "systemctl reload castrad"},
		{bus.AddVMRequest{Name: "HoSt"}, bus.CodeInvalidName, "the host's own"},
		{bus.AddVMRequest{Name: "HoSt", IfMissing: true}, bus.CodeInvalidName, "the host's own"},
		{bus.AddVMRequest{Name: ""}, bus.CodeInvalidName, `""`},
		{bus.AddVMRequest{Name: "../web1"}, bus.CodeInvalidName, `"../web1"`},
		{bus.AddVMRequest{Name: ".hidden"}, bus.CodeInvalidName, `".hidden"`},
		{bus.AddVMRequest{Name: "a\x00b"}, bus.CodeInvalidName, `\x00`},
		{bus.AddVMRequest{Name: strings.Repeat("a", wire.MaxName+1)}, bus.CodeInvalidName, "128"},
		{bus.AddVMRequest{Name: "w", Forwards: []string{"tcp:8080:81"}}, bus.CodePortTaken, "leads to another VM already, file1"},
		{bus.AddVMRequest{Name: "w", Forwards: []string{"udp:53:1"}}, bus.CodePortTaken, "leads to another VM already, web1"},
		{bus.AddVMRequest{Name: "w", Forwards: []string{"tcp:1:1", "tcp:1:2"}}, bus.CodeInvalidArg, "given twice"},
		{bus.AddVMRequest{Name: "w", Forwards: []string{"tcp:0:81"}}, bus.CodeInvalidArg, "tcp:HOSTPORT:GUESTPORT"},
		{bus.AddVMRequest{Name: "w", Forwards: many}, bus.CodeInvalidArg, "too many"},
	}
	for _, tt := range tests {
		created, key, err := r.Add(tt.req)
		if code(err) != tt.code || !strings.Contains(fmt.Sprint(err), tt.says) || created || key != nil {
			t.Errorf("adding %.40q: %v, %x, %v; want code %q and %q", tt.req.Name, created, key, err, tt.code, tt.says)
		}
	}
	for name, want := range map[string]struct {
		code bus.Code
		says string
	}{
		"web9":    {bus.CodeNoSuchVM, "vm list"},
		"../x":    {bus.CodeNoSuchVM, "vm list"},
		"file1":   {bus.CodeNotHere, "vms.d/file1.toml"},
		"broken1": {bus.CodeNoSuchVM, "vm list"},
	} {
		if err := r.Remove(name); code(err) != want.code || !strings.Contains(fmt.Sprint(err), want.says) {
			t.Errorf("removing %s: %v", name, err)
		}
		if key, err := r.Rekey(name); code(err) != want.code || !strings.Contains(fmt.Sprint(err), want.says) || key != nil {
			t.Errorf("rekeying %s: %x, %v", name, key, err)
		}
	}
	if _, err := r.Rekey("broken2"); code(err) != bus.CodeNoSuchVM || !strings.Contains(err.Error(), "vm remove broken2") {
		t.Errorf("rekeying what is broken: %v", err)
	}
	// That it is there already is no error where that was foreseen.
	for _, name := range []string{"web1", "file1"} {
		if created, key, err := r.Add(bus.AddVMRequest{Name: name, IfMissing: true, Forwards: []string{"tcp:1:1"}}); created || key != nil || err != nil {
			t.Errorf("adding %s if missing: %v, %x, %v", name, created, key, err)
		}
	}
	if after := slices.Concat(files(t, d.vms), files(t, d.dropins)); !slices.Equal(after, before) {
		t.Errorf("a refusal left files: %q, were %q", after, before)
	}
	// What is broken, a command can clear away.
	if err := r.Remove("broken2"); err != nil {
		t.Error(err)
	}
	add(t, r, bus.AddVMRequest{Name: "broken2", Forwards: many[:maxForwards]})
	if again, _ := d.open(t); !slices.Equal(names(again), []string{"broken2", "file1", "late1", "web1"}) {
		t.Errorf("%q are read again", names(again))
	}
}

func TestForwards(t *testing.T) {
	for fwd, ok := range map[string]bool{
		"tcp:1:65535": true, "udp:65535:1": true,
		"": false, "tcp": false, "tcp:1": false, "tcp::1": false, "tcp:1:": false, "tcp:1:2:3": false, "TCP:1:2": false, "sctp:1:2": false,
		"tcp:0:1": false, "tcp:1:0": false, "tcp:65536:1": false, "tcp:-1:1": false, "tcp:+1:1": false, "tcp:01:1": false,
		"tcp: 1:1": false, "tcp:a:1": false, "tcp:1:1\n": false,
	} {
		if err := checkForward(fwd); (err == nil) != ok {
			t.Errorf("%q: %v", fwd, err)
		}
	}
}

// Lookups go on while commands and reloads change things.
func TestConcurrency(t *testing.T) {
	d := newDirs(t)
	r, _ := d.open(t)
	add(t, r, bus.AddVMRequest{Name: "stays"})
	done := make(chan struct{})
	var readers, writers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if _, ok := r.Lookup("stays"); !ok {
					t.Error("a VM was gone for a moment")
					return
				}
				r.List()
			}
		})
	}
	for i := range 4 {
		writers.Go(func() {
			for j := range 5 {
				name := fmt.Sprintf("vm%d-%d", i, j)
				if _, _, err := r.Add(bus.AddVMRequest{Name: name, Forwards: []string{fmt.Sprintf("tcp:%d:22", 1000+10*i+j)}}); err != nil {
					t.Error(err)
				}
				if _, err := r.Rekey(name); err != nil {
					t.Error(err)
				}
				if _, err := r.Reload(); err != nil {
					t.Error(err)
				}
				if j%2 == 0 {
					if err := r.Remove(name); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	writers.Wait()
	close(done)
	readers.Wait()
	if again, problems := d.open(t); !slices.EqualFunc(again.List(), r.List(), equal) || len(problems) > 0 || r.Len() != 1+4*2 {
		t.Errorf("%d VMs, read again %d, %v", r.Len(), again.Len(), problems)
	}
}
