package template

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"
	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/internal/erofs"
	"soulbox.dev/soulbox/internal/names"
	"soulbox.dev/soulbox/sandbox"
)

// Files are what a build copies from: the caller's files, another stage or another image.
type Files struct {
	image *erofs.Image
	root  *erofs.Node
	temp  *os.File // removed by Close; its lock says that it is in use
}

// Close releases the files.
func (f *Files) Close() error {
	err := f.image.Close()
	if f.temp != nil {
		err = errors.Join(err, os.Remove(f.temp.Name()), f.temp.Close())
	}
	return err
}

// ReadContext reads the files of a build from a tar, which may be compressed. The build itself leaves out ignored files. On the host the
// files become a single image, which Close removes.
func (s *Store) ReadContext(ctx context.Context, owner string, from io.Reader) (_ *Files, err error) {
	return s.newContext(ctx, owner, func(m *merger) error {
		plain, err := uncompressed(ctx, s.payer(owner), from)
		if err != nil {
			return err
		}
		return errors.Join(m.apply(s.whileSpace(plain)), plain.Close())
	})
}

// newContext makes the image of a build's files.
func (s *Store) newContext(ctx context.Context, owner string, fill func(*merger) error) (_ *Files, err error) {
	free, err := s.payer(owner).wait(ctx, access.Merges, 1)
	if err != nil {
		return nil, err
	}
	defer free()
	f, err := s.temp("builds")
	if err != nil {
		return nil, s.asNoSpace(err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("build context: %w", s.asNoSpace(err)), f.Close(), os.Remove(f.Name()))
		}
	}()
	m := &merger{ctx: ctx, root: newRoot(), w: erofs.NewWriter(f), plain: true, bytes: maxImage - maxContext}
	if err := fill(m); err != nil {
		return nil, err
	}
	if err := m.w.Finish(m.root); err != nil {
		return nil, err
	}
	files, err := openFiles(f.Name())
	if err != nil {
		return nil, err
	}
	files.temp = f
	return files, nil
}

// maxContext bounds the files of a build, in bytes.
const maxContext = 8 << 30

// openFiles opens an image.
func openFiles(name string) (*Files, error) {
	image, err := erofs.Open(name)
	if err != nil {
		return nil, err
	}
	root, err := image.Tree()
	if err != nil {
		return nil, errors.Join(err, image.Close())
	}
	return &Files{image: image, root: root}, nil
}

// ContextFiles makes a build context from texts by name.
func (s *Store) ContextFiles(ctx context.Context, owner string, texts map[string]string) (*Files, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, text := range texts {
		clean := path.Clean("/" + name)
		if clean == "/" || strings.HasSuffix(name, "/") {
			return nil, fmt.Errorf("build context: %q is not a file name: %w", clip(name), sandbox.ErrInvalid)
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: clean[1:], Mode: 0o644, Size: int64(len(text))}); err != nil {
			return nil, fmt.Errorf("build context: %q: %w", clip(name), err)
		}
		if _, err := io.WriteString(w, text); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return s.ReadContext(ctx, owner, &b)
}

// ContextDir makes a build context from a directory of the host. Links in it cannot lead outside.
func (s *Store) ContextDir(ctx context.Context, owner, dir string) (*Files, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("build context: %w", err)
	}
	defer root.Close()
	var ignore func(string) bool
	for _, name := range ignoreNames {
		f, err := root.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			ignore, err = readIgnore(name, f)
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			return nil, fmt.Errorf("build context: %w", err)
		}
		break
	}
	var files *Files
	err = piped(func(to io.Writer) error { return packDir(to, root, ignore) }, func(from io.Reader) (err error) {
		files, err = s.ReadContext(ctx, owner, from)
		return err
	})
	return files, err
}

// packDir writes a directory as a tar. It does not read ignored files.
func packDir(to io.Writer, root *os.Root, ignore func(string) bool) error {
	w := tar.NewWriter(to)
	err := fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		ignored := name != "." && ignore != nil && ignore(name)
		switch {
		case err != nil && ignored && d != nil && d.IsDir():
			return fs.SkipDir // an ignored directory may be unreadable
		case err != nil || name == ".":
			return err
		case ignored && !d.IsDir(): // an ignored directory may still hold files that are not ignored
			return nil
		}
		info, err := root.Lstat(name)
		if err != nil {
			return err
		}
		link := ""
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			if link, err = root.Readlink(name); err != nil {
				return err
			}
		case !info.Mode().IsRegular() && !info.IsDir():
			return nil // skip sockets, pipes and devices
		}
		h, err := tar.FileInfoHeader(info, link)
		if err != nil {
			return err
		}
		h.Name, h.Uid, h.Gid, h.Uname, h.Gname = name, 0, 0, "", ""
		if !info.Mode().IsRegular() {
			return w.WriteHeader(h)
		}
		f, err := root.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		_, err = io.CopyN(w, f, h.Size)
		return err
	})
	return errors.Join(err, w.Close())
}

// ignoreNames are the files that say what a build ignores. The first that exists counts, as with docker. A Dockerfile arrives as text, so
// its name is always "Dockerfile".
var ignoreNames = []string{"Dockerfile.dockerignore", ".dockerignore"}

// maxIgnore bounds an ignore file, in bytes.
const maxIgnore = 1 << 20

// leaveOut removes the files that the ignore file names.
func (f *Files) leaveOut() error {
	for _, name := range ignoreNames {
		n, err := walk(f.root, name, true, nil)
		if err != nil || n.Type() != unix.S_IFREG {
			continue // there is none
		}
		ignore, err := readIgnore(name, f.image.Content(n.Data))
		if err == nil {
			prune(f.root, "", ignore)
		}
		return err
	}
	return nil
}

func readIgnore(name string, r io.Reader) (func(string) bool, error) {
	patterns, err := ignorefile.ReadAll(io.LimitReader(r, maxIgnore))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	m, err := patternmatcher.New(patterns)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return func(name string) bool {
		ignored, err := m.MatchesOrParentMatches(name)
		return err == nil && ignored
	}, nil
}

// prune removes ignored files from a tree. An ignored directory stays if something in it is not ignored.
func prune(dir *erofs.Node, name string, ignore func(string) bool) {
	for base, n := range dir.Children {
		full := path.Join(name, base)
		if n.IsDir() {
			prune(n, full, ignore)
		}
		if ignore(full) && len(n.Children) == 0 {
			delete(dir.Children, base)
		}
	}
}

// digest returns a hash of a file with everything in it, as COPY sees it.
func (f *Files) digest(ctx context.Context, n *erofs.Node) (string, error) {
	sum := sha256.New()
	err := f.sum(ctx, sum, "", n)
	return hex.EncodeToString(sum.Sum(nil)), err
}

func (f *Files) sum(ctx context.Context, to hash.Hash, name string, n *erofs.Node) error {
	fmt.Fprintf(to, "%q %o %d %d %q %d %d\n", name, n.Mode, n.UID, n.GID, n.Target, n.Device, n.Data.Size)
	if n.Type() == unix.S_IFREG {
		if _, err := io.Copy(to, &untilDone{ctx, f.image.Content(n.Data)}); err != nil {
			return err
		}
	}
	for _, base := range n.Names() {
		if err := f.sum(ctx, to, path.Join(name, base), n.Children[base]); err != nil {
			return err
		}
	}
	return nil
}

// matching returns the files that a pattern of COPY matches, by path.
func (f *Files) matching(pattern string) (map[string]*erofs.Node, error) {
	parts := splitPath(path.Clean("/" + pattern))
	found := map[string]*erofs.Node{}
	if !strings.ContainsAny(pattern, "*?[\\") {
		n, err := walk(f.root, pattern, true, nil)
		if err != nil {
			return nil, fmt.Errorf("%q: %w%s", pattern, noFile(err), f.near(parts))
		}
		found[strings.Join(parts, "/")] = n
		return found, nil
	}
	if err := glob(f.root, "", parts, found); err != nil {
		return nil, fmt.Errorf("%q: %w", pattern, err)
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%q: %w%s", pattern, fs.ErrNotExist, f.near(parts))
	}
	return found, nil
}

// noFile turns a lookup's ENOENT or ENOTDIR into fs.ErrNotExist.
func noFile(err error) error {
	if err == unix.ENOENT || err == unix.ENOTDIR {
		return fs.ErrNotExist
	}
	return err
}

func glob(dir *erofs.Node, name string, parts []string, found map[string]*erofs.Node) error {
	for _, base := range dir.Names() {
		ok, err := path.Match(parts[0], base)
		if err != nil {
			return err
		}
		child := dir.Children[base]
		switch full := path.Join(name, base); {
		case !ok:
		case len(parts) == 1:
			found[full] = child
		case child.IsDir():
			if err := glob(child, full, parts[1:], found); err != nil {
				return err
			}
		}
	}
	return nil
}

// near suggests file names that may have been meant.
func (f *Files) near(parts []string) string {
	dir := f.root
	for i, part := range parts {
		next := dir.Children[part]
		if next != nil && next.IsDir() && i+1 < len(parts) {
			dir = next
			continue
		}
		near := dir.Names()
		slices.SortStableFunc(near, func(a, b string) int { return distance(part, a) - distance(part, b) })
		where := "/" + strings.Join(parts[:i], "/")
		if len(near) == 0 {
			return fmt.Sprintf("; %s of it is empty", where)
		}
		near = near[:min(3, len(near))]
		for i, name := range near {
			near[i] = names.Show(name)
		}
		return fmt.Sprintf("; %s of it has %s", where, strings.Join(near, ", "))
	}
	return ""
}

// distance roughly measures how much two names differ.
func distance(a, b string) int {
	a, b = strings.ToLower(clip(a)), strings.ToLower(clip(b))
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		last := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := last
			if a[i] != b[j] {
				cost++
			}
			last, row[j+1] = row[j+1], min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
