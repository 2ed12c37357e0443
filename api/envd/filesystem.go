package envd

import (
	"context"
	"errors"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"soulbox.dev/soulbox/agent"
	pb "soulbox.dev/soulbox/api/envd/spec/filesystem"
	"soulbox.dev/soulbox/internal/names"
)

// metadataPrefix begins the names of the extended attributes that clients set and see as metadata.
const metadataPrefix = "e2b."

// Bounds of listings, which are built in memory.
const (
	maxListed   = 100_000  // entries of one listing
	maxListing  = 16 << 20 // bytes of the names in one listing
	maxListings = 8        // at once
)

// files implements the service filesystem.Filesystem.
type files struct{ *Server }

// absolute returns the path that the agent takes. A relative path is below the user's directory, and ~ is the user's home.
func (p *scope) absolute(ctx context.Context, name, who string) (string, error) {
	if strings.IndexByte(name, 0) >= 0 {
		return "", errorf(connect.CodeInvalidArgument, "the path has a NUL byte")
	}
	if path.IsAbs(name) && who == "" {
		return path.Clean(name), nil
	}
	u, err := p.client.User(ctx, who)
	if errors.Is(err, agent.ErrNoUser) {
		return "", errorf(connect.CodeUnauthenticated, "invalid username: '%s'", who)
	}
	if err != nil {
		return "", err
	}
	below, home := strings.CutPrefix(name, "~")
	switch {
	case path.IsAbs(name):
		return path.Clean(name), nil
	case home && below != "" && below[0] != '/':
		return "", errorf(connect.CodeInvalidArgument, "%q: only one's own home can be named by ~", name)
	case home:
		return path.Join(u.Home, below), nil
	}
	return path.Join(u.Cwd, name), nil
}

// asked returns the absolute path of a call and its user.
func asked(ctx context.Context, req connect.AnyRequest, name string) (p *scope, file, who string, err error) {
	p = scopeOf(ctx)
	if who, err = user(req.Header()); err == nil {
		file, err = p.absolute(ctx, p.decodeName(name), who)
	}
	return p, file, who, err
}

// decodeName decodes a name from a client.
func (p *scope) decodeName(name string) string {
	if p.shown {
		return names.Parse(name)
	}
	return name
}

// encodeName encodes a name for a client. Strings of protocol buffers must be valid UTF-8.
func (p *scope) encodeName(name string) string {
	if p.shown {
		return names.Show(name)
	}
	return valid(name)
}

// entry describes a file for clients.
func (p *scope) entry(f agent.FileInfo) *pb.EntryInfo {
	e := &pb.EntryInfo{Name: p.encodeName(path.Base(f.Path)), Type: typeOf(f.Type), Path: p.encodeName(f.Path), Size: f.Size,
		Mode: modeOf(f.Mode), Owner: f.Owner, Group: f.Group, ModifiedTime: timestamppb.New(f.MTime)}
	if f.Link != nil {
		e.Permissions = f.Link.Permissions
		if f.Type == agent.TypeSymlink {
			e.Type = typeOf(f.Link.Type)
		}
		if f.Link.Target != "" {
			target := p.encodeName(f.Link.Target)
			e.SymlinkTarget, e.Mode = &target, modeOf(f.Link.Mode)
		}
	}
	for k, v := range f.Attrs {
		if key, ok := strings.CutPrefix(k, metadataPrefix); ok {
			if e.Metadata == nil {
				e.Metadata = map[string]string{}
			}
			e.Metadata[valid(key)] = valid(v)
		}
	}
	return e
}

func typeOf(t string) pb.FileType {
	switch t {
	case agent.TypeFile:
		return pb.FileType_FILE_TYPE_FILE
	case agent.TypeDir:
		return pb.FileType_FILE_TYPE_DIRECTORY
	}
	return pb.FileType_FILE_TYPE_UNSPECIFIED
}

// modeOf returns the permission bits of a mode.
func modeOf(octal string) uint32 {
	n, err := strconv.ParseUint(octal, 8, 32)
	if err != nil {
		return 0
	}
	return uint32(n) & 0o777
}

// stat describes a file.
func (p *scope) stat(ctx context.Context, file string) (*pb.EntryInfo, error) {
	info, err := p.client.Lstat(ctx, file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errorf(connect.CodeNotFound, "path '%s' does not exist", file)
	}
	if err != nil {
		return nil, err
	}
	return p.entry(info), nil
}

// Stat implements filesystemconnect.FilesystemHandler.
func (files) Stat(ctx context.Context, req *connect.Request[pb.StatRequest]) (*connect.Response[pb.StatResponse], error) {
	p, file, _, err := asked(ctx, req, req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	e, err := p.stat(ctx, file)
	return connect.NewResponse(&pb.StatResponse{Entry: e}), err
}

// MakeDir implements filesystemconnect.FilesystemHandler.
func (files) MakeDir(ctx context.Context, req *connect.Request[pb.MakeDirRequest]) (*connect.Response[pb.MakeDirResponse], error) {
	p, dir, who, err := asked(ctx, req, req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	_, err = p.client.Mkdir(ctx, agent.PathRequest{Path: dir, User: who})
	if errors.Is(err, fs.ErrExist) {
		if old, serr := p.client.Stat(ctx, dir); serr == nil && old.Type != agent.TypeDir {
			return nil, errorf(connect.CodeInvalidArgument, "path already exists but it is not a directory: %s", dir)
		}
		return nil, errorf(connect.CodeAlreadyExists, "directory already exists: %s", dir)
	}
	if err != nil {
		return nil, err
	}
	e, err := p.stat(ctx, dir)
	return connect.NewResponse(&pb.MakeDirResponse{Entry: e}), err
}

// Move implements filesystemconnect.FilesystemHandler.
func (files) Move(ctx context.Context, req *connect.Request[pb.MoveRequest]) (*connect.Response[pb.MoveResponse], error) {
	p, from, who, err := asked(ctx, req, req.Msg.GetSource())
	if err != nil {
		return nil, err
	}
	to, err := p.absolute(ctx, p.decodeName(req.Msg.GetDestination()), who)
	if err != nil {
		return nil, err
	}
	if _, err := p.client.Move(ctx, agent.MoveRequest{From: from, To: to, User: who}); errors.Is(err, fs.ErrNotExist) {
		return nil, errorf(connect.CodeNotFound, "source file not found: %s", from)
	} else if err != nil {
		return nil, err
	}
	e, err := p.stat(ctx, to)
	return connect.NewResponse(&pb.MoveResponse{Entry: e}), err
}

// Remove implements filesystemconnect.FilesystemHandler.
func (files) Remove(ctx context.Context, req *connect.Request[pb.RemoveRequest]) (*connect.Response[pb.RemoveResponse], error) {
	p, file, _, err := asked(ctx, req, req.Msg.GetPath())
	if err == nil {
		err = p.client.Remove(ctx, agent.PathRequest{Path: file, Recursive: true})
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return connect.NewResponse(&pb.RemoveResponse{}), err
}

// ListDir implements filesystemconnect.FilesystemHandler.
func (f files) ListDir(ctx context.Context, req *connect.Request[pb.ListDirRequest]) (*connect.Response[pb.ListDirResponse], error) {
	p, dir, _, err := asked(ctx, req, req.Msg.GetPath())
	if err == nil {
		err = p.isDir(ctx, dir)
	}
	if err != nil {
		return nil, err
	}
	select {
	case f.listings <- struct{}{}:
		defer func() { <-f.listings }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	out, size := &pb.ListDirResponse{}, 0
	ask := agent.DirRequest{Path: dir, Depth: int(min(max(req.Msg.GetDepth(), 1), 1000)), Links: true}
	for {
		part, err := p.client.Dir(ctx, ask)
		if err != nil {
			return nil, err
		}
		for _, f := range part.Entries {
			e := p.entry(f)
			out.Entries = append(out.Entries, e)
			size += 2*len(e.Path) + len(e.GetSymlinkTarget())
			for k, v := range e.Metadata {
				size += len(k) + len(v)
			}
		}
		if !part.More {
			return connect.NewResponse(out), nil
		}
		if len(out.Entries) >= maxListed || size > maxListing {
			return nil, errorf(connect.CodeResourceExhausted,
				"more files than one answer can hold (%d, with names of %d MB): list its subdirectories, or a smaller depth",
				maxListed, maxListing>>20)
		}
		if len(part.Entries) == 0 {
			return nil, errorf(connect.CodeInternal, "the sandbox broke off its listing")
		}
		last := part.Entries[len(part.Entries)-1].Path
		if slices.Compare(strings.Split(last, "/"), strings.Split(ask.After, "/")) <= 0 {
			return nil, errorf(connect.CodeInternal, "the sandbox repeats its listing")
		}
		ask.After = last
	}
}

// isDir returns an error if a path is not a directory.
func (p *scope) isDir(ctx context.Context, dir string) error {
	info, err := p.client.Stat(ctx, dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return errorf(connect.CodeNotFound, "directory not found: %s", dir)
	case errors.Is(err, syscall.ENOTDIR), err == nil && info.Type != agent.TypeDir:
		return errorf(connect.CodeInvalidArgument, "path is not a directory: %s", dir)
	}
	return err
}
