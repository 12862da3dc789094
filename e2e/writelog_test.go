package e2e

import (
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"sort"
	"testing"
)

const (
	diskSector    = 512
	writeLogMagic = 0x6a736677736872
	writeLogFlush = 1
)

// diskWrite is what a VM asked of its disk, as QEMU's blklogwrites logs it once it is done
// (Documentation/admin-guide/device-mapper/log-writes.rst in Linux).
type diskWrite struct {
	at         int64 // on the disk
	from, size int64 // in the log; no bytes: a flush
	logged     int64 // how long the log was with it
}

// writeLog gives a VM's disk as a power cut may leave it.
type writeLog struct {
	testing.TB
	torn   int64 // what the disk writes whole, in bytes
	log    *os.File
	writes []diskWrite

	durable string      // the image of a disk with what a flush came after
	done    int         // writes that are in it or pending
	pending []diskWrite // no flush came after them
}

// openWriteLog reads a log; image was the disk's before the first write.
func openWriteLog(t testing.TB, path, image string, torn int64) *writeLog {
	t.Helper()
	log, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close() })
	d := &writeLog{TB: t, torn: torn, log: log, durable: image}
	var head [4]uint64
	read := func(at int64) (more bool) {
		err := binary.Read(io.NewSectionReader(log, at, 32), binary.LittleEndian, &head)
		if err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		return err == nil
	}
	if !read(0) || head[0] != writeLogMagic || uint32(head[3]) != diskSector {
		t.Fatalf("%s begins with %x", path, head)
	}
	for at := int64(diskSector); read(at); {
		w := diskWrite{at: int64(head[0]) * diskSector, from: at + diskSector, size: int64(head[1]) * diskSector}
		if flags := head[2]; flags > writeLogFlush || (flags == writeLogFlush) != (w.size == 0) {
			t.Fatalf("%s has %x at %d, which is not known here", path, head, at)
		}
		at = w.from + w.size
		w.logged = at
		d.writes = append(d.writes, w)
	}
	return d
}

// within counts the writes in a log that was so long, which are all that whoever looked at
// it then can have waited for.
func (d *writeLog) within(logged int64) int {
	return max(1, sort.Search(len(d.writes), func(i int) bool { return d.writes[i].logged > logged }))
}

// cut makes image the disk after the power has failed behind n writes; n never falls. Of
// what no flush came after there is all, nothing, some writes, or some blocks.
func (d *writeLog) cut(image string, n int) {
	d.Helper()
	for _, w := range d.writes[d.done:n] {
		if w.size > 0 {
			d.pending = append(d.pending, w)
			continue
		}
		d.apply(d.durable, d.pending)
		d.pending = nil
	}
	d.done = n
	mustRun(d.TB.(*testing.T), "cp", "--sparse=always", d.durable, image)
	how := rand.IntN(4)
	var left []diskWrite
	for _, w := range d.pending {
		for off := int64(0); off < w.size; {
			piece := w.size
			if how == 3 {
				piece = min(d.torn-(w.at+off)%d.torn, w.size-off)
			}
			if how == 0 || how > 1 && rand.IntN(2) == 0 {
				left = append(left, diskWrite{at: w.at + off, from: w.from + off, size: piece})
			}
			off += piece
		}
	}
	d.apply(image, left)
}

func (d *writeLog) apply(image string, writes []diskWrite) {
	d.Helper()
	f, err := os.OpenFile(image, os.O_WRONLY, 0)
	if err != nil {
		d.Fatal(err)
	}
	for _, w := range writes {
		if err == nil {
			_, err = io.Copy(io.NewOffsetWriter(f, w.at), io.NewSectionReader(d.log, w.from, w.size))
		}
	}
	if err := errors.Join(err, f.Close()); err != nil {
		d.Fatal(err)
	}
}
