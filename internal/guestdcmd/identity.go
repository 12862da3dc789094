package guestdcmd

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"github.com/castrabus/castra/internal/config"
	vms "github.com/castrabus/castra/internal/identity"
	"github.com/castrabus/castra/internal/wire"
)

// The system credentials that win over the configuration (contract 5).
const (
	credentialVM     = "castra.vm"
	credentialBroker = "castra.broker"
	credentialKey    = "castra.key"
)

// identity is who this guest is and whom it talks to.
type identity struct {
	name    string
	address string
	key     []byte // nil: none
}

// environment is what an identity is taken from beside the configuration.
type environment struct {
	credentials string // $CREDENTIALS_DIRECTORY; empty: there are none
	hostname    func() (string, error)
}

// resolve decides who this guest is. Its errors say where the bad value came from.
func (e environment) resolve(cfg config.Guest) (id identity, err error) {
	if id.name, err = e.name(cfg); err != nil {
		return identity{}, err
	}
	if id.address, err = e.address(cfg); err != nil {
		return identity{}, err
	}
	if id.key, err = e.key(cfg); err != nil {
		return identity{}, err
	}
	return id, nil
}

func (e environment) name(cfg config.Guest) (string, error) {
	name, err := e.text(credentialVM)
	if err != nil {
		return "", err
	}
	from := "the credential " + credentialVM
	if name == "" {
		name, from = cfg.Identity.VM, "vm under [identity]"
	}
	if name == "" {
		from = "the host name"
		if name, err = e.hostname(); err != nil {
			return "", fmt.Errorf("finding a name for this VM: %w", err)
		}
	}
	const remedy = "set the credential castra.vm, or vm under [identity] in guestd.toml"
	switch {
	case !wire.ValidName(name):
		return "", fmt.Errorf("%s gives %.*q, which is no VM's name (1 to %d of A-Za-z0-9._-, beginning with a letter or digit); %s", from, wire.MaxName, name, wire.MaxName, remedy)
	case wire.Reserved(name):
		return "", fmt.Errorf("%s gives %q, which is the host's own name; %s", from, name, remedy)
	}
	return name, nil
}

func (e environment) address(cfg config.Guest) (string, error) {
	address, err := e.text(credentialBroker)
	if err != nil || address == "" {
		return cfg.Broker.Address, err
	}
	if host, port, err := net.SplitHostPort(address); err != nil || host == "" || port == "" {
		return "", fmt.Errorf("the credential %s gives %q, which is no address; write it as 10.0.2.2:7070", credentialBroker, address)
	}
	return address, nil
}

func (e environment) key(cfg config.Guest) ([]byte, error) {
	raw, from := []byte(nil), "the credential "+credentialKey
	var err error
	if e.credentials != "" {
		if raw, err = readOptional(filepath.Join(e.credentials, credentialKey)); err != nil {
			return nil, fmt.Errorf("reading %s: %w", from, err)
		}
	}
	if len(raw) == 0 && cfg.Identity.KeyFile != "" {
		from = cfg.Identity.KeyFile + " (key_file under [identity])"
		if raw, err = os.ReadFile(cfg.Identity.KeyFile); err != nil {
			return nil, fmt.Errorf("reading this VM's key: %w", err)
		}
	} else if len(raw) == 0 {
		return nil, nil
	}
	key, err := vms.ParseKey(raw)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", from, err)
	}
	return key, nil
}

// text reads a credential that is text; empty: it is not there, or is empty, as a
// unit's default may be.
func (e environment) text(name string) (string, error) {
	if e.credentials == "" {
		return "", nil
	}
	raw, err := readOptional(filepath.Join(e.credentials, name))
	if err != nil {
		return "", fmt.Errorf("reading the credential %s: %w", name, err)
	}
	return string(bytes.TrimSpace(raw)), nil
}

func readOptional(path string) ([]byte, error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return raw, err
}
