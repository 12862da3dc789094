package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// guest is a guest on the wire whose frames are JSON.
type guest struct {
	testing.TB
	peer
}

func (l *lab) guest(vm string) *guest {
	l.Helper()
	return &guest{l.TB, l.connect(vm)}
}

// frame is what tests look at in what castrad says.
type frame struct {
	Type, Ack, Status, Code string
	Durable                 *bool
	Seq, From, To           uint64
	Payload                 struct{ N int }
}

func (g *guest) next() frame {
	g.Helper()
	b, err := g.receive()
	var f frame
	if err == nil {
		err = json.Unmarshal(b, &f)
	}
	if err != nil {
		g.Fatalf("%s: %v", b, err)
	}
	return f
}

// call sends a frame and gives its ack, which must be ok.
func (g *guest) call(format string, args ...any) frame {
	g.Helper()
	if err := g.send(fmt.Appendf(nil, format, args...)); err != nil {
		g.Fatal(err)
	}
	f := g.next()
	if f.Type != "ack" || f.Status != "ok" {
		g.Fatalf("%s is answered with %+v", fmt.Sprintf(format, args...), f)
	}
	return f
}

// numbers gives the n of the records that castractl bus tail shows as JSON; a gap is
// -1.
func numbers(t testing.TB, out string) []int {
	t.Helper()
	var ns []int
	for line := range strings.Lines(out) {
		var f frame
		if err := json.Unmarshal([]byte(line), &f); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if f.Type == "gap" {
			f.Payload.N = -1
		}
		ns = append(ns, f.Payload.N)
	}
	return ns
}

// Everywhere that a record is acknowledged before it is durable it is said, and a
// castrad that was killed finds all that the kernel has.
func TestLazySync(t *testing.T) {
	for _, sync := range []string{"1s", "never"} {
		t.Run(sync, func(t *testing.T) {
			l := newLab(t)
			l.loadedConfig(fmt.Sprintf("sync = %q\nsegment_size = \"64KiB\"", sync))
			castrad := l.startCastrad("castrad")
			l.answers()
			const records = 2000 // several segments
			g := l.guest("lazy")
			for n := range records {
				if f := g.call(`{"type":"publish","topic":"t","id":"%d","payload":{"n":%[1]d}}`, n); f.Durable == nil || *f.Durable {
					t.Fatalf("record %d is acknowledged with %+v", n, f)
				}
			}
			cmd := exec.Command(bin(t, "castractl"), "bus", "publish", "--topic", "t", fmt.Sprintf(`{"n":%d}`, records))
			cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS="+l.hostBus)
			if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), fmt.Sprintf("not durable yet: castrad's sync is %q", sync)) {
				t.Errorf("castractl says %q, %v", out, err)
			}
			if err := castrad.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = castrad.Wait() // killed
			l.startCastrad("castrad")
			l.answers()
			if f := l.guest("lazy").call(`{"type":"publish","topic":"t","id":"7","payload":{"n":7}}`); f.Durable == nil || *f.Durable {
				t.Errorf("a retry is acknowledged with %+v", f)
			}
			got := numbers(t, l.castractl("bus", "tail", "--topic", "t", "-n", "all", "--no-follow", "-o", "json"))
			for n := range got {
				if got[n] != n || len(got) != records+1 {
					t.Fatalf("%d records are left, of which the %d. is %d", len(got), n, got[n])
				}
			}
			l.castractl("bus", "verify")
		})
	}
}

// What is kept stays within its bounds while castrad runs; who comes later is told
// what it has missed; and a noisy VM costs nobody else a record.
func TestRetention(t *testing.T) {
	const segment = 64 << 10
	l := newLab(t)
	l.loadedConfig(`segment_size = "64KiB"
host_retention_size = "1MiB"
vm_retention_size = "512KiB"`)
	castrad := l.startCastrad("castrad")
	l.answers()
	quiet := l.guest("quiet")
	for n := range 3 {
		quiet.call(`{"type":"publish","topic":"bench.quiet","payload":{"n":%d}}`, n)
	}
	noisy := l.guest("noisy")
	const large = 61_400 // bytes; a segment holds one
	for n := range 80 {
		noisy.call(`{"type":"publish","topic":"bench.noise","payload":{"n":%d,"pad":%q}}`, n, strings.Repeat("x", large))
	}
	for n := 80; n < 400; n++ {
		noisy.call(`{"type":"publish","topic":"bench.noise","payload":{"n":%d,"pad":%q}}`, n, strings.Repeat("x", 100))
	}
	l.until("the streams are within their bounds", func() error {
		for dir, limit := range map[string]int64{"host": 1 << 20, "vm/noisy": 512 << 10} {
			var size int64
			files, err := filepath.Glob(l.path("log/bus/" + dir + "/*"))
			for _, file := range files {
				st, err := os.Stat(file)
				if err != nil {
					return err
				}
				if st.Size() > segment {
					t.Errorf("%s has %d bytes", file, st.Size())
				}
				size += st.Size()
			}
			// A new segment begins with room for it.
			if err != nil || size > limit+segment || size < limit/2 {
				return fmt.Errorf("%s has %d bytes in %d files, %w", dir, size, len(files), err)
			}
		}
		return nil
	})
	for _, how := range []string{"live", "after a restart"} {
		if got := numbers(t, l.castractl("bus", "tail", "--vm", "quiet", "-n", "all", "--no-follow", "-o", "json")); fmt.Sprint(got) != "[0 1 2]" {
			t.Errorf("%s: of the quiet VM's records there are %v", how, got)
		}
		got := numbers(t, l.castractl("bus", "tail", "--from", "1", "--no-follow", "-o", "json"))
		if len(got) < 300 || got[0] != -1 {
			t.Errorf("%s: a tail from the first record has %d, beginning with %v", how, len(got), got[:min(3, len(got))])
		}
		g := l.guest("late")
		g.call(`{"type":"subscribe","topic":"bench.noise","from":1}`)
		gap := g.next()
		first := g.next()
		if gap.Type != "gap" || gap.From != 1 || first.Type != "publish" || first.Seq != gap.To+1 && gap.To < 80 {
			t.Errorf("%s: a guest behind what is kept gets %+v and then %+v", how, gap, first)
		}
		l.castractl("bus", "verify")
		if how == "live" {
			l.stop("castrad", castrad)
			l.startCastrad("castrad")
			l.answers()
		}
	}
}

// Each way to say where to begin, and positions that are kept, before and after a
// castrad that was killed.
func TestReplayFrom(t *testing.T) {
	l := newLab(t)
	l.loadedConfig(`segment_size = "64KiB"`)
	castrad := l.startCastrad("castrad")
	l.answers()
	const records = 1000 // so that they are in several files
	pub := l.guest("pub")
	publish := func(from, to int) {
		for n := from; n < to; n++ {
			pub.call(`{"type":"publish","topic":"bench.r","payload":{"n":%d,"pad":%q}}`, n, strings.Repeat("x", 200))
		}
	}
	publish(0, records/2)
	time.Sleep(time.Millisecond) // records' times have microseconds
	half := time.Now().UTC().Format(time.RFC3339Nano)
	publish(records/2, records)
	reader := l.guest("reader")
	reader.call(`{"type":"subscribe","topic":"bench.r","sub":"s","from":"start","cursor":"c"}`)
	var last frame
	for n := range records / 4 {
		if last = reader.next(); last.Payload.N != n {
			t.Fatalf("%+v where %d was due", last, n)
		}
	}
	if err := reader.send(fmt.Appendf(nil, `{"type":"ack","ack":"publish","subscription":"s","seq":%d}`, last.Seq)); err != nil {
		t.Fatal(err)
	}
	l.untilFile("state/cursors/reader.json", fmt.Sprintf(`"next":%d`, last.Seq+1))
	cursorFile := l.path("cursor")
	shown := numbers(t, l.castractl("bus", "tail", "--topic", "bench.r", "-n", "all", "--no-follow", "-o", "json", "--cursor-file", cursorFile))
	if len(shown) != records {
		t.Errorf("a tail shows %d records", len(shown))
	}

	froms := []struct {
		from string
		n    int // of the first record; -1: none
	}{
		{`"start"`, 0},
		{`1`, 0},
		{strconv.FormatUint(last.Seq, 10), records/4 - 1},
		{`-3`, records - 3},
		{strconv.Quote(half), records / 2},
		{`"2001-01-01T00:00:00Z"`, 0},
		{`"2101-01-01T00:00:00Z"`, -1},
		{`"now"`, -1},
	}
	next := records
	for _, how := range []string{"live", "after a kill"} {
		for i, c := range froms {
			g := l.guest(fmt.Sprintf("from%d", i))
			g.call(`{"type":"subscribe","topic":"bench.r","from":%s}`, c.from)
			want := c.n
			if want < 0 {
				publish(next, next+1)
				want = next
				next++
			}
			if c.from == "-3" && how != "live" {
				want = next - 3
			}
			if f := g.next(); f.Payload.N != want {
				t.Errorf("%s, from %s: the first is %+v, not %d", how, c.from, f, want)
			}
		}
		// The guest begins anew, too.
		g := l.guest("reader")
		g.call(`{"type":"subscribe","topic":"bench.r","sub":"s","from":"now","cursor":"c"}`)
		if f := g.next(); f.Seq != last.Seq+1 {
			t.Errorf("%s: the cursor, moved to %d, begins at %+v", how, last.Seq, f)
		}
		if how == "live" {
			if err := castrad.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = castrad.Wait() // killed
			l.startCastrad("castrad")
			l.answers()
			pub = l.guest("pub")
		}
		publish(next, next+1)
		next++
		got := numbers(t, l.castractl("bus", "tail", "--topic", "bench.r", "--no-follow", "-o", "json", "--cursor-file", cursorFile))
		if len(got) == 0 || got[0] != shown[len(shown)-1]+1 || got[len(got)-1] != next-1 {
			t.Errorf("%s: with its cursor file behind %d a tail shows %v", how, shown[len(shown)-1], got)
		}
		shown = got
	}
}

// Damage is found beside a castrad that runs and one that does not, every file of it
// named.
func TestVerifyDamaged(t *testing.T) {
	l := newLab(t)
	l.loadedConfig(`segment_size = "64KiB"`)
	castrad := l.startCastrad("castrad")
	l.answers()
	g := l.guest("web1")
	for n := range 1000 {
		g.call(`{"type":"publish","topic":"t","payload":{"n":%d,"pad":%q}}`, n, strings.Repeat("x", 200))
	}
	l.castractl("bus", "verify")
	own, err := filepath.Glob(l.path("log/bus/vm/web1/*.jsonl"))
	if err != nil || len(own) == 0 {
		t.Fatal(own, err)
	}
	files := []string{l.segments()[0], l.segments()[1], own[0]}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err == nil {
			b[len(b)/2] ^= 1
			err = os.WriteFile(file, b, 0o640)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range [][]string{{"bus", "verify"}, {"bus", "verify", "--log-dir", l.path("log")}} {
		cmd := exec.Command(bin(t, "castractl"), args...)
		cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS="+l.hostBus)
		out, err := cmd.Output()
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 1 {
			t.Errorf("%q: %v", args, err)
		}
		for _, file := range files {
			if !bytes.Contains(out, []byte("damage: "+file+":")) {
				t.Errorf("%q does not name %s:\n%s", args, file, out)
			}
		}
		if n := bytes.Count(out, []byte(": bad-checksum: ")); n != len(files) {
			t.Errorf("%q finds %d records damaged:\n%s", args, n, out)
		}
		l.stop("castrad", castrad) // for the second one
	}
}

// Ten thousand VMs publish once each, and castrad, which may have a thousand
// descriptors, gives each a stream. The disk is one in memory: its syncs, two or
// three a VM, are not what is looked at.
func TestTenThousandVMs(t *testing.T) {
	const vms, files = 10_000, 1024
	l := newLab(t)
	for _, dir := range []string{"log", "state"} {
		if err := os.Mkdir(l.path(dir), 0o755); err != nil {
			t.Fatal(err)
		}
		l.mount(dir, "-t", "tmpfs", "-o", "size=256m,mode=0777", "none")
	}
	l.loadedConfig("")
	castrad := l.start("castrad", []string{"DBUS_SYSTEM_BUS_ADDRESS=" + l.hostBus},
		"sh", "-c", `ulimit -n "$1"; exec "$2" --config "$3"`, "sh", strconv.Itoa(files), bin(t, "castrad"), l.path("castrad.toml"))
	l.answers()
	most := 0
	published := make(chan struct{})
	var looking sync.WaitGroup
	looking.Go(func() {
		for done := false; !done; {
			open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", castrad.Process.Pid))
			if err != nil {
				t.Error(err)
				return
			}
			most = max(most, len(open))
			select {
			case <-published:
				done = true
			case <-time.After(20 * time.Millisecond):
			}
		}
	})
	func() {
		defer looking.Wait()
		defer close(published)
		l.publishOnce(vms, "1")
	}()
	l.stop("castrad", castrad) // which copies what is left
	for n := 1; n <= vms; n++ {
		streams, err := filepath.Glob(l.path(fmt.Sprintf("log/bus/vm/vm%d/*.jsonl", n)))
		if err != nil || len(streams) != 1 {
			t.Fatalf("vm%d has %q, %v", n, streams, err)
		}
		b, err := os.ReadFile(streams[0])
		if err != nil || bytes.Count(b, []byte("\n")) != 1 || !bytes.Contains(b, fmt.Appendf(nil, `"payload":{"n":%d}`, n)) {
			t.Fatalf("vm%d's stream has %q, %v", n, b, err)
		}
	}
	l.castractl("bus", "verify", "--log-dir", l.path("log"))
	log, err := os.ReadFile(l.path("castrad.log"))
	if err != nil || bytes.Contains(log, []byte("too many open files")) {
		t.Errorf("castrad ran out of descriptors (%v)", err)
	}
	t.Logf("%d VMs, %d publishing at a time; castrad had %d descriptors at most, of %d", vms, atOnce, most, files)
}
