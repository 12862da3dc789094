package identity

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
)

var (
	someKey = bytes.Repeat([]byte{7}, KeySize)
	some64  = base64.StdEncoding.EncodeToString(someKey)
)

// reasons gives problems by the file's last name.
func reasons(problems []Problem) map[string]string {
	all := make(map[string]string)
	for _, p := range problems {
		all[filepath.Base(p.File)] = p.Reason
	}
	return all
}

// A record that is not as commands write it admits nobody.
func TestRecords(t *testing.T) {
	tests := []struct {
		name, text string
		says       string // empty: it is used
		key        []byte
	}{
		{"keyed", `{"vm":"keyed","created":1,"key":"` + some64 + `","forwards":["tcp:1:1"]}`, "", someKey},
		{"unkeyed", `{"vm":"unkeyed","created":1,"key":"","forwards":[]}`, "", nil},
		{"spaced", "\n{ \"key\": \"\",\n\"vm\": \"spaced\" }\n\n", "", nil},
		{"Case", `{"vm":"Case","key":""}`, "", nil},
		{"other", `{"vm":"keyed","key":""}`, `for the VM "keyed"`, nil},
		{"case", `{"vm":"CASE","key":""}`, `for the VM "CASE"`, nil},
		{"nokey", `{"vm":"nokey"}`, "lacks", nil},
		{"novm", `{"key":""}`, "lacks", nil},
		{"null", `{"vm":"null","key":null}`, "lacks", nil},
		{"upper", `{"vm":"upper","Key":"` + some64 + `","key":""}`, `"Key" is unknown`, nil},
		{"twice", `{"vm":"twice","key":"` + some64 + `","key":""}`, `"key" is unknown, or there twice`, nil},
		{"extra", `{"vm":"extra","key":"","colour":1}`, `"colour" is unknown`, nil},
		{"short", `{"vm":"short","key":"AAAA"}`, "base64 of 32 bytes", nil},
		{"padded", `{"vm":"padded","key":"` + strings.TrimRight(some64, "=") + `"}`, "base64 of 32 bytes", nil},
		{"bits", `{"vm":"bits","key":"` + some64[:42] + "d=" + `"}`, "base64 of 32 bytes", nil},
		{"number", `{"vm":"number","key":7}`, `"key"`, nil},
		{"created", `{"vm":"created","key":"","created":"now"}`, `"created"`, nil},
		{"forward", `{"vm":"forward","key":"","forwards":["tcp:1"]}`, "tcp:HOSTPORT:GUESTPORT", nil},
		{"taken", `{"vm":"taken","key":"","forwards":["tcp:1:2"]}`, "leads to another VM already, keyed", nil},
		{"half", `{"vm":"half","cre`, "broken", nil},
		{"open", `{"vm":"open","key":""`, "ends too early", nil},
		{"more", `{"vm":"more","key":""}{}`, "follows", nil},
		{"list", `[]`, "no JSON object", nil},
		{"empty", ``, "no JSON object", nil},
		{"host", `{"vm":"host","key":""}`, "host's own", nil},
		{"-dash", `{"vm":"-dash","key":""}`, "no name for a VM", nil},
		{"large", strings.Repeat(" ", maxFile+1), "larger than 65536", nil},
	}
	d := newDirs(t)
	var want []string
	for _, tt := range tests {
		write(t, tt.text, d.vms, tt.name+recordSuffix)
		if tt.says == "" {
			want = append(want, tt.name)
		}
	}
	write(t, "left by a crash", d.vms, ".web1.tmp")
	write(t, "{", d.vms, ".editor.json")
	write(t, "{", d.vms, "README")
	r, problems := d.open(t)
	slices.Sort(want)
	if !slices.Equal(names(r), want) {
		t.Errorf("registered are %q, want %q", names(r), want)
	}
	told := reasons(problems)
	for _, tt := range tests {
		if got := told[tt.name+recordSuffix]; (got == "") != (tt.says == "") || !strings.Contains(got, tt.says) {
			t.Errorf("%s: told %q, want %q", tt.name, got, tt.says)
		}
		if e, _ := r.Lookup(tt.name); !bytes.Equal(e.Key, tt.key) || (e.Key == nil) != (tt.key == nil) {
			t.Errorf("%s has the key %x, want %x", tt.name, e.Key, tt.key)
		}
	}
	if len(problems) != len(tests)-len(want) {
		t.Errorf("%d problems, want %d: %q", len(problems), len(tests)-len(want), told)
	}
	if _, err := os.Lstat(filepath.Join(d.vms, ".web1.tmp")); !os.IsNotExist(err) {
		t.Errorf("what a crash left is still there: %v", err)
	}
}

func TestRecordsThatAreNoFiles(t *testing.T) {
	d := newDirs(t)
	write(t, `{"vm":"link","key":""}`, d.dropins, "target")
	if err := os.Symlink(filepath.Join(d.dropins, "target"), filepath.Join(d.vms, "link.json")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(d.vms, "pipe.json"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(d.vms, "dir.json"), 0o700); err != nil {
		t.Fatal(err)
	}
	r, problems := d.open(t)
	want := map[string]string{"link.json": "it is a symbolic link", "pipe.json": "it is no regular file", "dir.json": "it is no regular file"}
	if got := reasons(problems); !maps.Equal(got, want) || r.Len() != 0 {
		t.Errorf("told %q with %d registered, want %q", got, r.Len(), want)
	}
}

func TestDropIns(t *testing.T) {
	tests := []struct {
		name, text string
		says       string // empty: it is used
		key        []byte
	}{
		{"inline", "key = \"" + some64 + "\"\nforwards = [\"tcp:1:1\"]\n", "", someKey},
		{"none", "no_key = true\n", "", nil},
		{"raw", "key_file = \"keys/raw\"\n", "", someKey},
		{"text", "key_file = \"keys/text\"\n", "", someKey},
		{"smbios", "key_file = \"keys/smbios\"\n", "", someKey},
		{"linked", "key_file = \"keys/linked\"\n", "", someKey},
		{"empty", "", "one of key, key_file, and no_key", nil},
		{"refused", "no_key = false\n", "one of key, key_file, and no_key", nil},
		{"both", "no_key = true\nkey = \"" + some64 + "\"\n", "one of key, key_file, and no_key", nil},
		{"both2", "key_file = \"keys/raw\"\nkey = \"" + some64 + "\"\n", "one of key, key_file, and no_key", nil},
		{"both3", "key_file = \"keys/raw\"\nno_key = true\n", "one of key, key_file, and no_key", nil},
		{"extra", "no_key = true\ncolour = 1\n", "line 2: colour: unknown key", nil},
		{"upper", "No_Key = true\n", "line 1: No_Key: unknown key", nil},
		{"kind", "no_key = \"yes\"\n", "line 1: no_key: is", nil},
		{"two", "a = 1\nb = 2\n", "; line 2: b", nil},
		{"syntax", "no_key = \n", "line 1: ", nil},
		{"short", "key = \"AAAA\"\n", "key: it is not the base64", nil},
		{"nofile", "key_file = \"keys/nofile\"\n", "no such file", nil},
		{"dirfile", "key_file = \"keys\"\n", "no regular file", nil},
		{"shortfile", "key_file = \"keys/short\"\n", "key_file: holds no key", nil},
		{"forward", "no_key = true\nforwards = [\"tcp:1\"]\n", "tcp:HOSTPORT:GUESTPORT", nil},
		{"taken", "no_key = true\nforwards = [\"tcp:1:2\"]\n", "leads to another VM already, inline", nil},
		{"host", "no_key = true\n", "host's own", nil},
	}
	d := newDirs(t)
	keys := filepath.Join(d.dropins, "keys")
	if err := os.Mkdir(keys, 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, string(someKey), keys, "raw")
	write(t, some64+"\n", keys, "text")
	write(t, smbiosPrefix+some64, keys, "smbios")
	write(t, "short", keys, "short")
	if err := os.Symlink("raw", filepath.Join(keys, "linked")); err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, tt := range tests {
		write(t, tt.text, d.dropins, tt.name+dropInSuffix)
		if tt.says == "" {
			want = append(want, tt.name)
		}
	}
	write(t, "nonsense", d.dropins, ".hidden.toml")
	write(t, "nonsense", d.dropins, "none.toml~")
	if err := os.Symlink("none.toml", filepath.Join(d.dropins, "alias.toml")); err != nil {
		t.Fatal(err)
	}
	want = append(want, "alias")
	r, problems := d.open(t)
	slices.Sort(want)
	if !slices.Equal(names(r), want) {
		t.Errorf("registered are %q, want %q", names(r), want)
	}
	told := reasons(problems)
	for _, tt := range tests {
		got := told[tt.name+dropInSuffix]
		if (got == "") != (tt.says == "") || !strings.Contains(got, tt.says) || strings.Contains(got, "\n") || strings.Contains(got, some64) {
			t.Errorf("%s: told %q, want %q", tt.name, got, tt.says)
		}
		if e, ok := r.Lookup(tt.name); !bytes.Equal(e.Key, tt.key) || (e.Key == nil) != (tt.key == nil) || ok && !e.DropIn {
			t.Errorf("%s is %+v, want the key %x", tt.name, e, tt.key)
		}
	}
	if len(problems) != len(tests)-len(want)+1 {
		t.Errorf("%d problems: %q", len(problems), told)
	}
}

// A drop-in decides about its VM, and about its ports of the host, even where it
// cannot be used.
func TestDropInsWin(t *testing.T) {
	d := newDirs(t)
	write(t, `{"vm":"a1","key":"","forwards":["tcp:1:1"]}`, d.vms, "a1.json")
	write(t, `{"vm":"b1","key":"","forwards":["tcp:2:1"]}`, d.vms, "b1.json")
	write(t, `{"vm":"c1","key":"","forwards":["tcp:3:1"]}`, d.vms, "c1.json")
	write(t, "key = \""+some64+"\"\n", d.dropins, "a1.toml")
	write(t, "kye = \""+some64+"\"\n", d.dropins, "b1.toml")
	write(t, "no_key = true\nforwards = [\"tcp:3:9\"]\n", d.dropins, "z1.toml")
	r, problems := d.open(t)
	told := reasons(problems)
	if e, ok := r.Lookup("a1"); !ok || !bytes.Equal(e.Key, someKey) || len(e.Forwards) > 0 {
		t.Errorf("a1 is %+v", e)
	}
	if !slices.Equal(names(r), []string{"a1", "z1"}) || len(told) != 4 {
		t.Errorf("registered are %q, told was %q", names(r), told)
	}
	for file, says := range map[string]string{"a1.json": "a1.toml decides about a1", "b1.json": "b1.toml decides about b1", "b1.toml": "kye", "c1.json": "leads to another VM already, z1"} {
		if !strings.Contains(told[file], says) {
			t.Errorf("%s: told %q, want %q", file, told[file], says)
		}
	}
}

func TestReload(t *testing.T) {
	d := newDirs(t)
	r, _ := d.open(t)
	write(t, "no_key = true\n", d.dropins, "late.toml")
	if problems, err := r.Reload(); err != nil || len(problems) > 0 || !slices.Equal(names(r), []string{"late"}) {
		t.Errorf("%q, %v, %v", names(r), problems, err)
	}
	if err := os.Remove(filepath.Join(d.dropins, "late.toml")); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Reload(); err != nil || r.Len() != 0 {
		t.Errorf("%q, %v", names(r), err)
	}
	// Without the directory of drop-ins there are none.
	write(t, "no_key = true\n", d.dropins, "late.toml")
	if _, err := r.Reload(); err != nil || r.Len() != 1 {
		t.Errorf("%q, %v", names(r), err)
	}
	if err := os.RemoveAll(d.dropins); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Reload(); err != nil || r.Len() != 0 {
		t.Errorf("%q, %v", names(r), err)
	}
	// What cannot be read at all leaves everything as it was.
	write(t, `{"vm":"web1","key":""}`, d.vms, "web1.json")
	if _, err := r.Reload(); err != nil || r.Len() != 1 {
		t.Errorf("%q, %v", names(r), err)
	}
	write(t, "no directory", d.dropins)
	if _, err := r.Reload(); err == nil || r.Len() != 1 {
		t.Errorf("%q, %v", names(r), err)
	}
	if _, _, err := Open(d.vms, d.dropins); err == nil {
		t.Error("a registry that cannot be read opens")
	}
	if err := os.RemoveAll(d.vms); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(d.dropins); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Reload(); err == nil || r.Len() != 1 {
		t.Errorf("%q, %v", names(r), err)
	}
}

func TestParseKey(t *testing.T) {
	for text, ok := range map[string]bool{
		string(someKey): true, some64: true, " " + some64 + "\r\n": true, smbiosPrefix + some64 + "\n": true,
		"": false, "short": false, string(someKey) + "\n": false, some64 + some64: false, smbiosPrefix: false,
	} {
		got, err := ParseKey([]byte(text))
		if (err == nil) != ok || ok && !bytes.Equal(got, someKey) {
			t.Errorf("%q: %x, %v", text, got, err)
		}
	}
}

func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"vm":"a","created":1,"key":"","forwards":["tcp:1:1"]}`))
	f.Add([]byte(`{"vm":"a","key":"` + some64 + `"}x`))
	f.Fuzz(func(t *testing.T, data []byte) {
		rec, err := parseRecord(data)
		if err != nil {
			return
		}
		text, err := json.Marshal(rec)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := parseRecord(text); err != nil || !reflect.DeepEqual(again, rec) {
			t.Errorf("%q is %+v, and then %+v, %v", data, rec, again, err)
		}
	})
}
