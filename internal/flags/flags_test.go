package flags

import (
	"bytes"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for _, c := range []struct {
		args           []string
		want           Daemon
		status         int
		proceed        bool
		stdout, stderr string
	}{
		{nil, Daemon{Config: "/etc/d.toml"}, 0, true, "", ""},
		{[]string{"--config", "x", "-debug"}, Daemon{Config: "x", Debug: true}, 0, true, "", ""},
		{[]string{"--check-config"}, Daemon{Config: "/etc/d.toml", Check: true}, 0, true, "", ""},
		{[]string{"--version"}, Daemon{Config: "/etc/d.toml"}, 0, false, "d 1.2\n", ""},
		{[]string{"--help"}, Daemon{Config: "/etc/d.toml"}, 0, false, "", "-check-config"},
		{[]string{"--frob"}, Daemon{Config: "/etc/d.toml"}, 2, false, "", "frob"},
		{[]string{"extra"}, Daemon{Config: "/etc/d.toml"}, 2, false, "", `unexpected argument "extra"; d --help lists the options`},
	} {
		var stdout, stderr bytes.Buffer
		d, status, proceed := Parse("d", "1.2", "/etc/d.toml", c.args, &stdout, &stderr)
		if d != c.want || status != c.status || proceed != c.proceed || stdout.String() != c.stdout || !strings.Contains(stderr.String(), c.stderr) {
			t.Errorf("%q: %+v, %d, %v, %q, %q", c.args, d, status, proceed, &stdout, &stderr)
		}
	}
}
