package template

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/erofs"
	"soulbox.dev/soulbox/internal/names"
)

// copying is a COPY or ADD.
type copying struct {
	instructions.SourcesAndDest
	from, chown, chmod string
	unpack             bool // archives
}

// picked is a file to copy, with its path in the source.
type picked struct {
	name string
	node *erofs.Node
}

func (s *stageRun) copy(ctx context.Context, where string, c copying) error {
	var files *Files
	var all []picked
	by := []string{"COPY", c.DestPath, c.chown, c.chmod, strconv.FormatBool(c.unpack), strconv.FormatBool(c.from == "")}
	if len(c.SourcePaths) > 0 {
		var err error
		if files, err = s.files(ctx, c.from); err != nil {
			return err
		}
		for _, pattern := range c.SourcePaths {
			found, err := files.matching(pattern)
			if err != nil {
				return err
			}
			for _, name := range sortedKeys(found) {
				sum, err := files.digest(ctx, found[name])
				if err != nil {
					return err
				}
				all = append(all, picked{name, found[name]})
				by = append(by, name, sum)
			}
		}
	}
	for _, inline := range c.SourceContents {
		by = append(by, inline.Path, inline.Data)
	}
	return s.change(ctx, where, hashOf(by...), func(ctx context.Context) error { return s.copyIn(ctx, c, files, all) })
}

// copyIn copies files into the sandbox.
func (s *stageRun) copyIn(ctx context.Context, c copying, files *Files, all []picked) error {
	owner, err := s.owner(ctx, c)
	if err != nil {
		return err
	}
	mode := int64(-1)
	if c.chmod != "" {
		if mode, err = strconv.ParseInt(c.chmod, 8, 32); err != nil || mode < 0 || mode > 0o7777 {
			return fmt.Errorf("--chmod=%s is not a mode; write it as an octal number, such as 755", clip(c.chmod))
		}
	}
	dest := s.absolute(c.DestPath)
	info, err := s.client.Stat(ctx, dest)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	there := err == nil && (info.Type == agent.TypeDir || info.Type == agent.TypeSymlink && s.isDir(ctx, dest))
	into := there || strings.HasSuffix(c.DestPath, "/") || c.DestPath == "." || len(all)+len(c.SourceContents) > 1
	archives, rest := []picked{}, []picked{}
	for _, f := range all {
		is := false
		if c.unpack {
			if is, err = s.isArchive(ctx, files, f.node); err != nil {
				return err
			}
		}
		if is {
			archives = append(archives, f)
		} else {
			rest = append(rest, f)
		}
	}
	p := packer{files: files, owner: owner, mode: mode, plain: c.from == "", there: there}
	err = streamed(p, func(p packer) error { return p.all(c, dest, into, rest) },
		func(r io.Reader) error { return s.client.Unpack(ctx, "/", r) })
	if err != nil {
		return err
	}
	for _, f := range archives {
		if err := s.unpackArchive(ctx, files, f.node, dest); err != nil {
			return fmt.Errorf("%s: %w", names.Show(f.name), err)
		}
	}
	return nil
}

// isDir reports whether a link leads to a directory.
func (s *stageRun) isDir(ctx context.Context, name string) bool {
	_, err := s.client.Dir(ctx, agent.DirRequest{Path: name})
	return err == nil
}

// ids are the numbers of an owner and a group; nil keeps each file's own.
type ids struct{ uid, gid int }

// packer writes files as a tar.
type packer struct {
	files *Files
	w     *tar.Writer
	owner *ids
	mode  int64 // -1 keeps the file's own
	plain bool  // drop setuid and setgid bits: a copied program of the caller must not run with another user's rights
	there bool  // the destination is a directory already, which keeps its mode and owner
}

func (p packer) all(c copying, dest string, into bool, all []picked) error {
	for _, f := range all {
		target := dest
		if into && !f.node.IsDir() {
			target = path.Join(dest, path.Base(f.name))
		}
		if err := p.copied(target, f.node); err != nil {
			return err
		}
	}
	for _, inline := range c.SourceContents {
		target := dest
		if into {
			target = path.Join(dest, path.Base(inline.Path))
		}
		h := &tar.Header{Typeflag: tar.TypeReg, Name: target[1:], Mode: 0o644, Size: int64(len(inline.Data)), ModTime: time.Now()}
		if err := p.header(h); err != nil {
			return err
		}
		if _, err := io.WriteString(p.w, inline.Data); err != nil {
			return err
		}
	}
	return nil
}

// copied writes a source: a file, or what is in a directory. A destination that does not exist becomes a directory with the default mode.
func (p packer) copied(target string, n *erofs.Node) error {
	if !n.IsDir() {
		return p.add(target, n)
	}
	if !p.there {
		h := &tar.Header{Typeflag: tar.TypeDir, Name: strings.TrimPrefix(target, "/") + "/", Mode: defaultPerm, ModTime: time.Now()}
		if err := p.header(h); err != nil {
			return err
		}
	}
	for _, base := range n.Names() {
		if err := p.add(path.Join(target, base), n.Children[base]); err != nil {
			return err
		}
	}
	return nil
}

// add writes a file and everything in it.
func (p packer) add(name string, n *erofs.Node) error {
	h := &tar.Header{Name: strings.TrimPrefix(name, "/"), Mode: int64(n.Mode & 0o7777), Uid: int(n.UID), Gid: int(n.GID), ModTime: n.Time,
		Linkname: n.Target}
	switch n.Type() {
	case unix.S_IFDIR:
		h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, n.Data.Size
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	default:
		return nil // a device belongs to its machine
	}
	if h.Name != "/" {
		if err := p.header(h); err != nil {
			return err
		}
	}
	if n.Type() == unix.S_IFREG {
		if _, err := io.Copy(p.w, p.files.image.Content(n.Data)); err != nil {
			return err
		}
	}
	for _, base := range n.Names() {
		if err := p.add(path.Join(name, base), n.Children[base]); err != nil {
			return err
		}
	}
	return nil
}

func (p packer) header(h *tar.Header) error {
	if p.owner != nil {
		h.Uid, h.Gid = p.owner.uid, p.owner.gid
	}
	if p.mode >= 0 && h.Typeflag != tar.TypeSymlink && h.Typeflag != tar.TypeDir {
		h.Mode = p.mode
	}
	if p.plain && h.Typeflag == tar.TypeReg {
		h.Mode &^= unix.S_ISUID | unix.S_ISGID
	}
	return p.w.WriteHeader(h)
}

// isArchive reports whether ADD unpacks a file. It looks at the content, not at the name.
func (s *stageRun) isArchive(ctx context.Context, files *Files, n *erofs.Node) (bool, error) {
	if n.Type() != unix.S_IFREG || n.Data.Size == 0 {
		return false, nil
	}
	r, err := uncompressed(ctx, s.job.payer, files.image.Content(n.Data))
	if err != nil {
		return false, context.Cause(ctx)
	}
	_, err = tar.NewReader(r).Next()
	is := err == nil
	if !errors.Is(err, errWindow) && !errors.Is(err, zstd.ErrWindowSizeExceeded) {
		err = context.Cause(ctx)
	}
	return is, errors.Join(err, r.Close())
}

// unpackArchive unpacks an archive into dest.
func (s *stageRun) unpackArchive(ctx context.Context, files *Files, n *erofs.Node, dest string) error {
	r, err := uncompressed(ctx, s.job.payer, files.image.Content(n.Data))
	if err != nil {
		return err
	}
	return errors.Join(s.client.Unpack(ctx, dest, atMost(r, maxContext)), r.Close())
}

// owner returns the numbers of --chown. The default is root; files of other stages and images keep their owners.
func (s *stageRun) owner(ctx context.Context, c copying) (*ids, error) {
	chown := c.chown
	if chown == "" && c.from != "" {
		return nil, nil
	}
	if chown == "" {
		return &ids{}, nil
	}
	user, group, both := strings.Cut(chown, ":")
	uid, gid, err := s.lookup(ctx, "/etc/passwd", user)
	if err != nil {
		return nil, fmt.Errorf("--chown=%s: %w", clip(chown), err)
	}
	if both {
		if gid, _, err = s.lookup(ctx, "/etc/group", group); err != nil {
			return nil, fmt.Errorf("--chown=%s: %w", clip(chown), err)
		}
	} else if gid < 0 {
		gid = uid
	}
	return &ids{uid, gid}, nil
}

// lookup finds a name or a number in a passwd(5) or group(5) file and returns its id. For a user it also returns the group's id, or -1.
func (s *stageRun) lookup(ctx context.Context, file, name string) (id, group int, err error) {
	r, _, err := s.client.ReadFile(ctx, file, 0, maxPasswd)
	if err == nil {
		f := entryOf(passwdLines(r), name)
		if err := r.Close(); err != nil {
			return 0, 0, err
		}
		if f != nil {
			id, err := strconv.Atoi(f[2])
			group, gerr := strconv.Atoi(f[3])
			if gerr != nil {
				group = -1
			}
			return id, group, err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return 0, 0, err
	}
	if id, err = strconv.Atoi(name); err == nil && id >= 0 {
		return id, -1, nil
	}
	return 0, 0, fmt.Errorf("there is no %q in %s", clip(name), file)
}

// passwd reads the lines of an image's passwd(5) file.
func (f *Files) passwd(name string) [][]string {
	n, err := walk(f.root, name, true, nil)
	if err != nil || n.Type() != unix.S_IFREG {
		return nil
	}
	return passwdLines(f.image.Content(n.Data))
}

// maxPasswd bounds a passwd(5) file, in bytes.
const maxPasswd = 1 << 20

// passwdLines reads passwd(5) and group(5). The file is not trusted: lines that are no entry are skipped.
func passwdLines(r io.Reader) (all [][]string) {
	for lines := bufio.NewScanner(io.LimitReader(r, maxPasswd)); lines.Scan(); {
		if fields := strings.Split(lines.Text(), ":"); len(fields) >= 4 {
			all = append(all, fields)
		}
	}
	return all
}

// entryOf finds an entry by its name or its number, or returns nil.
func entryOf(entries [][]string, name string) []string {
	for _, f := range entries {
		if f[0] == name || f[2] == name {
			return f
		}
	}
	return nil
}

// streamed runs a packer that writes a tar while read reads it.
func streamed(p packer, write func(packer) error, read func(io.Reader) error) error {
	return piped(func(to io.Writer) error {
		p.w = tar.NewWriter(to)
		return errors.Join(write(p), p.w.Close())
	}, read)
}

// piped runs write while read reads its output. It returns when both are done; an error of one ends the other.
func piped(write func(io.Writer) error, read func(io.Reader) error) error {
	from, to := io.Pipe()
	var writing sync.WaitGroup
	writing.Go(func() { _ = to.CloseWithError(write(to)) }) // the reader gets its error
	err := read(from)
	_ = from.Close()
	writing.Wait()
	return err
}

// packed passes all files to read as a tar.
func (f *Files) packed(read func(io.Reader) error) error {
	return streamed(packer{files: f, mode: -1}, func(p packer) error { return p.add("/", f.root) }, read)
}
