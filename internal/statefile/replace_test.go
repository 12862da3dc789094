package statefile

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
)

func replacer(t testing.TB) *Replacer {
	t.Helper()
	dir := t.TempDir()
	r := &Replacer{Dir: filepath.Join(dir, "files"), Spares: filepath.Join(dir, "spares"), Perm: 0o640}
	if err := os.Mkdir(r.Dir, 0o750); err != nil {
		t.Fatal(err)
	}
	return r
}

// run has do work on the files.
func (r *Replacer) run(t testing.TB, do func(*Files) error) {
	t.Helper()
	f, err := r.Open()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(do(f), f.Close()); err != nil {
		t.Fatal(err)
	}
}

func (r *Replacer) must(t testing.TB, data string) {
	t.Helper()
	r.run(t, func(f *Files) error { return f.Replace("f", []byte(data)) })
	got, err := os.ReadFile(filepath.Join(r.Dir, "f"))
	if err != nil || string(got) != data {
		t.Fatalf("it holds %q, %v, and not %q", got, err, data)
	}
}

func inode(t testing.TB, path string) uint64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// Two files change places for ever, as long as what is written is as long.
func TestReplaceReuses(t *testing.T) {
	r := replacer(t)
	path := filepath.Join(r.Dir, "f")
	r.must(t, "a1")
	first, second := inode(t, path), inode(t, filepath.Join(r.spares(), "f")) // each has its spare at once
	r.must(t, "a2")
	for i := range 10 {
		r.must(t, fmt.Sprintf("b%d", i))
		if want := []uint64{first, second}[i%2]; inode(t, path) != want {
			t.Fatalf("write %d made a new file", i)
		}
	}
	spare, err := os.OpenFile(filepath.Join(r.spares(), "f"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if fd := int(spare.Fd()); reusable(fd, 3) || !reusable(fd, 2) {
		t.Error("a file of another length is taken, or one of the same is not")
	}
	if err := spare.Truncate(0); err != nil || !reusable(int(spare.Fd()), 3) {
		t.Errorf("an empty file is not taken, %v", err)
	}
	_ = spare.Close()
	r.must(t, "longer")
	if st, err := os.Stat(path); err != nil || st.Mode() != 0o640 {
		t.Errorf("its mode is %v, %v", st.Mode(), err)
	}
	r.run(t, func(f *Files) error { return f.Remove("f") })
	if left, _ := filepath.Glob(filepath.Dir(r.Dir) + "/*/f"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if left, _ := filepath.Glob(r.spares() + "/*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	r.run(t, func(f *Files) error { return f.Remove("f") }) // nothing
}

// Who has a file open goes on reading what was in it.
func TestReplaceSparesReaders(t *testing.T) {
	r := replacer(t)
	path := filepath.Join(r.Dir, "f")
	r.must(t, "a1")
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r.must(t, "a2") // f is among the spares now
	if err := os.Link(path, path+".link"); err != nil {
		t.Fatal(err)
	}
	r.must(t, "a3")
	r.must(t, "a4")
	if got, err := io.ReadAll(f); string(got) != "a1" {
		t.Errorf("who has it open reads %q, %v", got, err)
	}
	if got, err := os.ReadFile(path + ".link"); string(got) != "a2" {
		t.Errorf("a hard link to it holds %q, %v", got, err)
	}
}

// Nobody ever reads half of one, however often they are written.
func TestReplaceIsWhole(t *testing.T) {
	r := replacer(t)
	r.must(t, strings.Repeat("0", 3000))
	var end atomic.Bool
	done := make(chan error, 1) // for the one result
	go func() {
		for !end.Load() {
			got, err := os.ReadFile(filepath.Join(r.Dir, "f"))
			if err != nil || len(got) != 3000 || strings.Trim(string(got), string(got[:1])) != "" {
				done <- fmt.Errorf("read %d bytes %.20q…, %w", len(got), got, err)
				return
			}
		}
		done <- nil
	}()
	r.run(t, func(f *Files) error {
		for i := range 3000 {
			if err := f.Replace("f", []byte(strings.Repeat(string(rune('0'+i%10)), 3000))); err != nil {
				return err
			}
		}
		return nil
	})
	end.Store(true)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// The next process finds the spares of the one before, and makes no more of them.
func TestReplaceFindsSpares(t *testing.T) {
	r := replacer(t)
	for range 2 {
		r.must(t, "a")
	}
	first := inode(t, filepath.Join(r.Dir, "f"))
	next := &Replacer{Dir: r.Dir, Spares: r.Spares, Perm: r.Perm}
	for range 2 {
		next.must(t, "b")
	}
	if got := inode(t, filepath.Join(r.Dir, "f")); got != first {
		t.Error("another file is used where there was a spare")
	}
	if dirs, _ := filepath.Glob(r.Spares + "/*"); len(dirs) != 1 {
		t.Errorf("there are %v", dirs)
	}
}

// What is in the place of a file, or of its spare, is neither followed nor lost.
func TestReplaceWhatIsNoFile(t *testing.T) {
	for name, put := range map[string]func(path string) error{
		"a directory":     func(path string) error { return os.MkdirAll(path+"/kept", 0o755) },
		"a symbolic link": func(path string) error { return os.Symlink("../victim", path) },
		"a pipe":          func(path string) error { return syscall.Mkfifo(path, 0o644) },
	} {
		for _, where := range []string{"files", "spares"} {
			t.Run(name+" among the "+where, func(t *testing.T) {
				r := replacer(t)
				victim := filepath.Join(filepath.Dir(r.Dir), "victim")
				if err := os.WriteFile(victim, []byte("v0"), 0o600); err != nil {
					t.Fatal(err)
				}
				_ = os.MkdirAll(r.spares(), 0o750)
				path := filepath.Join(map[string]string{"files": r.Dir, "spares": r.spares()}[where], "f")
				if err := put(path); err != nil {
					t.Fatal(err)
				}
				for i := range 4 {
					r.must(t, fmt.Sprintf("a%d", i))
				}
				if got, err := os.ReadFile(victim); string(got) != "v0" {
					t.Errorf("behind the link is %q, %v", got, err)
				}
				if _, err := os.Stat(r.Dir + "/f.aside-1/kept"); name == "a directory" && err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// Where two files cannot change places each is a new one.
func TestReplaceWithoutExchange(t *testing.T) {
	defer func(was func(int, string, int) error) { exchange = was }(exchange)
	exchange = func(int, string, int) error { return syscall.EINVAL }
	r := replacer(t)
	if err := os.MkdirAll(r.Dir+"/f/kept", 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		r.must(t, fmt.Sprintf("a%d", i))
	}
	if _, err := os.Stat(r.Dir + "/f.aside-1/kept"); err != nil {
		t.Error(err)
	}
}

// Whoever removes the directory of the spares or of the files, or puts another one in its
// place, finds files in them again.
func TestReplaceFollowsDirectories(t *testing.T) {
	r := replacer(t)
	for i, move := range []func() error{
		func() error { return os.RemoveAll(r.Spares) },
		func() error { return os.RemoveAll(r.Dir) },
		func() error { return errors.Join(os.Rename(r.Dir, r.Dir+".old"), os.Mkdir(r.Dir, 0o750)) },
	} {
		r.must(t, fmt.Sprintf("a%d", i))
		if err := move(); err != nil {
			t.Fatal(err)
		}
		r.must(t, fmt.Sprintf("b%d", i))
	}
}

func BenchmarkReplace(b *testing.B) {
	const files = 10_000 // of as many guests, each in turn
	r := replacer(b)
	data := []byte(strings.Repeat("x", 250))
	all := func() {
		r.run(b, func(f *Files) error {
			for i := range files {
				if err := f.Replace(fmt.Sprintf("%d.json", i), data); err != nil {
					return err
				}
			}
			return nil
		})
	}
	all() // the file
	all() // and its spare
	for b.Loop() {
		all()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/files, "ns/file")
	b.ReportMetric(0, "ns/op")
}
