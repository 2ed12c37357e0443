package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
)

// Whiteout begins the name of what a layer says is gone (OCI image specification, layers).
const Whiteout = ".wh."

const (
	ModeMark = "mark"
	ModeAll  = "all"
	// BuildDir is for what a build needs in its sandbox, and is no part of the files either.
	BuildDir = "/.soulbox-build"
)

// MarkFiles has the sandbox remember what its files are like, for Changes. Files of mounts do not count.
func (c *Client) MarkFiles(ctx context.Context) error {
	r, err := c.ChangesOf(ctx, "/", ModeMark)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, r)
	return errors.Join(err, r.Close())
}

// Changes gives a layer, as the OCI image specification has it: a tar of what has changed since MarkFiles, or since the last Changes that
// was read to its end. The reader must be closed, and reads fail when ctx ends. It is the guest's, whatever it says.
func (c *Client) Changes(ctx context.Context) (io.ReadCloser, error) {
	return c.ChangesOf(ctx, "/", "")
}

// Pack gives all that is in a directory as a tar, with names below it. What is mounted there is left out. Else it is as Changes.
func (c *Client) Pack(ctx context.Context, dir string) (io.ReadCloser, error) {
	return c.ChangesOf(ctx, dir, ModeAll)
}

func (c *Client) ChangesOf(ctx context.Context, root, mode string) (io.ReadCloser, error) {
	stream, _, end, err := c.begin(ctx, Header{Stream: StreamChanges, Path: root, Mode: mode})
	if err != nil {
		return nil, err
	}
	return &streamReader{Reader: &ChunkReader{R: stream}, end: end}, nil
}

// Unpack unpacks a tar in a directory of the sandbox, as root. Names cannot lead out of the directory, links that are there already can.
// What is unpacked when it fails stays.
func (c *Client) Unpack(ctx context.Context, dir string, r io.Reader) error {
	stream, _, end, err := c.begin(ctx, Header{Stream: StreamUnpack, Path: dir})
	if err != nil {
		return err
	}
	defer end()
	answered := awaitAnswer(stream)
	src := &SourceReader{R: r}
	if _, err := WriteChunks(stream, src); err == nil {
		_ = EndChunks(stream, Answer{}) // a failure shows in the answer below
	} else if src.Err != nil {
		return src.Err
	}
	a, err := answered()
	if err != nil {
		return c.streamError(ctx, StreamUnpack, err)
	}
	if a.Error != nil {
		return fmt.Errorf("unpack: %w", a.Error)
	}
	return nil
}

// IsWhiteout says whether a name in a layer is of something that is gone, and of what; opaque is all that was in its directory.
func IsWhiteout(name string) (gone string, opaque, ok bool) {
	dir, base := path.Split(name)
	rest, ok := strings.CutPrefix(base, Whiteout)
	return dir + rest, rest == Whiteout+".opq", ok
}
