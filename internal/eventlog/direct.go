package eventlog

import (
	"errors"
	"io"
	"os"
	"syscall"
	"unsafe"
)

// ioBlock is a multiple of what a disk reads and writes at least, in bytes: all have 512
// or 4096 as their logical block, and a file system's blocks are at least as large.
const ioBlock = 4096

// openDirect opens the file at path, whose first block is first, to be read and written in
// blocks alone, from and to memory of [alignedBytes]: past the page cache if that can be
// (open(2), O_DIRECT), which is no use to what is synced after each write and hardly ever
// read. Some file systems refuse it at once; a disk of larger blocks, or a file system in
// a process of its own, when it is used.
func openDirect(fsys FS, path string, first []byte) (File, error) {
	f, err := fsys.OpenFile(path, os.O_RDWR|syscall.O_DIRECT, filePerm)
	if err == nil {
		if _, err = f.WriteAt(first, 0); err == nil {
			_, err = f.ReadAt(alignedBytes(len(first)), 0)
		}
		if err == nil {
			return f, nil
		}
		_ = f.Close()
	}
	return fsys.OpenFile(path, os.O_RDWR, filePerm)
}

// readBlocks gives the first n bytes of f, or what can be read of them, in pieces: a disk
// may give nothing of one that has a bad sector.
func readBlocks(f File, n, block int) ([]byte, error) {
	const piece = 16 // blocks
	b := alignedBytes(roundUp(n, block))
	for got := 0; got < n; {
		end := min(got+piece*block, len(b))
		m, err := f.ReadAt(b[got:end], int64(got))
		if got += m; got < min(end, n) {
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return b[:got], err
		}
	}
	return b[:n], nil
}

// alignedBytes gives n bytes that begin at a multiple of [ioBlock].
func alignedBytes(n int) []byte {
	b := make([]byte, n+ioBlock)
	// The collector does not move what it has once given out (runtime/mgc.go).
	off := -int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) & (ioBlock - 1)
	return b[off : off+n : off+n]
}

func roundUp(n, block int) int { return (n + block - 1) / block * block }

// fill makes b empty lines.
func fill(b []byte) {
	for i := range b {
		b[i] = '\n'
	}
}
