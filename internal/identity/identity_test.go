package identity

import (
	"bytes"
	"encoding/base64"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/castrabus/castra/internal/bus"
)

type dirs struct{ vms, dropins string }

func newDirs(t *testing.T) dirs {
	d := dirs{filepath.Join(t.TempDir(), "vms"), filepath.Join(t.TempDir(), "vms.d")}
	if err := os.Mkdir(d.dropins, 0o700); err != nil {
		t.Fatal(err)
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

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func code(err error) bus.Code {
	var e *bus.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

func TestAddSurvivesARestart(t *testing.T) {
	d := newDirs(t)
	r, _ := d.open(t)
	created, key, err := r.Add(bus.AddVMRequest{Name: "web1", Forwards: []string{"tcp:2201:22"}})
	if err != nil || !created || len(key) != KeySize {
		t.Fatal(created, key, err)
	}
	if _, key, err := r.Add(bus.AddVMRequest{Name: "open", NoKey: true}); err != nil || key != nil {
		t.Fatal(key, err)
	}
	for _, path := range []string{d.vms, filepath.Join(d.vms, "web1.json")} {
		if st, err := os.Stat(path); err != nil || st.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s may be read by others: %v, %v", path, st.Mode(), err)
		}
	}
	r, problems := d.open(t)
	e, ok := r.Lookup("web1")
	if len(problems) > 0 || !ok || !bytes.Equal(e.Key, key) || !slices.Equal(e.Forwards, []string{"tcp:2201:22"}) {
		t.Errorf("%+v, %v", e, problems)
	}
	again, err := r.Rekey("web1")
	if err != nil || bytes.Equal(again, key) {
		t.Error("the same key again", err)
	}
	if err := r.Remove("web1"); err != nil {
		t.Fatal(err)
	}
	if r, _ = d.open(t); r.Len() != 1 {
		t.Errorf("%d VMs after a removal", r.Len())
	}
}

func TestRefusals(t *testing.T) {
	d := newDirs(t)
	write(t, filepath.Join(d.dropins, "file1.toml"), "no_key = true\nforwards = [\"tcp:8080:80\"]\n")
	r, problems := d.open(t)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	add := func(req bus.AddVMRequest) error { _, _, err := r.Add(req); return err }
	if err := add(bus.AddVMRequest{Name: "web1"}); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		err  error
		code bus.Code
	}{
		"twice":          {add(bus.AddVMRequest{Name: "web1"}), bus.CodeVMExists},
		"if missing":     {add(bus.AddVMRequest{Name: "web1", IfMissing: true}), ""},
		"host":           {add(bus.AddVMRequest{Name: "HoSt"}), bus.CodeInvalidName},
		"a path":         {add(bus.AddVMRequest{Name: "../web1"}), bus.CodeInvalidName},
		"a dot":          {add(bus.AddVMRequest{Name: ".hidden"}), bus.CodeInvalidName},
		"a taken port":   {add(bus.AddVMRequest{Name: "web2", Forwards: []string{"tcp:8080:81"}}), bus.CodeInvalidArg},
		"no port":        {add(bus.AddVMRequest{Name: "web2", Forwards: []string{"tcp:0:81"}}), bus.CodeInvalidArg},
		"remove unknown": {r.Remove("web9"), bus.CodeNoSuchVM},
		"remove a file":  {r.Remove("file1"), bus.CodeInvalidArg},
	} {
		if got := code(c.err); got != c.code {
			t.Errorf("%s: %v, want code %q", what, c.err, c.code)
		}
	}
	if _, err := r.Rekey("file1"); code(err) != bus.CodeInvalidArg {
		t.Errorf("rekey of a file: %v", err)
	}
}

func TestBrokenFilesAreToldOfAndSkipped(t *testing.T) {
	d := newDirs(t)
	if err := os.Mkdir(d.vms, 0o700); err != nil {
		t.Fatal(err)
	}
	key := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{7}, KeySize))
	write(t, filepath.Join(d.vms, "good.json"), `{"vm":"good","created":1,"key":"`+key+`"}`)
	write(t, filepath.Join(d.vms, "other.json"), `{"vm":"good","created":1}`)
	write(t, filepath.Join(d.vms, "short.json"), `{"vm":"short","created":1,"key":"AAAA"}`)
	write(t, filepath.Join(d.vms, "half.json"), `{"vm":"half","cre`)
	write(t, filepath.Join(d.vms, "host.json"), `{"vm":"host","created":1}`)
	write(t, filepath.Join(d.vms, "large.json"), strings.Repeat(" ", maxFile+1))
	write(t, filepath.Join(d.dropins, "neither.toml"), "")
	write(t, filepath.Join(d.dropins, "both.toml"), "no_key = true\nkey = \""+key+"\"\n")
	write(t, filepath.Join(d.dropins, "extra.toml"), "no_key = true\ncolour = 1\n")
	write(t, filepath.Join(d.dropins, "viafile.toml"), "key_file = \"viafile.key\"\n")
	write(t, filepath.Join(d.dropins, "viafile.key"), strings.Repeat("k", KeySize))
	if err := os.Symlink(filepath.Join(d.vms, "good.json"), filepath.Join(d.vms, "link.json")); err != nil {
		t.Fatal(err)
	}
	r, problems := d.open(t)
	var names []string
	for _, e := range r.List() {
		names = append(names, e.Name)
	}
	if !slices.Equal(names, []string{"good", "viafile"}) {
		t.Errorf("registered: %v", names)
	}
	if len(problems) != 9 {
		t.Errorf("%d problems: %v", len(problems), problems)
	}
	write(t, filepath.Join(d.dropins, "late.toml"), "no_key = true\n")
	if _, err := r.Reload(); err != nil {
		t.Fatal(err)
	}
	if _, ok := r.Lookup("late"); !ok {
		t.Error("not there after a reload")
	}
}
