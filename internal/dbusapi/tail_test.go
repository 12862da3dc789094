package dbusapi

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/castrabus/castra/internal/bus"
)

// openTail asks for a tail and returns the end that came.
func openTail(t *testing.T, c *dbus.Conn, options map[string]any) *os.File {
	t.Helper()
	var fd dbus.UnixFD
	if err := manager(c).Call(ManagerInterface+".Tail", 0, variants(options)).Store(&fd); err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "tail")
	t.Cleanup(func() { f.Close() })
	return f
}

// acknowledge tells the server that the descriptor came.
func acknowledge(t *testing.T, f *os.File) {
	t.Helper()
	if _, err := f.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
}

// endless is a Tail that writes until it may not.
func endless(begun chan<- struct{}, ended chan<- error) func(context.Context, bus.TailRequest, io.Writer) error {
	return func(ctx context.Context, _ bus.TailRequest, w io.Writer) error {
		begun <- struct{}{}
		for n := 0; ; n++ {
			if _, err := fmt.Fprintf(w, "%1000d\n", n); err != nil || ctx.Err() != nil {
				err = errors.Join(err, ctx.Err())
				ended <- err
				return err
			}
		}
	}
}

func TestTail(t *testing.T) {
	b, f := newBus(t, openPolicy), newFakeBus()
	requests := make(chan bus.TailRequest, 1) // one tail
	f.tail = func(_ context.Context, req bus.TailRequest, w io.Writer) error {
		requests <- req
		for n := range 5000 { // more than the socket holds
			if _, err := fmt.Fprintf(w, "%100d\n", n); err != nil {
				return err
			}
		}
		return nil
	}
	b.serve(Options{Bus: f}, quick())
	c := b.client()
	r := openTail(t, c, map[string]any{
		"topics": []string{"a.*", "vm:web1/>"}, "vm": "web1", "from": uint64(7), "until": uint64(1_700_000_000_000_000), "follow": true,
	})
	acknowledge(t, r)
	lines := bufio.NewScanner(r)
	for n := range 5000 {
		if !lines.Scan() || strings.TrimSpace(lines.Text()) != fmt.Sprint(n) {
			t.Fatalf("line %d is %q (%v)", n, lines.Text(), lines.Err())
		}
	}
	if lines.Scan() || lines.Err() != nil {
		t.Errorf("after the end: %q, %v", lines.Text(), lines.Err())
	}
	want := bus.TailRequest{Topics: []string{"a.*", "vm:web1/>"}, VM: "web1", From: 7, Until: time.UnixMicro(1_700_000_000_000_000), Follow: true}
	if got := receive(t, requests); !reflect.DeepEqual(got, want) {
		t.Errorf("request %+v, want %+v", got, want)
	}
}

func TestTailError(t *testing.T) {
	b, f := newBus(t, openPolicy), newFakeBus()
	f.tail = func(_ context.Context, _ bus.TailRequest, w io.Writer) error {
		fmt.Fprintln(w, "{}")
		return bus.Errorf(bus.CodeStorageStalled, "the disk is \"slow\"")
	}
	b.serve(Options{Bus: f}, quick())
	r := openTail(t, b.client(), nil)
	acknowledge(t, r)
	got, err := io.ReadAll(r)
	if want := "{}\n{\"type\":\"error\",\"code\":\"storage-stalled\",\"reason\":\"the disk is \\\"slow\\\"\"}\n"; err != nil || string(got) != want {
		t.Errorf("%q, %v, want %q", got, err, want)
	}
}

// TestTailEnds ends a tail that its caller does not read, in each way there is.
func TestTailEnds(t *testing.T) {
	for name, end := range map[string]func(*dbus.Conn, *os.File, *Server, *testBus){
		"the caller closes its end": func(_ *dbus.Conn, r *os.File, _ *Server, _ *testBus) { r.Close() },
		"the caller leaves the bus": func(c *dbus.Conn, _ *os.File, _ *Server, _ *testBus) { c.Close() },
		"the server is closed":      func(_ *dbus.Conn, _ *os.File, s *Server, _ *testBus) { s.Close() },
		"the message bus goes away": func(_ *dbus.Conn, _ *os.File, _ *Server, b *testBus) { b.stop() },
	} {
		for _, full := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, full %t", name, full), func(t *testing.T) {
				b, f := newBus(t, openPolicy), newFakeBus()
				begun, ended := make(chan struct{}, 1), make(chan error, 1) // of the one tail
				f.tail = endless(begun, ended)
				if !full {
					f.tail = func(ctx context.Context, _ bus.TailRequest, _ io.Writer) error {
						begun <- struct{}{}
						<-ctx.Done()
						ended <- ctx.Err()
						return ctx.Err()
					}
				}
				var l *link
				h := quick()
				h.linked = func(made *link) { l = made }
				s := b.serve(Options{Bus: f}, h)
				c := b.client()
				r := openTail(t, c, map[string]any{"follow": true})
				acknowledge(t, r)
				receive(t, begun)
				end(c, r, s, b)
				if err := receive(t, ended); err == nil {
					t.Error("it ended for no reason")
				}
				eventually(t, "nothing is held", func() bool {
					l.mu.Lock()
					defer l.mu.Unlock()
					return l.nHeld == 0 && len(l.callers) == 0
				})
			})
		}
	}
}

// TestTailCutShort closes the server while a tail has more to show: its reader must
// not take that for the end.
func TestTailCutShort(t *testing.T) {
	const stopping = `{"type":"error","code":"shutting-down","reason":"castrad is stopping or lost the message bus; tail again"}`
	t.Run("idle", func(t *testing.T) {
		b, f := newBus(t, openPolicy), newFakeBus()
		begun := make(chan struct{}, 1) // one tail
		f.tail = func(ctx context.Context, _ bus.TailRequest, w io.Writer) error {
			fmt.Fprintln(w, "{}")
			begun <- struct{}{}
			<-ctx.Done()
			return ctx.Err()
		}
		s := b.serve(Options{Bus: f}, quick())
		r := openTail(t, b.client(), nil)
		acknowledge(t, r)
		receive(t, begun)
		s.Close()
		if got, err := io.ReadAll(r); err != nil || string(got) != "{}\n"+stopping+"\n" {
			t.Errorf("%q, %v", got, err)
		}
	})
	t.Run("read slowly", func(t *testing.T) {
		b, f := newBus(t, openPolicy), newFakeBus()
		begun, ended := make(chan struct{}, 1), make(chan error, 1) // of the one tail
		f.tail = endless(begun, ended)
		s := b.serve(Options{Bus: f}, quick())
		r := openTail(t, b.client(), nil)
		acknowledge(t, r)
		receive(t, begun)
		s.Close()
		got, err := io.ReadAll(r)
		if err != nil || len(got) == 0 {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
		if last := got[len(got)-1]; last == '\n' && !strings.HasSuffix(string(got), stopping+"\n") {
			t.Errorf("it ends like a whole tail: %q", got[max(0, len(got)-200):])
		}
	})
}

// TestTailNeverRead counts what the kernel takes for a caller who does not read.
func TestTailNeverRead(t *testing.T) {
	b, f := newBus(t, openPolicy), newFakeBus()
	written := make(chan int, 10_000) // more lines than the buffer holds
	f.tail = func(_ context.Context, _ bus.TailRequest, w io.Writer) error {
		for {
			n, err := w.Write(make([]byte, 1000))
			if err != nil {
				close(written)
				return err
			}
			written <- n
		}
	}
	b.serve(Options{Bus: f}, quick())
	c := b.client()
	acknowledge(t, openTail(t, c, nil))
	receive(t, written)
	c.Close()
	total := 1000
	for n := range written {
		total += n
	}
	if total > 4*tailBuffer {
		t.Errorf("%d bytes were taken", total)
	}
}

// TestTailAtOnce has a caller who does nothing but read, as the interface says.
func TestTailAtOnce(t *testing.T) {
	b, f := newBus(t, openPolicy), newFakeBus()
	f.tail = func(_ context.Context, _ bus.TailRequest, w io.Writer) error {
		_, err := fmt.Fprintln(w, "{}")
		return err
	}
	b.serve(Options{Bus: f}, quick())
	r := openTail(t, b.client(), nil)
	if got, err := io.ReadAll(r); string(got) != "{}\n" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

// TestTailLeaksNothing counts descriptors after many tails.
func TestTailLeaksNothing(t *testing.T) {
	b, f := newBus(t, openPolicy), newFakeBus()
	f.tail = func(context.Context, bus.TailRequest, io.Writer) error { return nil }
	b.serve(Options{Bus: f}, quick())
	c := b.client()
	count := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	before := count()
	for range 50 {
		r := openTail(t, c, nil)
		acknowledge(t, r)
		if _, err := io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
		r.Close()
	}
	eventually(t, "the descriptors are closed", func() bool { return count() <= before+5 })
}

func TestTailRequest(t *testing.T) {
	for _, tt := range []struct {
		options map[string]any
		want    bus.TailRequest
		err     string
	}{
		{options: nil},
		{options: map[string]any{"lines": uint64(10)}, want: bus.TailRequest{Lines: 10}},
		{options: map[string]any{"all": true}, want: bus.TailRequest{All: true}},
		{options: map[string]any{"from": uint64(0)}, want: bus.TailRequest{From: 1}},
		{options: map[string]any{"since": uint64(1_000_000)}, want: bus.TailRequest{Since: time.Unix(1, 0)}},
		{options: map[string]any{"since": ^uint64(0)}, err: "invalid-argument: since and until are"},
		{options: map[string]any{"lines": uint64(1), "from": uint64(1)}, err: "invalid-argument: give one of lines, all, from and since"},
		{options: map[string]any{"lines": 1}, err: `invalid-argument: option "lines" must be of the type t, not i`},
		{options: map[string]any{"topics": "a"}, err: `invalid-argument: option "topics" must be of the type as, not s`},
		{options: map[string]any{"topics": []string{"a", "b*"}}, err: `bad-topic: topic "b*": `},
		{options: map[string]any{"topics": make([]string, 65)}, err: "invalid-argument: 65 topics are too many; at most 64"},
		{options: map[string]any{"vm": "a b"}, err: `invalid-name: "a b" is no VM's name`},
		{options: map[string]any{"Follow": true}, err: `invalid-argument: unknown options ["Follow"]`},
	} {
		got, err := tailRequest(variants(tt.options))
		if tt.err != "" {
			if err == nil || !strings.HasPrefix(err.Error(), tt.err) {
				t.Errorf("%v: error %v, want %q", tt.options, err, tt.err)
			}
		} else if err != nil || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%v: %+v, %v, want %+v", tt.options, got, err, tt.want)
		}
	}
}
