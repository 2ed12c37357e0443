package agent

import (
	"encoding/binary"
	"fmt"
	"io"
)

// WriteChunks copies r to w as chunks, without the end mark.
func WriteChunks(w io.Writer, r io.Reader) (int64, error) {
	buf := make([]byte, 4+64<<10)
	var total int64
	for {
		n, err := r.Read(buf[4:])
		if n > 0 {
			binary.BigEndian.PutUint32(buf, uint32(n))
			if _, werr := w.Write(buf[:4+n]); werr != nil {
				return total, werr
			}
			total += int64(n)
		}
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// EndChunks ends a sequence of chunks with trailer.
func EndChunks(w io.Writer, trailer any) error {
	if _, err := w.Write([]byte{0, 0, 0, 0}); err != nil {
		return err
	}
	return WriteMessage(w, trailer)
}

// ChunkReader reads chunks up to their end; then it decodes the trailer and returns its error, if there is one.
type ChunkReader struct {
	R    io.Reader
	left uint32
	err  error
}

// Read implements io.Reader.
func (c *ChunkReader) Read(p []byte) (int, error) {
	if c.err != nil {
		return 0, c.err
	}
	if c.left == 0 {
		var size [4]byte
		if _, err := io.ReadFull(c.R, size[:]); err != nil {
			c.err = cutOff(err)
			return 0, c.err
		}
		c.left = binary.BigEndian.Uint32(size[:])
		switch {
		case c.left > maxChunk:
			c.err = fmt.Errorf("chunk of %d bytes, allowed are %d: %w", c.left, maxChunk, ErrTooLarge)
			return 0, c.err
		case c.left == 0:
			var end Answer
			c.err = io.EOF
			if err := ReadMessage(c.R, &end); err != nil {
				c.err = cutOff(err)
			} else if end.Error != nil {
				c.err = end.Error
			}
			return 0, c.err
		}
	}
	n, err := c.R.Read(p[:min(len(p), int(c.left))])
	c.left -= uint32(n)
	if err != nil {
		c.err = cutOff(err)
		err = c.err
	}
	return n, err
}
