package identity

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/castrabus/castra/internal/bus"
)

// disk stands between the registry and its syncs.
type disk struct {
	t    *testing.T
	log  []string // what was synced, and what the directory held then
	fail func(name string) error
}

func (d *disk) sync(f *os.File) error {
	name, dir := filepath.Base(f.Name()), f.Name()
	if st, err := f.Stat(); err != nil || !st.IsDir() {
		dir = filepath.Dir(dir)
	}
	d.log = append(d.log, fmt.Sprint(name, files(d.t, dir)))
	if d.fail != nil {
		if err := d.fail(name); err != nil {
			return err
		}
	}
	return f.Sync()
}

// A record is on disk before it takes its name, and its name before anybody hears
// of it.
func TestWhatIsSynced(t *testing.T) {
	d := newDirs(t)
	r, _ := d.open(t)
	disk := disk{t: t}
	r.sync = disk.sync
	check := func(what string, want ...string) {
		t.Helper()
		if !slices.Equal(disk.log, want) {
			t.Errorf("%s: synced %q, want %q", what, disk.log, want)
		}
		disk.log = nil
	}
	add(t, r, bus.AddVMRequest{Name: "web1"})
	check("add", ".web1.tmp[.web1.tmp]", "vms[web1.json]")
	if _, err := r.Rekey("web1"); err != nil {
		t.Fatal(err)
	}
	check("rekey", ".web1.tmp[.web1.tmp web1.json]", "vms[web1.json]")
	if err := r.Remove("web1"); err != nil {
		t.Fatal(err)
	}
	check("remove", "vms[]")
}

func TestFailingDisk(t *testing.T) {
	d := newDirs(t)
	r, _ := d.open(t)
	key := add(t, r, bus.AddVMRequest{Name: "web1", Forwards: []string{"tcp:1:1"}})
	full := &os.PathError{Op: "sync", Path: "x", Err: syscall.ENOSPC}
	broken := &os.PathError{Op: "sync", Path: "x", Err: syscall.EIO}
	tests := []struct {
		name string // what cannot be synced
		err  error
		code bus.Code
	}{
		{".tmp", full, bus.CodeStorageFull},
		{".tmp", broken, bus.CodeInternal},
		{"vms", broken, bus.CodeInternal},
	}
	for _, tt := range tests {
		once := tt.err // fails once, so that what was begun can be undone
		disk := disk{t: t, fail: func(name string) error {
			if strings.HasSuffix(name, tt.name) {
				err := once
				once = nil
				return err
			}
			return nil
		}}
		r.sync = disk.sync
		try := func(what string, do func() error) {
			t.Helper()
			once = tt.err
			if err := do(); code(err) != tt.code || strings.Contains(err.Error(), "\n") {
				t.Errorf("%s with %v of %s: %v", what, tt.err, tt.name, err)
			}
			r.sync = (*os.File).Sync
			defer func() { r.sync = disk.sync }()
			again, problems := d.open(t)
			if !slices.EqualFunc(again.List(), r.List(), equal) || len(problems) > 0 || len(files(t, d.vms)) != r.Len() {
				t.Errorf("%s with %v of %s: a restart gives %+v, %v; known are %+v", what, tt.err, tt.name, again.List(), problems, r.List())
			}
		}
		try("add", func() error {
			_, _, err := r.Add(bus.AddVMRequest{Name: "web2", Forwards: []string{"tcp:2:2"}})
			return err
		})
		try("rekey", func() error { _, err := r.Rekey("web1"); return err })
		if e, ok := r.Lookup("web1"); !ok || !bytes.Equal(e.Key, key) {
			t.Errorf("after a failed rekey web1 is %+v", e)
		}
	}
	// A removal that may not last can be repeated.
	r.sync = func(*os.File) error { return broken }
	if err := r.Remove("web1"); code(err) != bus.CodeInternal {
		t.Errorf("remove: %v", err)
	}
	r.sync = (*os.File).Sync
	if err := r.Remove("web1"); err != nil {
		t.Errorf("remove again: %v", err)
	}
	if _, _, err := Open(filepath.Join(d.dropins, "no", "\x00"), ""); err == nil {
		t.Error("a registry that cannot be made opens")
	}
}
