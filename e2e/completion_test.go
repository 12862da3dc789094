package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
)

// TestCompletion presses the tab key in real shells, on a terminal of their own: what
// is not typed is what completes it.
func TestCompletion(t *testing.T) {
	l := newLab(t)
	l.castrad()
	l.castractl("vm", "add", "--no-key", "only-one")
	l.guestd("only-one")
	l.tailInGuest("only-one", "jobs.nightly")
	for shell, setUp := range map[string]string{
		"bash --norc --noprofile -i": `. /usr/share/bash-completion/bash_completion; . <(castractl completion bash)`,
		"zsh -f -i":                  `autoload -Uz compinit && compinit -u -D; . <(castractl completion zsh); PS1='$ '`,
		"fish --no-config -i":        `castractl completion fish | source`,
	} {
		name, _, _ := strings.Cut(shell, " ")
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, env := l.shell(l.hostBus, "")
			sh := l.terminal(t, shell, env...)
			sh.line(setUp + "; echo READ''Y")
			sh.see("READY")
			sh.completes(map[string]string{
				"castractl status on":                     "only-one",
				"castractl wait --timeout 5s on":          "only-one",
				"castractl bus tail --vm on":              "only-one",
				"castractl bus tail --topic castra.pr":    "castra.presence",
				"castractl bus publish --topic jobs.ni":   "jobs.nightly",
				"castractl bus tail -o json-p":            "json-pretty",
				"castractl explain --js":                  "--json",
				"castractl wait on --for unr":             "unreachable",
				"castractl bus request --vm only-one --o": "--output",
			})
		})
	}
}

// completion presses it on a host on which castractl is installed: each shell finds
// what the package brought by itself. web1 is there, and listens to jobs.nightly.
func completion(t *testing.T, h *host) {
	// The host has no network to fetch shells from, and its Debian is this machine's.
	const copyShells = `dpkg-query --listfiles bash-completion zsh zsh-common fish fish-common libpcre2-32-0 |
		while read -r f; do if [ -f "$f" ]; then echo "$f"; fi; done | grep -v -e /doc/ -e /man/ |
		tar --create --dereference --files-from=- 2>/dev/null | tar --extract --skip-old-files --directory="$0"`
	if out, err := command(sudo("sh", "-c", copyShells, h.tree)...).CombinedOutput(); err != nil {
		t.Fatalf("copying shells: %v: %s", err, out)
	}
	for shell, setUp := range map[string]string{
		"bash --login -i": "true",
		"zsh -i":          "autoload -Uz compinit && compinit -u -D",
		"fish -i":         "true",
	} {
		name, _, _ := strings.Cut(shell, " ")
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			enter := sudo("nsenter", "--target", h.leader, "--all", "--wdns=/root", "env", "--ignore-environment",
				"HOME=/root/"+name, "TERM=dumb", "PATH=/usr/local/bin:/usr/bin:/bin")
			h.run("mkdir", "-p", "/root/"+name)
			h.run("touch", "/root/"+name+"/.zshrc") // or zsh asks its newcomer's questions
			sh := h.terminal(t, strings.Join(enter, " ")+" "+shell)
			sh.line(setUp + "; echo READ''Y")
			sh.see("READY")
			sh.completes(map[string]string{
				"castractl status w":                    "web1",
				"castractl bus tail --topic castra.pr":  "castra.presence",
				"castractl bus publish --topic jobs.ni": "jobs.nightly",
				"castractl bus tail -o json-p":          "json-pretty",
			})
		})
	}
}

// completes wants what is not typed to complete what is.
func (term *terminal) completes(all map[string]string) {
	term.t.Helper()
	for typed, want := range all {
		term.forget()
		term.write(typed + "\t")
		term.see(want)
		term.write("\x15") // Ctrl-U: the line is not to be run
	}
}

// A terminal is a shell with a terminal of its own, as script(1) gives it.
type terminal struct {
	t    *testing.T
	l    *lab
	in   io.Writer
	mu   sync.Mutex
	seen []byte
}

func (l *lab) terminal(t *testing.T, shell string, env ...string) *terminal {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "script", "--quiet", "--command", shell, "/dev/null")
	cmd.Env = append(append(os.Environ(), env...), "TERM=dumb", "HOME="+l.dir, "COLUMNS=200")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	term := &terminal{t: t, l: l, in: in}
	var reader sync.WaitGroup
	reader.Go(func() {
		buf := make([]byte, 4096)
		for {
			n, err := out.Read(buf)
			term.mu.Lock()
			term.seen = append(term.seen, buf[:n]...)
			term.mu.Unlock()
			if err != nil {
				return
			}
		}
	})
	t.Cleanup(func() {
		_ = in.Close() // script ends its shell with it
		_ = cmd.Process.Kill()
		reader.Wait()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("%s:\n%q", shell, term.seen)
		}
	})
	return term
}

func (term *terminal) write(text string) {
	term.t.Helper()
	if _, err := io.WriteString(term.in, text); err != nil {
		term.t.Fatal(err)
	}
}

func (term *terminal) line(text string) { term.write(text + "\r") }

// forget makes see look at what is still to come.
func (term *terminal) forget() {
	term.mu.Lock()
	defer term.mu.Unlock()
	term.seen = nil
}

// see waits until the terminal shows the text.
func (term *terminal) see(text string) {
	term.t.Helper()
	l := *term.l
	l.TB = term.t
	l.until(fmt.Sprintf("the terminal shows %q", text), func() error {
		term.mu.Lock()
		defer term.mu.Unlock()
		if !bytes.Contains(term.seen, []byte(text)) {
			return errors.Join(errors.New("it shows something else"), fmt.Errorf("%q", term.seen))
		}
		return nil
	})
}
