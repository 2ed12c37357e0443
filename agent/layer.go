package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
)

// Whiteout begins the name of a layer's entry that says that a file is gone (OCI image specification, layers).
const Whiteout = ".wh."

const (
	ModeMark = "mark" // of Changes: remember what there is, and send nothing
	ModeAll  = "all"  // send all, and remember nothing
	// BuildDir holds what a build needs in its sandbox; like the agent's own files it is never part of a layer.
	BuildDir = "/.soulbox-build"
)

// MarkFiles makes the agent remember the state of the sandbox's files, for Changes. Mounted directories are not included.
func (c *Client) MarkFiles(ctx context.Context) error {
	r, err := c.ChangesOf(ctx, "/", ModeMark)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, r)
	return errors.Join(err, r.Close())
}

// Changes returns a layer in the sense of the OCI image specification: a tar of the changes since MarkFiles, or since the last Changes that
// was read to its end. The caller must close the reader; reads fail when ctx ends. The content comes from the guest and must not be
// trusted.
func (c *Client) Changes(ctx context.Context) (io.ReadCloser, error) {
	return c.ChangesOf(ctx, "/", "")
}

// Pack returns a tar of everything in a directory, with names relative to it. What is mounted there is left out. Otherwise it is like
// Changes.
func (c *Client) Pack(ctx context.Context, dir string) (io.ReadCloser, error) {
	return c.ChangesOf(ctx, dir, ModeAll)
}

// ChangesOf returns the tar of the directory root; mode is "" for Changes, ModeMark or ModeAll.
func (c *Client) ChangesOf(ctx context.Context, root, mode string) (io.ReadCloser, error) {
	stream, _, end, err := c.begin(ctx, Header{Stream: StreamChanges, Path: root, Mode: mode})
	if err != nil {
		return nil, err
	}
	return &streamReader{Reader: &ChunkReader{R: stream}, end: end}, nil
}

// Unpack unpacks a tar into a directory of the sandbox, as root. Names in the tar cannot lead out of the directory, but existing symlinks
// in it can. If Unpack fails, what it has unpacked stays.
func (c *Client) Unpack(ctx context.Context, dir string, r io.Reader) error {
	stream, _, end, err := c.begin(ctx, Header{Stream: StreamUnpack, Path: dir})
	if err != nil {
		return err
	}
	defer end()
	answered := awaitAnswer(stream.Stream)
	src := &SourceReader{R: r}
	if _, err := WriteChunks(stream, src); err == nil {
		_ = EndChunks(stream, Answer{}) // the answer below tells of a failure
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

// IsWhiteout reports whether a name in a layer is a whiteout, and returns the path that is gone. opaque means that everything in its
// directory is gone.
func IsWhiteout(name string) (gone string, opaque, ok bool) {
	dir, base := path.Split(name)
	rest, ok := strings.CutPrefix(base, Whiteout)
	return dir + rest, rest == Whiteout+".opq", ok
}
