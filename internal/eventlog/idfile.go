package eventlog

import (
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"os"
	"sort"
)

// endOfIDs gives where the newest entry of at most upTo ends in a file of ids.
func endOfIDs(f File, size int64, upTo uint64) (int64, error) {
	const longest = 2*idWindow*idEntry + maxBuffered // what is behind it is not ours
	data, err := risingIDs(f, 0, min(size, longest))
	n := sort.Search(len(data)/idEntry, func(i int) bool {
		return binary.BigEndian.Uint64(data[i*idEntry+idHash:]) > upTo
	})
	return int64(n * idEntry), err
}

// read gives the newest n entries of a VM's file; no file has none.
func (x *idIndex) read(vm string, n int) ([]byte, error) {
	f, err := openOwn(x.fs, x.path(vm), os.O_RDONLY, x.aside)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // opened for reading
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	return risingIDs(f, max(0, size-size%idEntry-int64(n*idEntry)), size)
}

// risingIDs gives the whole entries from an offset on whose numbers rise: a
// power cut may leave anything behind the last one that was synced.
func risingIDs(f File, off, size int64) ([]byte, error) {
	data := make([]byte, (size-off)-(size-off)%idEntry)
	if n, err := f.ReadAt(data, off); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	} else if n < len(data) {
		data = data[:n-n%idEntry]
	}
	last := uint64(0)
	for off := 0; off < len(data); off += idEntry {
		seq := binary.BigEndian.Uint64(data[off+idHash:])
		if seq <= last {
			return data[:off], nil
		}
		last = seq
	}
	return data, nil
}
