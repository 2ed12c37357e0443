package template

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"

	"soulbox.dev/soulbox/access"
)

// maxWindow is how far back compressed data may refer, in bytes: the decoder keeps that much in memory. It is what xz -9 needs.
const maxWindow = 64 << 20

// errWindow means that compressed data refers back too far.
var errWindow = errors.New("it is compressed with a window")

// uncompressed reads an archive with any known compression. Until it is closed, the payer's account is charged for the decoder's work and
// memory.
func uncompressed(ctx context.Context, p payer, from io.Reader) (io.ReadCloser, error) {
	r := bufio.NewReaderSize(from, 64<<10)
	head, err := r.Peek(6)
	if err != nil && err != io.EOF {
		return nil, err
	}
	var open func(*charge) (io.Reader, error)
	switch {
	case bytes.HasPrefix(head, []byte("\x1f\x8b")):
		open = func(*charge) (io.Reader, error) { return gzip.NewReader(r) }
	case bytes.HasPrefix(head, []byte("BZh")):
		open = func(*charge) (io.Reader, error) { return bzip2.NewReader(r), nil }
	case bytes.HasPrefix(head, []byte("\xfd7zXZ\x00")):
		open = func(c *charge) (io.Reader, error) {
			return xz.ReaderConfig{DictCap: lzma.MinDictCap}.NewReader(&xzReader{from: r, window: c.window})
		}
	case bytes.HasPrefix(head, []byte("\x28\xb5\x2f\xfd")):
		open = func(c *charge) (io.Reader, error) { return c.zstd(r) }
	default:
		return io.NopCloser(r), nil
	}
	c := &charge{ctx: ctx, payer: p}
	free, err := p.wait(ctx, access.Work, 1)
	if err != nil {
		return nil, err
	}
	c.free = append(c.free, free)
	plain, err := open(c)
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return readCloser{plain, c.Close}, nil
}

// charge is what a decoder has taken from its payer's account. It lives as long as the one read that it serves.
type charge struct {
	ctx context.Context
	payer
	taken int64 // bytes of the window
	free  []func()
}

// window takes memory for a window before it is allocated. It refuses a window larger than maxWindow.
func (c *charge) window(n int64) error {
	if n > maxWindow {
		return fmt.Errorf("%w of %d MB, at most %d MB are possible; compress it with a smaller one, such as by xz -6 or zstd -19",
			errWindow, n>>20, maxWindow>>20)
	}
	if n <= c.taken {
		return nil
	}
	free, err := c.wait(c.ctx, access.Buffers, n-c.taken)
	if err != nil {
		return err
	}
	c.taken, c.free = n, append(c.free, free)
	return nil
}

// zstd opens zstd data. Each frame names its own window, so the largest possible one is charged.
func (c *charge) zstd(r io.Reader) (io.Reader, error) {
	if err := c.window(maxWindow); err != nil {
		return nil, err
	}
	z, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, err
	}
	c.free = append(c.free, z.Close)
	return z, nil
}

// Close returns everything to the account.
func (c *charge) Close() error {
	for _, free := range c.free {
		free()
	}
	return nil
}
