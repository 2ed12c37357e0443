package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"soulbox.dev/soulbox/internal/names"
)

// maxDirs bounds the directories of one copy, since each is remembered.
const maxDirs = 1 << 20

// archive is a tar from a sandbox; its content must not be trusted.
type archive struct {
	*tar.Reader
	ctx context.Context
}

// next returns the next entry. It refuses sparse files, which grow beyond what was sent: tar makes none unless told to.
func (a archive) next() (*tar.Header, error) {
	if err := context.Cause(a.ctx); err != nil {
		return nil, err
	}
	h, err := a.Next()
	if err != nil {
		return nil, err
	}
	sparse := h.Typeflag == tar.TypeGNUSparse
	for k := range h.PAXRecords {
		sparse = sparse || strings.HasPrefix(k, "GNU.sparse.")
	}
	if sparse {
		return nil, fmt.Errorf("the sandbox sends %.60q as a sparse file, which its tar was not asked for", printable(h.Name))
	}
	return h, nil
}

// write writes the content of an entry to a file, until the context ends.
func (a archive) write(f *os.File) error {
	part := make([]byte, 256<<10)
	for {
		n, err := a.Read(part)
		if _, werr := f.Write(part[:n]); werr != nil {
			return werr
		}
		if err == io.EOF {
			return nil
		}
		if err = errors.Join(err, context.Cause(a.ctx)); err != nil {
			return err
		}
	}
}

// place is where a copy goes: a name in a directory, or "." for its content. The user named the directory; the name may come from the
// sandbox.
type place struct {
	dir, name string
	slash     bool // the destination must be a directory
	within    bool // the user named only the directory
}

// placeOf returns where something called base goes if the user named the destination to; whole means that only its content is copied.
func placeOf(to, base string, whole bool) (place, error) {
	there, err := os.Stat(to)
	switch {
	case err == nil && there.IsDir() && whole:
		return place{dir: to, name: "."}, nil
	case err == nil && there.IsDir():
		return place{dir: to, name: base, within: true}, nil
	case err == nil && whole:
		return place{}, fmt.Errorf("%s is a file, and cannot become a directory", to)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return place{}, err
	}
	clean := filepath.Clean(to)
	name := filepath.Base(clean)
	if to == "" || name == "." || name == ".." {
		return place{}, fmt.Errorf("%q is not the name of a file or directory", to)
	}
	return place{dir: filepath.Dir(clean), name: name, slash: strings.HasSuffix(to, "/") || strings.HasSuffix(to, "/.")}, nil
}

// unpack writes a tar to a place: one file, or a directory with everything in it, depending on the first entry.
func unpack(ctx context.Context, from io.Reader, base string, to place, warn io.Writer) error {
	in := archive{tar.NewReader(from), ctx}
	h, err := in.next()
	if err == io.EOF {
		err = errors.New("the sandbox sends nothing")
	}
	if err != nil {
		return err
	}
	name, ok := below(h.Name, base)
	if !ok || name != "." {
		return fmt.Errorf("the sandbox sends %.60q, which is not what was asked for", printable(h.Name))
	}
	isDir := h.Typeflag == tar.TypeDir
	switch {
	case isDir:
		if err := os.MkdirAll(to.dir, 0o755); err != nil {
			return err
		}
	case h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeSymlink:
		return errors.New("it is neither file, directory nor link")
	case to.slash:
		return fmt.Errorf("there is no directory %s", filepath.Join(to.dir, to.name))
	}
	parent, err := os.OpenRoot(to.dir)
	if err != nil {
		return err
	}
	defer parent.Close()
	if err := free(parent, to, h); err != nil {
		return err
	}
	if isDir {
		return unpackDir(in, h, base, parent, to.name, warn)
	}
	if err := (&tree{root: parent}).put(in, h, to.name, base, warn); err != nil {
		return err
	}
	if next, err := in.next(); err != io.EOF {
		return errors.Join(err, fmt.Errorf("the sandbox sends more than the file that was asked for: %v", next != nil))
	}
	return nil
}

// free checks that an entry may be written at a place. A link there is not followed, since an earlier copy may have brought it and it may
// lead anywhere. It is replaced only by a link, and never if the user named it.
func free(parent *os.Root, to place, h *tar.Header) error {
	there, err := parent.Lstat(to.name)
	name := filepath.Join(to.dir, to.name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case there.IsDir() == (h.Typeflag == tar.TypeDir) && (there.IsDir() || there.Mode().IsRegular()):
		return nil
	case there.IsDir():
		return fmt.Errorf("%s is a directory, but what the sandbox sends is not", name)
	case there.Mode()&fs.ModeSymlink != 0:
		if to.within && h.Typeflag == tar.TypeSymlink {
			return nil
		}
		return fmt.Errorf("%s is a symbolic link, and cp does not write through it: remove it, or name its target", name)
	case there.Mode().IsRegular():
		return fmt.Errorf("%s is a file, but the sandbox sends a directory", name)
	}
	return fmt.Errorf("%s is neither file nor directory; the destination - is stdout", name)
}

// tree is the target of a tar. Everything stays below its root: links that lead out of it are not followed.
type tree struct {
	root *os.Root
	made []madeDir   // directories that we created: their modes and times are set last
	mask fs.FileMode // for new directories
}

type madeDir struct {
	name string
	mode fs.FileMode
	at   time.Time
}

func unpackDir(in archive, h *tar.Header, base string, parent *os.Root, name string, warn io.Writer) (err error) {
	t := tree{mask: umask()}
	if err := t.makeDir(parent, name, h, "."); err != nil {
		return err
	}
	if t.root, err = parent.OpenRoot(name); err != nil {
		return err
	}
	defer t.root.Close()
	defer func() { err = errors.Join(err, t.finish()) }()
	for h, err = in.next(); err == nil; h, err = in.next() {
		name, ok := below(h.Name, base)
		if !ok {
			return fmt.Errorf("the sandbox sends %.60q, which is not below what was asked for", printable(h.Name))
		}
		if err := t.put(in, h, name, base, warn); err != nil {
			return err
		}
	}
	if err != io.EOF {
		return err
	}
	return nil
}

// finish sets the modes and times of directories, even after an incomplete copy.
func (t *tree) finish() (err error) {
	for _, d := range slices.Backward(t.made) {
		err = errors.Join(err, t.root.Chmod(d.name, d.mode), t.root.Chtimes(d.name, d.at, d.at))
	}
	return err
}

// umask returns the umask of this process. No file may be created at the same time.
func umask() fs.FileMode {
	mask := syscall.Umask(0o077)
	syscall.Umask(mask)
	return fs.FileMode(mask)
}

// makeDir creates a directory, and adds it to t.made as noted. An existing directory keeps its mode; if the mode prevents writing into it,
// finish restores the mode afterwards.
func (t *tree) makeDir(root *os.Root, name string, h *tar.Header, noted string) error {
	mode := fs.FileMode(h.Mode) & 0o777 &^ t.mask
	there, err := root.Stat(name)
	switch {
	case err == nil && there.IsDir() && there.Mode()&0o700 == 0o700:
		return nil
	case err == nil && there.IsDir():
		mode, err = there.Mode().Perm(), root.Chmod(name, 0o700)
	default:
		err = root.MkdirAll(name, 0o700)
	}
	if err != nil {
		return err
	}
	if t.made = append(t.made, madeDir{noted, mode, h.ModTime}); len(t.made) > maxDirs {
		return fmt.Errorf("there are more than %d directories", maxDirs)
	}
	return nil
}

// below returns the path below base of a name in a tar, and reports whether it is there.
func below(name, base string) (string, bool) {
	name = path.Clean(name)
	if base = path.Clean(base); base != "." {
		var ok bool
		if name, ok = strings.CutPrefix(name+"/", base+"/"); !ok {
			return "", false
		}
		name = path.Clean(name)
	}
	return name, name == "." || filepath.IsLocal(name)
}

// put writes one entry. An existing file is replaced, never written to: it may be a link, or a hard link of another file.
func (t *tree) put(in archive, h *tar.Header, name, base string, warn io.Writer) error {
	if h.Typeflag == tar.TypeDir {
		return t.makeDir(t.root, name, h, name)
	}
	if h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeSymlink && h.Typeflag != tar.TypeLink {
		fmt.Fprintf(warn, "soulbox: %s is neither file, directory nor link, and is left out\n",
			names.Show(h.Name)) // best effort
		return nil
	}
	if err := t.root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	if there, err := t.root.Lstat(name); err == nil && there.IsDir() {
		return fmt.Errorf("%s is a directory here, but not in the sandbox", filepath.Join(t.root.Name(), name))
	}
	if err := t.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	switch h.Typeflag {
	case tar.TypeSymlink:
		return t.root.Symlink(h.Linkname, name)
	case tar.TypeLink:
		target, ok := below(h.Linkname, base)
		if !ok {
			return fmt.Errorf("the sandbox sends a link to %.60q, which is not below what was asked for", h.Linkname)
		}
		return t.root.Link(target, name)
	}
	f, err := t.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, fs.FileMode(h.Mode)&0o777)
	if err != nil {
		return err
	}
	if err := errors.Join(in.write(f), f.Close()); err != nil {
		return err
	}
	return t.root.Chtimes(name, h.ModTime, h.ModTime)
}
