package template

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/erofs"
	"soulbox.dev/soulbox/sandbox"
)

// Bounds of an image, whatever its layers contain.
const (
	maxEntries  = 2_000_000
	maxImage    = 64 << 30 // bytes of all contents
	maxName     = 255
	maxTarget   = 4000
	maxDepth    = 128
	maxLinks    = 40 // symbolic links on the way to a file
	defaultPerm = 0o755
)

// ErrLayer means that a layer is malformed or exceeds a bound.
var ErrLayer = errors.New("broken layer")

// merger applies layers to a tree. It trusts nothing in a layer: names stay in the tree, and sizes are bounded.
type merger struct {
	ctx   context.Context // for the single operation that a merger serves
	meta  int64           // bytes of memory that the tree takes, roughly
	root  *erofs.Node
	w     *erofs.Writer
	plain bool // the tar is no layer: names of whiteouts are ordinary names
	// keepLinks keeps a link to a directory if an entry names it as a directory.
	keepLinks bool
	entries   int
	bytes     int64
	// dropped counts what images cannot hold: extended attributes, such as capabilities of programs.
	dropped int
}

func newRoot() *erofs.Node {
	return &erofs.Node{Mode: unix.S_IFDIR | defaultPerm, Children: map[string]*erofs.Node{}}
}

// layer is a layer that is being applied. Its whiteouts affect only what earlier layers put there, whatever the order of the entries.
type layer struct {
	*merger
	mine map[place]bool // what this layer has put there
}

type place struct {
	dir  *erofs.Node
	name string
}

// apply applies a layer (OCI image specification, layers).
func (m *merger) apply(r io.Reader) error {
	l := layer{m, map[place]bool{}}
	for from := tar.NewReader(r); ; {
		h, err := from.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil && (m.ctx.Err() != nil || notOfLayer(err)) {
			return err
		}
		if err != nil {
			return fmt.Errorf("%w: %w", ErrLayer, err)
		}
		if m.entries++; m.entries > maxEntries {
			return fmt.Errorf("%w: more than %d entries", ErrLayer, maxEntries)
		}
		if m.ctx.Err() != nil {
			return context.Cause(m.ctx)
		}
		if err := l.entry(h, &untilDone{m.ctx, from}); err != nil {
			return fmt.Errorf("%q: %w", clip(h.Name), err)
		}
	}
}

// notOfLayer reports whether reading a layer failed for a reason outside the layer.
func notOfLayer(err error) bool {
	for _, class := range []error{sandbox.ErrNoDisk, syscall.ENOSPC, syscall.EDQUOT, syscall.EIO, access.ErrFull, errWindow,
		context.Canceled,
		context.DeadlineExceeded} {
		if errors.Is(err, class) {
			return true
		}
	}
	return false
}

// clip shortens a name for an error message.
func clip(s string) string {
	if len(s) > 200 {
		return string(agent.Whole([]byte(s[:200]))) + "…"
	}
	return s
}

func (l layer) entry(h *tar.Header, from io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name := strings.TrimPrefix(path.Clean("/"+h.Name), "/")
	if name == "" {
		if h.Typeflag == tar.TypeDir {
			l.describe(l.root, h)
		}
		return nil
	}
	if strings.IndexByte(name, 0) >= 0 || strings.Count(name, "/") >= maxDepth {
		return fmt.Errorf("%w: its name is not a path", ErrLayer)
	}
	parent, err := l.dir(path.Dir(name))
	if err != nil {
		return err
	}
	base := path.Base(name)
	if h.Typeflag == tar.TypeDir && l.keepLinks {
		if n, err := walk(l.root, name, true, nil); err == nil && n.IsDir() && n != parent.Children[base] {
			return nil
		}
	}
	if gone, opaque, ok := agent.IsWhiteout(base); ok && !l.plain {
		l.whiteout(parent, gone, opaque)
		return nil
	}
	if len(base) > maxName {
		return fmt.Errorf("%w: a name has %d bytes", ErrLayer, len(base))
	}
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "SCHILY.xattr.") {
			l.dropped++
		}
	}
	if err := l.countMemory(base, h.Linkname); err != nil {
		return err
	}
	node, err := l.node(h, from, parent.Children[base])
	if err != nil {
		return err
	}
	l.mine[place{parent, base}] = true
	parent.Children[base] = node
	return nil
}

// countMemory counts the memory that one more name takes.
func (m *merger) countMemory(name, target string) error {
	if m.meta += int64(nodeCost + len(name) + len(target)); m.meta > maxMeta {
		return fmt.Errorf("%w: it has too many files", ErrLayer)
	}
	return nil
}

// nodeCost is roughly the memory that a file of a tree takes in addition to its names, in bytes; maxMeta bounds the sum.
const (
	nodeCost = 400
	maxMeta  = 512 << 20
)

// whiteout removes what was there before this layer.
func (l layer) whiteout(dir *erofs.Node, name string, opaque bool) {
	if opaque {
		for name := range dir.Children {
			l.whiteout(dir, name, false)
		}
		return
	}
	old := dir.Children[name]
	switch {
	case old == nil:
	case !l.mine[place{dir, name}]:
		delete(dir.Children, name)
		if old.IsDir() { // what this layer has put into it stays
			l.keep(dir, name, old)
		}
	case old.IsDir():
		l.whiteout(old, "", true)
	}
}

// keep keeps what this layer has put into a directory that it also removes.
func (l layer) keep(parent *erofs.Node, name string, dir *erofs.Node) {
	l.whiteout(dir, "", true)
	if len(dir.Children) > 0 {
		parent.Children[name] = dir
	}
}

// node makes the file that an entry describes; old is the file that has its name so far.
func (l layer) node(h *tar.Header, from io.Reader, old *erofs.Node) (*erofs.Node, error) {
	n := &erofs.Node{}
	switch h.Typeflag {
	case tar.TypeReg, 0: // old archives use 0
		if h.Size < 0 || h.Size > maxImage-l.bytes {
			return nil, fmt.Errorf("%w: its files are too large", ErrLayer)
		}
		l.bytes += h.Size
		n.Mode = unix.S_IFREG
		var err error
		if n.Data, err = l.w.Add(from); err != nil {
			return nil, err
		}
	case tar.TypeDir:
		if old != nil && old.IsDir() {
			n = old
		} else {
			n.Children = map[string]*erofs.Node{}
		}
		n.Mode = unix.S_IFDIR
	case tar.TypeSymlink:
		if h.Linkname == "" || len(h.Linkname) > maxTarget || strings.IndexByte(h.Linkname, 0) >= 0 {
			return nil, fmt.Errorf("%w: a link to nothing, or too long a name", ErrLayer)
		}
		n.Mode, n.Target = unix.S_IFLNK, h.Linkname
	case tar.TypeLink:
		target, err := l.lookup(h.Linkname)
		if err != nil || target.IsDir() {
			return nil, fmt.Errorf("%w: a hard link to %q, which is not one of its files", ErrLayer, clip(h.Linkname))
		}
		return target, nil
	case tar.TypeFifo:
		n.Mode = unix.S_IFIFO
	case tar.TypeChar, tar.TypeBlock:
		n.Mode = unix.S_IFCHR
		if h.Typeflag == tar.TypeBlock {
			n.Mode = unix.S_IFBLK
		}
		if h.Devmajor < 0 || h.Devmajor > 0xfff || h.Devminor < 0 || h.Devminor > 0xfffff {
			return nil, fmt.Errorf("%w: device %d:%d", ErrLayer, h.Devmajor, h.Devminor)
		}
		n.Device = unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))
	default:
		return nil, fmt.Errorf("%w: an entry of kind %q", ErrLayer, h.Typeflag)
	}
	l.describe(n, h)
	if n.Type() == unix.S_IFLNK {
		n.Mode = unix.S_IFLNK | 0o777
	}
	return n, nil
}

func (l layer) describe(n *erofs.Node, h *tar.Header) {
	n.Mode = n.Type() | uint16(h.Mode&0o7777)
	n.UID, n.GID, n.Time = uint32(h.Uid), uint32(h.Gid), h.ModTime.Truncate(time.Second)
}

// dir finds a directory of the tree, follows links on the way and makes missing directories.
func (l layer) dir(name string) (*erofs.Node, error) {
	at, err := walk(l.root, name, true, func(parent *erofs.Node, base string) (*erofs.Node, error) {
		if len(base) > maxName {
			return nil, fmt.Errorf("%w: a name has %d bytes", ErrLayer, len(base))
		}
		if err := l.countMemory(base, ""); err != nil {
			return nil, err
		}
		n := &erofs.Node{Mode: unix.S_IFDIR | defaultPerm, Children: map[string]*erofs.Node{}}
		parent.Children[base] = n
		l.mine[place{parent, base}] = true
		return n, nil
	})
	if err == nil && !at.IsDir() {
		err = unix.ENOTDIR
	}
	if err != nil {
		return nil, fmt.Errorf("%w: its directory: %w", ErrLayer, err)
	}
	return at, nil
}

// lookup finds a file of the tree by the name in an entry. It follows links on the way, but not the last one.
func (l layer) lookup(name string) (*erofs.Node, error) { return walk(l.root, name, false, nil) }

// walk finds a file below root, as a kernel with that root would. It follows symbolic links; the last one only if follow is set. For a
// missing file it calls missing, or returns unix.ENOENT if missing is nil.
func walk(root *erofs.Node, name string, follow bool, missing func(parent *erofs.Node, base string) (*erofs.Node, error)) (*erofs.Node,
	error) {
	parts, trail, links := splitPath(name), []*erofs.Node{root}, 0
	for len(parts) > 0 {
		part, dir := parts[0], trail[len(trail)-1]
		parts = parts[1:]
		if part == ".." {
			trail = trail[:max(1, len(trail)-1)]
			continue
		}
		if !dir.IsDir() {
			return nil, unix.ENOTDIR
		}
		next := dir.Children[part]
		if next == nil {
			if missing == nil {
				return nil, unix.ENOENT
			}
			var err error
			if next, err = missing(dir, part); err != nil {
				return nil, err
			}
		}
		if next.Type() == unix.S_IFLNK && (follow || len(parts) > 0) {
			if links++; links > maxLinks {
				return nil, unix.ELOOP
			}
			if strings.HasPrefix(next.Target, "/") {
				trail = trail[:1]
			}
			if parts = append(splitPath(next.Target), parts...); len(parts) > maxTarget {
				return nil, unix.ENAMETOOLONG
			}
			continue
		}
		trail = append(trail, next)
	}
	return trail[len(trail)-1], nil
}

// splitPath splits a path and drops empty parts and ".".
func splitPath(name string) []string {
	return slices.DeleteFunc(strings.Split(name, "/"), func(p string) bool { return p == "" || p == "." })
}
