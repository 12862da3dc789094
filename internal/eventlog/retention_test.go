package eventlog

import (
	"fmt"
	"os"
	"testing"
	"time"
)

// Segments go for their age, oldest first, the newest never, and none that this
// process has not seen sealed for an hour.
func TestRetentionByAge(t *testing.T) {
	now := time.Now()
	old := now.Add(-48 * time.Hour)
	fresh := now.Add(-time.Minute)
	for _, c := range []struct {
		what     string
		segs     []segment
		before   uint64
		keptFrom uint64
	}{
		{"two are too old", []segment{{first: 1, modified: old, sealed: old}, {first: 5, modified: old, sealed: old}, {first: 9, modified: fresh}}, 100, 9},
		{"the newest stays", []segment{{first: 1, modified: old, sealed: old}, {first: 5, modified: old}}, 100, 5},
		{"the clock has jumped", []segment{{first: 1, modified: old, sealed: fresh}, {first: 5, modified: fresh}}, 100, 1},
		{"one is young", []segment{{first: 1, modified: fresh, sealed: old}, {first: 5, modified: fresh}}, 100, 1},
		{"it is still to be copied", []segment{{first: 1, modified: old, sealed: old}, {first: 5, modified: old, sealed: old}, {first: 9, modified: fresh}}, 5, 5},
	} {
		t.Run(c.what, func(t *testing.T) {
			s := &stream{fs: OS, dir: t.TempDir(), segs: c.segs}
			for _, g := range c.segs {
				if err := os.WriteFile(s.path(g.first), nil, filePerm); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.expire(retention{age: 24 * time.Hour, before: c.before}, now); err != nil {
				t.Fatal(err)
			}
			files, err := os.ReadDir(s.dir)
			if err != nil || s.oldest() != c.keptFrom || files[0].Name() != segmentName(c.keptFrom) {
				t.Error(fmt.Sprint(err), s.oldest(), files)
			}
		})
	}
}
