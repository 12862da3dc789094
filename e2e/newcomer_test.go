package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// A step is a command of a transcript, with what it shows there.
type step struct {
	at      string // the prompt: whose command it is
	command string
	want    []string // lines; one that is … stands for any number
}

// steps are those of a transcript that have not been run yet.
type steps struct {
	all  []step
	next int
}

var (
	transcriptBlock = regexp.MustCompile("(?s)## From nothing to the first message\n.*?\n```console\n(.*?)```")
	prompted        = regexp.MustCompile(`^([a-z0-9]+)# (.*)$`)
)

// transcript reads that of a document: the way from nothing to the first message.
func transcript(t *testing.T, path string) *steps {
	t.Helper()
	doc, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	block := transcriptBlock.FindSubmatch(doc)
	if block == nil {
		t.Fatalf("%s has no transcript", path)
	}
	var s steps
	host := 0
	for line := range strings.Lines(string(block[1])) {
		line = strings.TrimSuffix(line, "\n")
		switch m := prompted.FindStringSubmatch(line); {
		case m != nil:
			s.all = append(s.all, step{at: m[1], command: m[2]})
			if m[1] == "host" {
				host++
			}
		case len(s.all) == 0:
			t.Fatalf("%s: the transcript begins with no command", path)
		default:
			last := &s.all[len(s.all)-1]
			last.want = append(last.want, line)
		}
	}
	if host > 5 {
		t.Errorf("%s: %d commands on the host, and five are promised", path, host)
	}
	return &s
}

// take gives the next step, which is to begin with these words.
func (s *steps) take(h *host, begin string) step {
	h.Helper()
	if s.next == len(s.all) || !strings.HasPrefix(s.all[s.next].command, begin) {
		h.Fatalf("step %d of the transcript is not %q: %+v", s.next+1, begin, s.all)
	}
	s.next++
	return s.all[s.next-1]
}

// run types the next step on the host, and wants what the document shows.
func (s *steps) run(h *host, begin string) {
	h.Helper()
	st := s.take(h, begin)
	if err := st.shows(h.run("sh", "-c", "cd /root && "+st.command)); err != nil {
		h.Error(err)
	}
}

// What differs from one run to the next.
var varies = []struct {
	is *regexp.Regexp
	as string
}{
	{regexp.MustCompile(`^castrad \S+: `), "castrad VERSION: "},
	{regexp.MustCompile(`^[A-Z][a-z]{2} \d\d \d\d:\d\d:\d\d\.\d{3} `), "WHEN "},
	{regexp.MustCompile(`\d+(ms|s|min|h)( \d+(s|min))?\b`), "AGE"},
}

func constant(line string) string {
	line = strings.TrimSpace(line)
	for _, v := range varies {
		line = v.is.ReplaceAllString(line, v.as)
	}
	return line
}

// shows compares what a command printed with what the document says that it does.
func (st *step) shows(printed string) error {
	lines := strings.Split(strings.TrimSpace(printed), "\n")
	skip := false
	for _, want := range st.want {
		if want == "…" {
			skip = true
			continue
		}
		for skip && len(lines) > 0 && constant(lines[0]) != constant(want) {
			lines = lines[1:]
		}
		if len(lines) == 0 || constant(lines[0]) != constant(want) {
			return fmt.Errorf("%q does not show %q, which the document has:\n%s", st.command, want, printed)
		}
		lines, skip = lines[1:], false
	}
	if len(lines) > 0 && !skip {
		return fmt.Errorf("%q shows %q too, which the document has not", st.command, lines)
	}
	return nil
}

// newcomer goes on as the README does where the packages are installed: a VM is
// started, turned away, let in by what status shows, and its message seen.
func newcomer(h *host, told *steps) {
	h.Helper()
	kernel := h.vmDisk(h.TB.(*testing.T))
	qemu := told.take(h, "qemu-system-x86_64 ")
	at := strings.Index(qemu.command, "-smbios ")
	if at < 0 || !strings.HasSuffix(qemu.command, " &") {
		h.Fatalf("%q gives the VM no name, or waits for it", qemu.command)
	}
	handover := strings.Fields(strings.TrimSuffix(qemu.command[at:], " &"))
	// As a process of this machine's, in the host's network: its Debian has no QEMU.
	inside := sudo("nsenter", "--target", h.leader, "--net", fmt.Sprintf("--setuid=%d", os.Geteuid()), fmt.Sprintf("--setgid=%d", os.Getegid()))
	vm, process := h.bootVMBy(inside, "web1", kernel, "10.0.2.2:7070", handover...)

	status := told.take(h, "castractl status")
	h.within(5*hang, "the VM is turned away", func() error {
		out, err := h.try("sh", "-c", status.command)
		if err != nil {
			return err // the VM has just made castrad start
		}
		return status.shows(out)
	})

	// What it says before it is let in is kept. The prompt comes twice: typed, and answered.
	vm.booted()
	publish := told.take(h, "castractl bus publish")
	vm.run(publish.command)
	vm.expect(0, strings.Join(publish.want, "\r\n"))

	told.run(h, "castractl vm add web1 --no-key")

	tail := told.take(h, "castractl bus tail")
	argv := append(sudo("nsenter", "--target", h.leader, "--all"), "sh", "-c", "exec "+tail.command)
	following := h.start("first", nil, argv...)
	h.until("the first message is there", func() error {
		got, err := os.ReadFile(filepath.Join(h.dir, "first.log"))
		if err != nil {
			return err
		}
		return tail.shows(string(got))
	})
	if told.next != len(told.all) {
		h.Errorf("nobody runs the rest of the transcript: %+v", told.all[told.next:])
	}
	h.stop("first", following)
	h.stop("web1", process)
	h.run("castractl", "vm", "remove", "web1")
}
