package guestdcmd

import (
	"bytes"
	"encoding/base64"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/castrabus/castra/internal/config"
	vms "github.com/castrabus/castra/internal/identity"
	"github.com/castrabus/castra/internal/wire"
)

// keyLine is what stands before the key in the file that castractl writes.
const keyLine = "io.systemd.credential.binary:castra.key="

func TestResolve(t *testing.T) {
	key := append(bytes.Repeat([]byte{'k'}, 31), '\n') // raw bytes may look like text
	encoded := base64.StdEncoding.EncodeToString(key)
	tests := []struct {
		name        string
		credentials map[string]string
		vm, keyFile string // of the configuration; keyFile is the file's text
		hostname    string
		want        identity
		err         string
	}{
		{name: "host name", hostname: "web1.example", want: identity{name: "web1.example", address: "10.0.2.2:7070"}},
		{name: "configuration", vm: "conf", hostname: "h", want: identity{name: "conf", address: "10.0.2.2:7070"}},
		{
			name:        "credentials win",
			credentials: map[string]string{"castra.vm": "cred\n", "castra.broker": "h:1\n", "castra.key": string(key)},
			vm:          "conf", keyFile: "not looked at", hostname: "h",
			want: identity{name: "cred", address: "h:1", key: key},
		},
		{
			name:        "empty credentials are none",
			credentials: map[string]string{"castra.vm": "\n", "castra.broker": "", "castra.key": ""},
			vm:          "conf", want: identity{name: "conf", address: "10.0.2.2:7070"},
		},
		{name: "raw key file", vm: "a", keyFile: string(key), want: identity{name: "a", address: "10.0.2.2:7070", key: key}},
		{name: "base64 key file", vm: "a", keyFile: encoded + "\n", want: identity{name: "a", address: "10.0.2.2:7070", key: key}},
		{name: "castractl's key file", vm: "a", keyFile: keyLine + encoded, want: identity{name: "a", address: "10.0.2.2:7070", key: key}},
		{name: "bad host name", hostname: "my host", err: `the host name gives "my host", which is no VM's name`},
		{name: "bad credential", credentials: map[string]string{"castra.vm": "-x"}, err: `the credential castra.vm gives "-x"`},
		{name: "bad name in the configuration", vm: "a/b", err: `vm under [identity] gives "a/b"`},
		{name: "long name", vm: strings.Repeat("x", 129), err: "no VM's name"},
		{name: "reserved", vm: "Host", err: "the host's own name"},
		{name: "bad address", vm: "a", credentials: map[string]string{"castra.broker": "nowhere"}, err: `the credential castra.broker gives "nowhere"`},
		{name: "short key", vm: "a", credentials: map[string]string{"castra.key": "secret"}, err: "the credential castra.key: holds no key"},
		{name: "bad key file", vm: "a", keyFile: "secret secret", err: "holds no key"},
		{name: "no host name", err: "finding a name for this VM: none"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			cfg := config.DefaultGuest()
			cfg.Identity.VM = tt.vm
			if tt.keyFile != "" {
				cfg.Identity.KeyFile = filepath.Join(dir, "key-file")
				if err := os.WriteFile(cfg.Identity.KeyFile, []byte(tt.keyFile), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			env := environment{hostname: func() (string, error) {
				if tt.hostname == "" {
					return "", errors.New("none")
				}
				return tt.hostname, nil
			}}
			if tt.credentials != nil {
				env.credentials = dir
				for name, text := range tt.credentials {
					if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
						t.Fatal(err)
					}
				}
			}
			got, err := env.resolve(cfg)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) || strings.Contains(err.Error(), "secret") {
					t.Fatalf("got %v, want %s", err, tt.err)
				}
				return
			}
			if err != nil || got.name != tt.want.name || got.address != tt.want.address || !bytes.Equal(got.key, tt.want.key) {
				t.Errorf("got %+v, %v; want %+v", got, err, tt.want)
			}
		})
	}
}

func TestResolveMissingKeyFile(t *testing.T) {
	cfg := config.DefaultGuest()
	cfg.Identity = config.Identity{VM: "a", KeyFile: filepath.Join(t.TempDir(), "none")}
	if _, err := (environment{}).resolve(cfg); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

// FuzzCredentials reads whatever bytes as what the host hands over.
func FuzzCredentials(f *testing.F) {
	encoded := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{'k'}, vms.KeySize))
	for _, c := range [][3]string{
		{"web1", "10.0.2.2:7070", encoded}, {"host\n", "h:", keyLine + encoded + "\n"}, {"../x", "[::1]:1", keyLine}, {"", "", ""}, {"\xff", ":1", strings.Repeat("k", vms.KeySize)},
	} {
		f.Add([]byte(c[0]), []byte(c[1]), []byte(c[2]))
	}
	dir := f.TempDir()
	e := environment{credentials: dir, hostname: func() (string, error) { return "h", nil }}
	f.Fuzz(func(t *testing.T, vm, broker, key []byte) {
		for name, data := range map[string][]byte{credentialVM: vm, credentialBroker: broker, credentialKey: key} {
			if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		id, err := e.resolve(config.DefaultGuest())
		if err != nil {
			if id.key != nil || len(key) > 8 && !bytes.Contains(vm, key) && !bytes.Contains(broker, key) && strings.Contains(err.Error(), string(key)) {
				t.Errorf("%q, %q, %q: %+v beside %v", vm, broker, key, id, err)
			}
			return
		}
		if !wire.ValidName(id.name) || wire.Reserved(id.name) || id.key != nil && len(id.key) != vms.KeySize || (id.key == nil) != (len(key) == 0) || !strings.Contains(id.address, ":") {
			t.Errorf("%q, %q, %q is %+v", vm, broker, key, id)
		}
	})
}
