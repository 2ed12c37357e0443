package template

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"strings"

	"github.com/klauspost/compress/gzip"

	"soulbox.dev/soulbox/agent"
)

// Media types of the layers that can be read.
const (
	mediaTar  = "application/vnd.oci.image.layer.v1.tar"
	mediaGzip = mediaTar + "+gzip"
	mediaZstd = mediaTar + "+zstd"
)

// newLayer stores a tar of at most limit bytes as a layer.
func (j *job) newLayer(ctx context.Context, from io.Reader, limit int64, createdBy string) (Layer, error) {
	l := Layer{MediaType: mediaGzip, CreatedBy: createdBy}
	whole, inner := sha256.New(), sha256.New()
	body := io.TeeReader(j.whileSpace(atMost(&untilDone{ctx, from}, limit)), inner)
	err := j.write(ctx, "layers", func(f *os.File) (string, error) {
		if err := compress(io.MultiWriter(f, whole), body); err != nil {
			return "", err
		}
		l.Digest, l.DiffID = digestOf(whole), digestOf(inner)
		info, err := f.Stat()
		if err == nil {
			l.Size = info.Size()
		}
		return j.layerFile(l.Digest), err
	})
	return l, err
}

func compress(to io.Writer, from io.Reader) error {
	out, err := gzip.NewWriterLevel(to, gzip.BestSpeed)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, from)
	return errors.Join(err, out.Close())
}

func digestOf(h hash.Hash) string { return "sha256:" + hex.EncodeToString(h.Sum(nil)) }

func (s *Store) layerFile(digest string) string {
	return s.file("layers", strings.TrimPrefix(digest, "sha256:"))
}

// open opens the tar of a layer.
func (s *Store) open(ctx context.Context, p payer, l Layer) (io.ReadCloser, error) {
	f, err := os.Open(s.layerFile(l.Digest))
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", l.Digest, err)
	}
	r, err := decompress(ctx, p, f, l.MediaType)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("layer %s: %w", l.Digest, err), f.Close())
	}
	return r, nil
}

type readCloser struct {
	io.Reader
	close func() error
}

// Close implements io.Closer.
func (r readCloser) Close() error { return r.close() }

// decompress reads the content of a layer's file according to its media type, also Docker's. Closing the result closes f. The payer's
// account is charged for the decoder's memory.
func decompress(ctx context.Context, p payer, f io.ReadCloser, mediaType string) (io.ReadCloser, error) {
	switch {
	case strings.HasSuffix(mediaType, "gzip"):
		r, err := gzip.NewReader(f)
		if err != nil {
			return nil, err
		}
		return readCloser{r, func() error { return errors.Join(r.Close(), f.Close()) }}, nil
	case strings.HasSuffix(mediaType, "zstd"):
		c := &charge{ctx: ctx, payer: p}
		r, err := c.zstd(f)
		if err != nil {
			return nil, errors.Join(err, c.Close())
		}
		return readCloser{r, func() error { return errors.Join(c.Close(), f.Close()) }}, nil
	case strings.HasSuffix(mediaType, ".tar"):
		return f, nil
	}
	return nil, fmt.Errorf("%w: its media type %q cannot be read", ErrLayer, mediaType)
}

// atMost fails if there are more than left bytes to read.
func atMost(r io.Reader, left int64) io.Reader {
	return &agent.AtMost{R: r, Left: left, Err: fmt.Errorf("%w: its files are too large", ErrLayer)}
}

// untilDone reads until ctx ends.
type untilDone struct {
	ctx context.Context
	r   io.Reader
}

// Read implements io.Reader.
func (u *untilDone) Read(p []byte) (int, error) {
	if u.ctx.Err() != nil {
		return 0, context.Cause(u.ctx)
	}
	return u.r.Read(p)
}

// layerSlack is how many bytes a layer may have in addition to its files.
const layerSlack = 1 << 30
