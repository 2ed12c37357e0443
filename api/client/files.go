package client

import (
	"context"
	"errors"
	"io"
	"net/url"
	"time"

	"connectrpc.com/connect"

	fs "soulbox.dev/soulbox/api/envd/spec/filesystem"
	"soulbox.dev/soulbox/api/envd/spec/filesystem/filesystemconnect"
	"soulbox.dev/soulbox/internal/names"
)

func (c *Client) envd(sandbox string) string {
	return c.base.JoinPath("v1", "sandboxes", sandbox, "envd").String()
}

// uncompressed asks for no compression, which would be slower than any network that this is used on.
var uncompressed = connect.WithAcceptCompression("gzip", nil, nil)

func (c *Client) files(sandbox string) filesystemconnect.FilesystemClient {
	return filesystemconnect.NewFilesystemClient(c.plain, c.envd(sandbox), uncompressed)
}

// withNames makes a request whose names, and those of its answer, are in the notation of package names.
func withNames[T any](msg *T) *connect.Request[T] {
	req := connect.NewRequest(msg)
	req.Header().Set(NamesHeader, "shown")
	return req
}

// File is a file of a sandbox.
type File struct {
	Path     string
	Dir      bool
	Size     int64
	Mode     uint32
	Modified time.Time
}

// Stat describes a file. A path that does not begin with / is below the user's home.
func (c *Client) Stat(ctx context.Context, sandbox, path string) (File, error) {
	res, err := c.files(sandbox).Stat(ctx, withNames(&fs.StatRequest{Path: names.Show(path)}))
	if err != nil {
		return File{}, c.plainError(err)
	}
	e := res.Msg.GetEntry()
	return File{Path: names.Parse(e.GetPath()), Dir: e.GetType() == fs.FileType_FILE_TYPE_DIRECTORY, Size: e.GetSize(), Mode: e.GetMode(),
		Modified: e.GetModifiedTime().AsTime()}, nil
}

// Names lists the names in a directory of a sandbox; those of directories end in a slash.
func (c *Client) Names(ctx context.Context, sandbox, dir string) (all []string, err error) {
	res, err := c.files(sandbox).ListDir(ctx, withNames(&fs.ListDirRequest{Path: names.Show(dir), Depth: 1}))
	if err != nil {
		return nil, c.plainError(err)
	}
	for _, e := range res.Msg.GetEntries() {
		name := names.Parse(e.GetName())
		if e.GetType() == fs.FileType_FILE_TYPE_DIRECTORY {
			name += "/"
		}
		all = append(all, name)
	}
	return all, nil
}

// Download opens a file of a sandbox. The caller closes it.
func (c *Client) Download(ctx context.Context, sandbox, path string) (io.ReadCloser, error) {
	res, err := c.send(ctx, "GET", "/v1/sandboxes/"+url.PathEscape(sandbox)+"/envd/files", url.Values{"path": {path}}, "", nil)
	if err != nil {
		return nil, err
	}
	return res.Body, nil
}

// Upload writes a file of a sandbox and makes the directories above it.
func (c *Client) Upload(ctx context.Context, sandbox, path string, from io.Reader) error {
	res, err := c.send(ctx, "POST", "/v1/sandboxes/"+url.PathEscape(sandbox)+"/envd/files", url.Values{"path": {path}},
		"application/octet-stream", from)
	if err != nil {
		return err
	}
	return res.Body.Close()
}

// Event is a change of a file: create, write, remove, rename or chmod.
type Event struct {
	Op   string
	Name string // below the directory
}

var ops = map[fs.EventType]string{fs.EventType_EVENT_TYPE_CREATE: "create", fs.EventType_EVENT_TYPE_WRITE: "write",
	fs.EventType_EVENT_TYPE_REMOVE: "remove",
	fs.EventType_EVENT_TYPE_RENAME: "rename", fs.EventType_EVENT_TYPE_CHMOD: "chmod"}

// Watch calls each for every change in a directory until ctx ends. It calls began once the watch is active.
func (c *Client) Watch(ctx context.Context, sandbox, dir string, recursive bool, began func(), each func(Event) error) error {
	stream, err := c.files(sandbox).WatchDir(ctx, withNames(&fs.WatchDirRequest{Path: names.Show(dir), Recursive: recursive}))
	if err != nil {
		return c.plainError(err)
	}
	defer stream.Close()
	for stream.Receive() {
		switch e := stream.Msg().GetEvent().(type) {
		case *fs.WatchDirResponse_Start:
			began()
		case *fs.WatchDirResponse_Filesystem:
			if err := each(Event{ops[e.Filesystem.GetType()], names.Parse(e.Filesystem.GetName())}); err != nil {
				return err
			}
		}
	}
	if err := stream.Err(); err != nil {
		return c.plainError(err)
	}
	return io.ErrUnexpectedEOF
}

// statuses maps Connect's codes to HTTP statuses.
var statuses = map[connect.Code]int{connect.CodeNotFound: 404, connect.CodeUnimplemented: 404, connect.CodeInvalidArgument: 400,
	connect.CodeUnauthenticated: 401, connect.CodePermissionDenied: 403,
	connect.CodeAlreadyExists: 409, connect.CodeFailedPrecondition: 409, connect.CodeResourceExhausted: 429,
	connect.CodeDeadlineExceeded: 504, connect.CodeInternal: 500, connect.CodeDataLoss: 500}

// plainError turns a server's refusal into an Error. It keeps an error that does not come from the server.
func (c *Client) plainError(err error) error {
	var ce *connect.Error
	if !errors.As(err, &ce) || !connect.IsWireError(err) {
		var ue *url.Error
		if errors.As(err, &ue) {
			return ue.Err
		}
		return err
	}
	status := statuses[ce.Code()]
	if status == 0 {
		status = 502
	}
	return refusal(status, ce.Message())
}
