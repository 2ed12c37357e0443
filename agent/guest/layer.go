package guest

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/yamux"
	"golang.org/x/sys/unix"
	"soulbox.dev/soulbox/agent"
)

// maxMarked bounds the number of files that a mark remembers.
const maxMarked = 2_000_000

// fileKey tells whether a file has changed: only the kernel can set the time of the last status change.
type fileKey struct {
	ino   uint64
	ctime unix.Timespec
}

// marked is the state of the file system when it was last looked at: for each directory, its own key as "." and the keys of its entries. It
// is safe for concurrent use; calls wait for each other.
type marked struct {
	mu   sync.Mutex
	dirs map[string]map[string]fileKey
}

// serveChanges sends the changes since the last time as a layer, a tar in which whiteouts stand for removed files. With h.Mode "mark" it
// only remembers the state and sends nothing; with "all" it sends everything and remembers nothing.
func (s *Server) serveChanges(ctx context.Context, stream *yamux.Stream, h agent.Header) {
	if h.Mode != agent.ModeAll {
		s.marked.mu.Lock()
		defer s.marked.mu.Unlock()
	}
	if h.Mode == "" && s.marked.dirs == nil {
		_ = agent.WriteMessage(stream, agent.Answer{Error: wireError(agent.Invalid("changes: there is no mark to compare with"))})
		return
	}
	shells := s.shells.dir
	// They are made now, so that their parents do not count as changed later.
	if err := errors.Join(os.MkdirAll(s.opts.SpoolDir, 0o700), os.MkdirAll(shells, 0o700)); err != nil {
		_ = agent.WriteMessage(stream, agent.Answer{Error: wireError(err)})
		return
	}
	if err := agent.WriteMessage(stream, agent.Answer{}); err != nil {
		return
	}
	ctx, cancel := untilClosed(ctx, stream)
	defer cancel()
	from, to := io.Pipe()
	defer from.Close() // ends the walk if the reader stops early
	out := bufio.NewWriterSize(to, 128<<10)
	w := &layerWriter{ctx: ctx, now: map[string]map[string]fileKey{}, links: map[uint64]string{},
		skip: map[string]bool{path.Clean(s.opts.SpoolDir): true, path.Clean(shells): true, agentPath: true, agent.BuildDir: true}}
	if h.Mode != agent.ModeAll {
		w.old = s.marked.dirs
	}
	if h.Mode != agent.ModeMark {
		w.tar = tar.NewWriter(out)
	}
	var walk sync.WaitGroup
	walk.Go(func() {
		err := w.run(h.Path)
		if err == nil {
			err = out.Flush()
		}
		_ = to.CloseWithError(err) // nil closes it with io.EOF
	})
	src := &agent.SourceReader{R: from}
	_, err := agent.WriteChunks(stream, src)
	_ = from.Close()
	walk.Wait()
	if err != nil && src.Err == nil {
		return // the host is gone
	}
	end := agent.Answer{}
	if src.Err != nil {
		end.Error = wireError(src.Err)
	} else if h.Mode != agent.ModeAll {
		s.marked.dirs = w.now
	}
	_ = agent.EndChunks(stream, end)
}

const (
	// agentPath is the directory of the agent's binary, which is not one of the sandbox's files.
	agentPath = "/.soulbox"
)

// layerWriter walks a file system. It does not enter directories that are mounted in it.
type layerWriter struct {
	ctx      context.Context // needed if nothing is written; otherwise the end of the pipe also ends the walk
	tar      *tar.Writer     // nil writes nothing
	old, now map[string]map[string]fileKey
	links    map[uint64]string // the first name of a file with several links, by inode
	skip     map[string]bool
	device   uint64
	count    int
}

func (w *layerWriter) run(root string) error {
	var st unix.Stat_t
	if err := unix.Stat(root, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: root, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return &fs.PathError{Op: "read", Path: root, Err: unix.ENOTDIR}
	}
	w.device = st.Dev
	if err := w.dir(root, "", &st); err != nil {
		return err
	}
	if w.tar == nil {
		return nil
	}
	return w.tar.Close()
}

// dir writes the changes in a directory; name is its path in the layer.
func (w *layerWriter) dir(full, name string, st *unix.Stat_t) error {
	if w.ctx.Err() != nil {
		return context.Cause(w.ctx)
	}
	names, err := readNames(full)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil // removed meanwhile
	}
	if err != nil {
		return err
	}
	if w.count += len(names); w.count > maxMarked {
		return fmt.Errorf("changes: more than %d files: %w", maxMarked, agent.ErrTooLarge)
	}
	old, keys := w.old[name], make(map[string]fileKey, len(names)+1)
	w.now[name] = keys
	keys["."] = fileKey{st.Ino, st.Ctim}
	if name != "" && old["."] != keys["."] {
		if err := w.entry(full, name, st); err != nil {
			return err
		}
	}
	stats := make([]unix.Stat_t, len(names))
	for i, base := range names {
		if name := filepath.Join(full, base); w.skip[name] || unix.Lstat(name, &stats[i]) != nil {
			stats[i].Mode = 0
			continue // hidden, or removed meanwhile
		}
		keys[base] = fileKey{stats[i].Ino, stats[i].Ctim}
	}
	if err := w.whiteouts(name, old, keys); err != nil {
		return err
	}
	for i, base := range names {
		full, name, st := filepath.Join(full, base), path.Join(name, base), &stats[i]
		switch {
		case st.Mode == 0:
		case st.Mode&unix.S_IFMT == unix.S_IFDIR:
			if st.Dev == w.device {
				err = w.dir(full, name, st)
			}
		case old[base] != keys[base]:
			err = w.entry(full, name, st)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// whiteouts writes what was removed from a directory, before its other entries.
func (w *layerWriter) whiteouts(name string, old, keys map[string]fileKey) error {
	if w.tar == nil {
		return nil
	}
	var gone []string
	for base := range old {
		if _, ok := keys[base]; !ok {
			gone = append(gone, base)
		}
	}
	slices.Sort(gone)
	for _, base := range gone {
		if err := w.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: path.Join(name, agent.Whiteout+base)}); err != nil {
			return err
		}
	}
	return nil
}

func readNames(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	slices.Sort(names)
	return names, err
}

// entry writes a file in its current state.
func (w *layerWriter) entry(full, name string, st *unix.Stat_t) error {
	if w.tar == nil {
		return nil
	}
	h := &tar.Header{Name: name, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		ModTime: time.Unix(int64(st.Mtim.Sec), 0)} // layers have a resolution of seconds
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
	case unix.S_IFLNK:
		target, err := os.Readlink(full)
		if err != nil {
			return ifThere(err)
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, target
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	case unix.S_IFREG:
		if first := w.links[st.Ino]; st.Nlink > 1 && first != "" {
			h.Typeflag, h.Linkname = tar.TypeLink, first
			break
		}
		if st.Nlink > 1 {
			w.links[st.Ino] = name
		}
		return w.file(full, h)
	default:
		return nil // a socket is nothing without its process
	}
	return w.tar.WriteHeader(h)
}

// file writes a regular file with the size that it has when it is opened, even if others change it meanwhile.
func (w *layerWriter) file(full string, h *tar.Header) error {
	f, err := openRegular(full)
	if err != nil {
		return ifThere(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	h.Typeflag, h.Size = tar.TypeReg, info.Size()
	if err := w.tar.WriteHeader(h); err != nil {
		return err
	}
	n, err := io.Copy(w.tar, io.LimitReader(f, h.Size))
	if err == nil && n < h.Size {
		_, err = io.CopyN(w.tar, zeroReader{}, h.Size-n)
	}
	return err
}

// ifThere returns nil instead of an error that says that the file is gone.
func ifThere(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, agent.ErrNotRegular) {
		return nil
	}
	return err
}

type zeroReader struct{}

// Read implements io.Reader.
func (zeroReader) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// serveUnpack unpacks a tar from the host below the directory h.Path. The tar is not a layer: whiteouts are ordinary names. Existing files
// are replaced, existing directories stay.
func (s *Server) serveUnpack(stream *yamux.Stream, h agent.Header) {
	if err := checkPath("unpack", h.Path); err != nil {
		_ = agent.WriteMessage(stream, agent.Answer{Error: wireError(err)})
		return
	}
	if err := agent.WriteMessage(stream, agent.Answer{}); err != nil {
		return
	}
	a := agent.Answer{}
	from := bufio.NewReaderSize(&agent.ChunkReader{R: stream}, 128<<10)
	err := unpack(path.Clean(h.Path), tar.NewReader(from))
	if err == nil {
		_, err = io.Copy(io.Discard, from) // reads what follows the tar, to the end
	}
	if err != nil {
		a.Error = wireError(err)
	}
	_ = agent.WriteMessage(stream, a)
}

func unpack(root string, from *tar.Reader) error {
	var dirs []*tar.Header // their times are set last, when nothing changes them any more
	for {
		h, err := from.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if h.Typeflag == tar.TypeXGlobalHeader { // of git archive; it does not describe a file
			continue
		}
		if err := unpackOne(root, h, from); err != nil {
			return err
		}
		if h.Typeflag == tar.TypeDir {
			dirs = append(dirs, h)
		}
	}
	for _, h := range slices.Backward(dirs) {
		if err := setTimes(below(root, h.Name), h); err != nil {
			return err
		}
	}
	return nil
}

// below returns a path below root, whatever the name is.
func below(root, name string) string { return path.Join(root, path.Clean("/"+name)) }

func unpackOne(root string, h *tar.Header, from io.Reader) error {
	name := below(root, h.Name)
	if err := os.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	old, err := os.Lstat(name)
	if err == nil && h.Typeflag != tar.TypeDir {
		if old.IsDir() {
			return &fs.PathError{Op: "unpack", Path: name, Err: syscall.EISDIR}
		}
		if err := os.Remove(name); err != nil {
			return err
		}
	}
	switch h.Typeflag {
	case tar.TypeDir:
		if st, err := os.Stat(name); err == nil && st.IsDir() { // a link to a directory stays
			break
		}
		err = os.Mkdir(name, 0o755)
	case tar.TypeReg:
		err = writeNew(name, from)
	case tar.TypeSymlink:
		err = os.Symlink(h.Linkname, name)
	case tar.TypeLink:
		return os.Link(below(root, h.Linkname), name)
	case tar.TypeFifo:
		err = unix.Mkfifo(name, 0o600)
	case tar.TypeChar:
		err = unix.Mknod(name, unix.S_IFCHR|0o600, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))))
	case tar.TypeBlock:
		err = unix.Mknod(name, unix.S_IFBLK|0o600, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))))
	default:
		return agent.Invalid("unpack %q: entries of type %q are not supported", agent.Clip(h.Name, 200), h.Typeflag)
	}
	if err != nil {
		return err
	}
	if err := os.Lchown(name, h.Uid, h.Gid); err != nil {
		return err
	}
	if h.Typeflag == tar.TypeSymlink {
		return setTimes(name, h)
	}
	if err := unix.Chmod(name, uint32(h.Mode&0o7777)); err != nil {
		return &fs.PathError{Op: "chmod", Path: name, Err: err}
	}
	if h.Typeflag == tar.TypeDir {
		return nil
	}
	return setTimes(name, h)
}

func writeNew(name string, from io.Reader) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, from)
	return errors.Join(err, f.Close())
}

func setTimes(name string, h *tar.Header) error {
	if h.ModTime.IsZero() {
		return nil
	}
	at := unix.NsecToTimespec(h.ModTime.UnixNano())
	flags := unix.AT_SYMLINK_NOFOLLOW
	if h.Typeflag == tar.TypeDir {
		flags = 0
	}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, name, []unix.Timespec{at, at}, flags); err != nil {
		return &fs.PathError{Op: "utimes", Path: name, Err: err}
	}
	return nil
}
