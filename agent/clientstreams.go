package agent

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/hashicorp/yamux"
)

// ReadFile reads limit bytes of a regular file from offset; limit < 0 reads to the end. The caller must close the reader; reads fail when
// ctx ends.
func (c *Client) ReadFile(ctx context.Context, path string, offset, limit int64) (io.ReadCloser, FileInfo, error) {
	stream, a, end, err := c.begin(ctx, Header{Stream: StreamRead, Path: path, Offset: offset, Limit: limit})
	if err != nil {
		return nil, FileInfo{}, err
	}
	if a.Info == nil {
		end()
		return nil, FileInfo{}, c.lost(StreamRead, errors.New("answer without info"))
	}
	body := io.Reader(&ChunkReader{R: stream})
	if limit >= 0 {
		body = &AtMost{R: body, Left: limit, Err: fmt.Errorf("read: the guest sent more than was asked for: %w", ErrLost)}
	}
	return &streamReader{Reader: body, end: end}, *a.Info, nil
}

// AtMost reads from R, and fails with Err if there are more than Left bytes, where io.LimitReader would take what is cut off for whole.
type AtMost struct {
	R    io.Reader
	Left int64
	Err  error
}

// Read implements io.Reader.
func (a *AtMost) Read(p []byte) (int, error) {
	n, err := a.R.Read(p)
	if a.Left -= int64(n); a.Left < 0 {
		return 0, a.Err
	}
	return n, err
}

type streamReader struct {
	io.Reader
	end func()
}

// Close implements io.Closer.
func (r *streamReader) Close() error {
	r.end()
	return nil
}

// Modes of WriteFile.
const (
	ModeReplace = "replace" // atomic: readers see the old or the new file, never a part
	ModeAppend  = "append"
	ModeCreate  = "create" // an existing file is an error (fs.ErrExist)
)

// WriteOptions say how WriteFile writes.
type WriteOptions struct {
	Mode   string // default ModeReplace
	User   string // owner of what is created; default the sandbox's user
	Perm   uint32 // of a new file; default 0644
	NoDirs bool   // a missing parent directory is an error
	// Attrs become the user.* extended attributes of the file; nil keeps the existing ones. With AttrsBelow they replace only the
	// attributes whose names begin with it.
	Attrs      map[string]string
	AttrsBelow string
}

// WriteFile writes everything from r to a file.
func (c *Client) WriteFile(ctx context.Context, path string, r io.Reader, o WriteOptions) (FileInfo, error) {
	stream, _, end, err := c.begin(ctx, Header{Stream: StreamWrite, Path: path, Mode: o.Mode, User: o.User, Perm: o.Perm,
		Parents: !o.NoDirs, Attrs: o.Attrs, AttrsBelow: o.AttrsBelow})
	if err != nil {
		return FileInfo{}, err
	}
	defer end()
	answered := awaitAnswer(stream.Stream)
	src := &SourceReader{R: r}
	if _, err := WriteChunks(stream, src); err == nil {
		_ = EndChunks(stream, Answer{}) // the answer below tells of a failure
	} else if src.Err != nil {
		return FileInfo{}, src.Err // without the end of the chunks, nothing of the file becomes visible
	}
	a, err := answered()
	if err != nil {
		return FileInfo{}, c.streamError(ctx, StreamWrite, err)
	}
	if a.Error != nil {
		return FileInfo{}, a.Error
	}
	if a.Info == nil {
		return FileInfo{}, c.lost(StreamWrite, errors.New("answer without info"))
	}
	return *a.Info, nil
}

// awaitAnswer reads the guest's second answer while we write. An early answer means that the guest needs no more data, so it also ends the
// writing.
func awaitAnswer(stream *yamux.Stream) (answered func() (Answer, error)) {
	var a Answer
	done := make(chan error, 1)
	go func() {
		err := ReadMessage(stream, &a)
		_ = stream.SetWriteDeadline(time.Unix(1, 0))
		done <- err
	}()
	return func() (Answer, error) {
		err := <-done
		return a, err
	}
}

// SourceReader remembers the error of the caller's reader, to tell it from an error of the stream.
type SourceReader struct {
	R   io.Reader
	Err error
}

// Read implements io.Reader.
func (s *SourceReader) Read(p []byte) (int, error) {
	n, err := s.R.Read(p)
	if err != nil && err != io.EOF {
		s.Err = err
	}
	return n, err
}

// WriteStdin writes to a process that was started with KeepStdin, and closes its stdin if eof is set. It blocks while the process does not
// read; when ctx ends, written is the number of bytes written until then.
func (c *Client) WriteStdin(ctx context.Context, process string, input []byte, eof bool) (written int64, err error) {
	for {
		part := input[:min(len(input), MaxStdin)]
		input = input[len(part):]
		n, err := c.writeStdin(ctx, process, part, eof && len(input) == 0)
		written += n
		if err != nil || len(input) == 0 {
			return written, err
		}
	}
}

func (c *Client) writeStdin(ctx context.Context, process string, input []byte, eof bool) (int64, error) {
	stream, _, end, err := c.handshake(ctx, Header{Stream: StreamStdin, Process: process, Size: int64(len(input)), EOF: eof})
	if err != nil {
		return 0, err
	}
	defer end()
	// When ctx ends, we close our half; the guest then gives up and still reports how much was written.
	stop := context.AfterFunc(ctx, func() {
		_ = stream.SetWriteDeadline(time.Unix(1, 0))
		_ = stream.Close()
		_ = stream.SetReadDeadline(time.Now().Add(2 * time.Second))
	})
	defer stop()
	answered := awaitAnswer(stream.Stream)
	_, _ = io.Copy(stream, bytes.NewReader(input)) // the answer below tells of a failure
	a, err := answered()
	if err != nil {
		return 0, c.streamError(ctx, StreamStdin, err)
	}
	if ctx.Err() != nil {
		return a.Written, context.Cause(ctx)
	}
	if a.Error != nil {
		return a.Written, a.Error
	}
	return a.Written, nil
}

// OutputFrame is some output of a process. The last frame has End set and no bytes.
type OutputFrame struct {
	Stream string // "stdout" or "stderr"
	Offset int64
	Data   []byte
	End    *Process
}

// Output replays the output of a process from offset and, with follow, continues until no process can write to it any more. It calls each
// for every frame, and returns when each fails.
func (c *Client) Output(ctx context.Context, process string, offset int64, follow bool, each func(OutputFrame) error) error {
	return c.output(ctx, Header{Stream: StreamOutput, Process: process, Offset: offset, Follow: follow}, each)
}

// Follow is Output for a caller that needs all output: if the caller does not keep up, the process blocks, as at a pipe.
func (c *Client) Follow(ctx context.Context, process string, offset int64, each func(OutputFrame) error) error {
	return c.output(ctx, Header{Stream: StreamOutput, Process: process, Offset: offset, Follow: true, Hold: true}, each)
}

func (c *Client) output(ctx context.Context, h Header, each func(OutputFrame) error) error {
	stream, _, end, err := c.begin(ctx, h)
	if err != nil {
		return err
	}
	defer end()
	for {
		kind, at, body, err := ReadFrame(stream)
		if err != nil {
			return c.streamError(ctx, StreamOutput, err)
		}
		frame := OutputFrame{Offset: at, Data: body, Stream: StreamName(kind - FrameStdout)}
		if kind == FrameEnd {
			frame = OutputFrame{Offset: at, End: &Process{}}
			if err := Unmarshal(body, frame.End); err != nil {
				return c.lost(StreamOutput, err)
			}
		}
		if err := each(frame); err != nil || kind == FrameEnd {
			return err
		}
	}
}

// Dial connects to a socket in the sandbox: "tcp" on its loopback, or "unix". Close of the result closes only the writing half; reads
// continue until the other side has closed too, or until ctx ends, which also ends the connection in the sandbox.
func (c *Client) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	name := rand.Text()
	stream, _, _, err := c.begin(ctx, Header{Stream: StreamDial, Network: network, Address: address, Dial: name})
	if err != nil {
		return nil, err
	}
	context.AfterFunc(ctx, func() {
		// Closing a stream says only that we write no more: the guest would still send what the socket gives while there is room for it.
		_ = c.rpc.Notify(context.Background(), NoteHangUp, map[string]string{"dial": name}) // an error means that the guest is gone
	})
	return stream, nil
}

// Watch calls each with the changes in a directory, or of a file, until ctx ends or each fails. After it has called started, no change is
// missed. If the agent cannot see the changes any more, the error is its own, such as ErrNoWatch.
func (c *Client) Watch(ctx context.Context, path string, started func(), each func(WatchBatch) error) error {
	stream, _, end, err := c.begin(ctx, Header{Stream: StreamWatch, Path: path})
	if err != nil {
		return err
	}
	defer end()
	started()
	for {
		var batch WatchBatch
		if err := ReadMessage(stream, &batch); err != nil {
			return c.streamError(ctx, StreamWatch, err)
		}
		if len(batch.Events) > MaxWatchEvents {
			return c.lost(StreamWatch, errors.New("too many events"))
		}
		if batch.Error == nil || batch.Overflow || len(batch.Events) > 0 {
			if err := each(batch); err != nil {
				return err
			}
		}
		if batch.Error != nil {
			return batch.Error
		}
	}
}
