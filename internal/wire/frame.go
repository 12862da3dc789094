package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

const prefixLen = 4 // a frame's length, big-endian

// NextFrame takes the first frame off buf. The frame aliases buf. While buf does
// not hold a whole one, frame is nil and rest is buf. A length outside 1 to
// MaxFrame is an ErrFrameSize as soon as its four bytes are there, so that a
// peer cannot make its reader wait for a frame that is refused anyhow.
func NextFrame(buf []byte) (frame, rest []byte, err error) {
	if len(buf) < prefixLen {
		return nil, buf, nil
	}
	n := binary.BigEndian.Uint32(buf)
	if n == 0 || n > MaxFrame {
		return nil, buf, fmt.Errorf("%w: %d", ErrFrameSize, n)
	}
	end := prefixLen + int(n)
	if len(buf) < end {
		return nil, buf, nil
	}
	return buf[prefixLen:end:end], buf[end:], nil
}

// ReadFrame reads one frame from r into buf, which it grows to the frame's size
// where that is needed, and returns it: pass the last frame as the next buf. At
// the end of the stream it returns io.EOF between frames and ErrIncomplete
// within one.
func ReadFrame(r io.Reader, buf []byte) ([]byte, error) {
	buf = slices.Grow(buf[:0], prefixLen)[:prefixLen]
	if _, err := io.ReadFull(r, buf); err != nil {
		return nil, readError("length", err)
	}
	n := binary.BigEndian.Uint32(buf)
	if n == 0 || n > MaxFrame {
		return nil, fmt.Errorf("%w: %d", ErrFrameSize, n)
	}
	if cap(buf) < int(n) {
		buf = make([]byte, n)
	}
	buf = buf[:n]
	if _, err := io.ReadFull(r, buf); err != nil {
		if err == io.EOF { // not one byte of the body: still within the frame
			err = io.ErrUnexpectedEOF
		}
		return nil, readError("body", err)
	}
	return buf, nil
}

func readError(part string, err error) error {
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("reading a frame's %s: %w", part, ErrIncomplete)
	case errors.Is(err, io.EOF):
		return io.EOF
	}
	return fmt.Errorf("reading a frame's %s: %w", part, err)
}

// AppendFrame appends body, 1 to MaxFrame bytes, as a frame.
func AppendFrame(dst, body []byte) []byte {
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(body)))
	return append(dst, body...)
}

// BeginFrame reserves room for a frame's length at the end of dst. The caller
// appends the body, 1 to MaxFrame bytes, and gives the mark to EndFrame.
func BeginFrame(dst []byte) (buf []byte, mark int) {
	return append(dst, 0, 0, 0, 0), len(dst)
}

// EndFrame makes everything behind BeginFrame's mark a frame.
func EndFrame(dst []byte, mark int) {
	binary.BigEndian.PutUint32(dst[mark:], uint32(len(dst)-mark-prefixLen))
}
