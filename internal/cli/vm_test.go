package cli

import (
	"encoding/base64"
	"encoding/json"
	"encoding/xml"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/castrabus/castra/internal/bus"
)

func testKey() []byte { return []byte("0123456789abcdef0123456789abcdef") }

// registry is a fake castrad's, of names and whether they are keyed.
type registry map[string]bool

func (reg registry) client() *fakeClient {
	return &fakeClient{
		status: func(names []string) (bus.Status, error) {
			st := bus.Status{VMs: []bus.VM{}, Refused: []bus.Refused{}}
			for _, name := range names {
				if keyed, ok := reg[name]; ok {
					st.VMs = append(st.VMs, bus.VM{VM: name, Registered: true, Keyed: keyed})
				}
			}
			return st, nil
		},
		addVM: func(req bus.AddVMRequest) (bool, []byte, error) {
			if _, ok := reg[req.Name]; ok && !req.IfMissing {
				return false, nil, bus.Errorf(bus.CodeVMExists, "%s is registered", req.Name)
			} else if ok {
				return false, nil, nil
			}
			reg[req.Name] = !req.NoKey
			if req.NoKey {
				return true, nil, nil
			}
			return true, testKey(), nil
		},
		removeVM: func(name string) error {
			if _, ok := reg[name]; !ok {
				return bus.Errorf(bus.CodeNoSuchVM, "%s is not registered", name)
			}
			delete(reg, name)
			return nil
		},
		rekeyVM: func(name string) ([]byte, error) {
			if _, ok := reg[name]; !ok {
				return nil, bus.Errorf(bus.CodeNoSuchVM, "%s is not registered", name)
			}
			return testKey(), nil
		},
	}
}

const smbiosName = "-smbios type=11,value=io.systemd.credential:castra.vm="

// wantKey checks that a key file holds the key, for its owner alone.
func wantKey(t *testing.T, path string) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != 0o600 {
		t.Errorf("%s has mode %v", path, info.Mode())
	}
	text, err := os.ReadFile(path)
	if want := "io.systemd.credential.binary:castra.key=" + base64.StdEncoding.EncodeToString(testKey()); err != nil || string(text) != want {
		t.Errorf("%s holds %q (%v), want %q", path, text, err, want)
	}
}

func wantNoFile(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is there: %v", path, err)
	}
}

func TestVMAdd(t *testing.T) {
	t.Chdir(t.TempDir())
	reg := registry{}
	r := run(t, reg.client(), []string{"vm", "add", "web1", "web2"})
	r.want(t, 0, smbiosName+"web1 -smbios type=11,path=web1.castra-key\n"+smbiosName+"web2 -smbios type=11,path=web2.castra-key\n", "web1 is registered, its key is in web1.castra-key")
	wantKey(t, "web1.castra-key")
	wantKey(t, "web2.castra-key")
	if strings.Contains(r.out+r.err, base64.StdEncoding.EncodeToString(testKey())) {
		t.Error("the key is printed")
	}

	// Again: the file is in the way before the registry is, and that is not the point.
	run(t, reg.client(), []string{"vm", "add", "web1"}).want(t, ExitFailed, "", "adding web1: it is registered already; for its arguments: castractl vm args web1")
	r = run(t, reg.client(), []string{"vm", "add", "web1", "--key-out", "other"})
	r.want(t, ExitFailed, "", "castractl vm args web1")
	wantNoFile(t, "other")
	r = run(t, reg.client(), []string{"vm", "add", "-q", "--if-missing", "web1", "web3"})
	r.want(t, 0, smbiosName+"web1 -smbios type=11,path=web1.castra-key\n"+smbiosName+"web3 -smbios type=11,path=web3.castra-key\n", "")

	r = run(t, reg.client(), []string{"vm", "add", "-q", "--no-key", "web4"})
	r.want(t, 0, smbiosName+"web4\n", "")
	wantNoFile(t, "web4.castra-key")

	r = run(t, reg.client(), []string{"vm", "add", "-q", "web5", "--key-out", "it's, a key"})
	r.want(t, 0, smbiosName+`web5 -smbios 'type=11,path=it'\''s,, a key'`+"\n", "")
	wantKey(t, "it's, a key")
}

// The libvirt domain that the help shows hands QEMU the arguments that are printed.
func TestVMAddLibvirt(t *testing.T) {
	_, domain, _ := strings.Cut(newVMAddCmd(&Factory{}).Long, "<domain")
	domain, _, found := strings.Cut("<domain"+domain, "</domain>")
	if !found {
		t.Fatal("the help shows no domain")
	}
	var d struct {
		Args []struct {
			Value string `xml:"value,attr"`
		} `xml:"http://libvirt.org/schemas/domain/qemu/1.0 commandline>arg"`
	}
	if err := xml.Unmarshal([]byte(domain+"</domain>"), &d); err != nil {
		t.Fatal(err)
	}
	var args []string
	for _, a := range d.Args {
		args = append(args, a.Value)
	}
	if h := (&handover{VM: "NAME", KeyFile: "/PATH/NAME.castra-key"}); !slices.Equal(args, h.args()) {
		t.Errorf("the domain has %q, and vm add prints %q", args, h.args())
	}
}

// What was done before the first failure is said and kept.
func TestVMAddStopsInTheMiddle(t *testing.T) {
	t.Chdir(t.TempDir())
	reg := registry{"web2": true}
	r := run(t, reg.client(), []string{"vm", "add", "web1", "web2", "web3"})
	r.want(t, ExitFailed, smbiosName+"web1 -smbios type=11,path=web1.castra-key\n", "web2 is registered")
	wantKey(t, "web1.castra-key")
	wantNoFile(t, "web2.castra-key")
	wantNoFile(t, "web3.castra-key")
	if _, ok := reg["web3"]; ok {
		t.Error("web3 is registered though web2 failed")
	}
}

func TestVMAddUnwritable(t *testing.T) {
	t.Chdir(t.TempDir())
	reg := registry{}
	run(t, reg.client(), []string{"vm", "add", "web1", "--key-out", "no/such/place"}).want(t, ExitFailed, "", "choose another place")
	if len(reg) > 0 {
		t.Errorf("registered: %v", reg)
	}

	// The disk is full once the VM is registered: that is undone.
	for undone, want := range map[bool]string{true: "its registration is taken back", false: "castractl vm remove web1"} {
		client := reg.client()
		add := client.addVM
		client.addVM = func(req bus.AddVMRequest) (bool, []byte, error) {
			fill(t, "web1.castra-key")
			return add(req)
		}
		if !undone {
			client.removeVM = func(string) error { return errors.New("no luck") }
		}
		run(t, client, []string{"vm", "add", "web1"}).want(t, ExitFailed, "", want)
		wantNoFile(t, "web1.castra-key")
		if len(reg) > 0 == undone {
			t.Errorf("undone: %v, registered: %v", undone, reg)
		}
		delete(reg, "web1")
	}
	reg["web1"] = true
	client := reg.client()
	client.rekeyVM = func(string) ([]byte, error) {
		fill(t, "web1.castra-key")
		return testKey(), nil
	}
	run(t, client, []string{"vm", "rekey", "web1"}).want(t, ExitFailed, "", "its copy is lost")
}

// fill puts the device that is always full behind the descriptor of an open file.
func fill(t *testing.T, name string) {
	t.Helper()
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range fds {
		if path, _ := os.Readlink("/proc/self/fd/" + entry.Name()); filepath.Base(path) == name {
			fd, err := strconv.Atoi(entry.Name())
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.Dup3(int(full.Fd()), fd, unix.O_CLOEXEC); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("%s is not open", name)
}

func TestVMAddUsage(t *testing.T) {
	for args, want := range map[string]string{
		"vm add":                                "which VM?",
		"vm add a=b":                            "no VM name",
		"vm add HOST":                           "host's own name",
		"vm add a b --key-out k":                "--key-out takes one key",
		"vm add a --no-key --key-out k":         "exclude each other",
		"vm add a --key-out=":                   "--key-out is given, but empty",
		"vm args a --key-out=":                  "--key-out is given, but empty",
		"bus request --vm= a":                   "--vm is given, but empty",
		"help frobnicate":                       `unknown command "frobnicate"`,
		"help vm frobnicate":                    `unknown command "frobnicate"`,
		"vm add a --forward 1:2":                "no forward",
		"vm add a b --forward tcp:1:2":          "--forward leads to one VM",
		"vm remove":                             "which VM?",
		"vm remove a b":                         "one word too many",
		"vm list a":                             "one word too many",
		"vm":                                    "needs one of: add, remove, list, show, rekey, args",
		"vm frobnicate":                         `unknown command "frobnicate"`,
		"vm rekey a --no-key":                   "unknown flag",
		"frobnicate":                            `unknown command "frobnicate"`,
		"completion powershell":                 "which shell?",
		"logs a b":                              "one word too many",
		"logs -n many":                          "--lines takes",
		"ports x":                               "one word too many",
		"version x":                             "one word too many",
		"status --json=perhaps":                 "invalid argument",
		"vm add a --if-missing --if-missing=no": "invalid argument",
	} {
		run(t, &fakeClient{}, strings.Fields(args)).want(t, ExitUsage, "", want)
	}
}

func TestVMRekey(t *testing.T) {
	t.Chdir(t.TempDir())
	reg := registry{"web1": true}
	r := run(t, reg.client(), []string{"vm", "rekey", "web1"})
	r.want(t, 0, smbiosName+"web1 -smbios type=11,path=web1.castra-key\n", "web1 has a new key, in web1.castra-key")
	wantKey(t, "web1.castra-key")

	client := reg.client()
	client.rekeyVM = nil // not to be called
	run(t, client, []string{"vm", "rekey", "web1"}).want(t, ExitFailed, "", "never overwritten")
	run(t, reg.client(), []string{"vm", "rekey", "nobody"}).want(t, ExitNoSuchVM, "", "nobody")
	wantNoFile(t, "nobody.castra-key")
}

func TestVMArgs(t *testing.T) {
	t.Chdir(t.TempDir())
	reg := registry{"web1": true, "old1": false}
	run(t, reg.client(), []string{"vm", "args", "web1"}).want(t, 0, smbiosName+"web1 -smbios type=11,path=web1.castra-key\n", "web1.castra-key is not here")
	run(t, reg.client(), []string{"vm", "args", "web1", "-q", "--key-out", "/k/w1"}).want(t, 0, smbiosName+"web1 -smbios type=11,path=/k/w1\n", "")
	run(t, reg.client(), []string{"vm", "args", "old1"}).want(t, 0, smbiosName+"old1\n", "")
	run(t, reg.client(), []string{"vm", "args", "nobody"}).want(t, ExitNoSuchVM, "", "no VM is named nobody")

	r := run(t, reg.client(), []string{"vm", "args", "-q", "web1", "--json"})
	var got struct {
		VMs  []bus.VM
		Args []handover
	}
	if err := json.Unmarshal([]byte(r.out), &got); err != nil || len(got.VMs) != 1 || len(got.Args) != 1 || len(got.Args[0].Args) != 4 {
		t.Errorf("%v: %s", err, r.out)
	}
}

func TestVMRemove(t *testing.T) {
	reg := registry{"web1": true}
	run(t, reg.client(), []string{"vm", "remove", "web1"}).want(t, 0, "", "web1 is removed")
	run(t, reg.client(), []string{"vm", "remove", "web1"}).want(t, ExitNoSuchVM, "", "web1 is not registered")
}

func TestShellQuote(t *testing.T) {
	for word, want := range map[string]string{
		"plain-word_1.0/x,y=z": "plain-word_1.0/x,y=z",
		"":                     "''",
		"a b":                  "'a b'",
		"$(reboot)":            "'$(reboot)'",
		"it's":                 `'it'\''s'`,
		"ümlaut":               "'ümlaut'",
		"a\nb":                 "'a\nb'",
	} {
		if got := shellQuote(word); got != want {
			t.Errorf("shellQuote(%q) = %s, want %s", word, got, want)
		}
	}
}
