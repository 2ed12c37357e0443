package guest

import (
	"cmp"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"soulbox.dev/soulbox/agent"
)

// fileWriter writes a file; unless commit succeeds, nothing of it remains.
type fileWriter struct {
	file   *os.File
	temp   string // commit renames it to target; "" if the file is written in place
	target string
	mode   string // of a file that did not exist when openWrite began: decides what commit does if it exists by then
	turns  *turns
	size   int64 // of a file that is written in place, before the writing
	wrote  int64
	done   bool
}

// Write implements io.Writer.
func (w *fileWriter) Write(p []byte) (int, error) {
	n, err := w.file.Write(p)
	w.wrote += int64(n)
	return n, err
}

func (s *Server) openWrite(h agent.Header) (_ *fileWriter, err error) {
	if err := checkPath("write", h.Path); err != nil {
		return nil, err
	}
	owner, err := s.lookup(h.User)
	if err != nil {
		return nil, err
	}
	target := path.Clean(h.Path)
	if h.Parents {
		if err := s.makeDirs(path.Dir(target), owner); err != nil {
			return nil, err
		}
	}
	perm := fs.FileMode(cmp.Or(h.Perm, 0o644)) & 0o7777
	old, err := os.Stat(target)
	switch {
	case err == nil && old.IsDir():
		return nil, &fs.PathError{Op: "write", Path: target, Err: syscall.EISDIR}
	case err == nil && !old.Mode().IsRegular():
		return nil, fmt.Errorf("write %s: it is a %s: %w", quoted(target), describeMode(old.Mode()), agent.ErrNotRegular)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	exists := err == nil
	switch h.Mode {
	case "", agent.ModeReplace:
	case agent.ModeCreate:
		if exists {
			return nil, &fs.PathError{Op: "create", Path: target, Err: syscall.EEXIST}
		}
	case agent.ModeAppend:
		if exists {
			return openAppend(target, &s.turns)
		}
	default:
		return nil, agent.Invalid("write: mode %q is none of replace, append, create", agent.Clip(h.Mode, 40))
	}
	if exists {
		// Replace the target of a link, not the link.
		if target, err = resolve(target); err != nil {
			return nil, err
		}
		perm = old.Mode().Perm()
		if st, ok := old.Sys().(*syscall.Stat_t); ok {
			owner.uid, owner.gid = st.Uid, st.Gid
		}
	}
	w, err := s.openTemp(target, perm, owner, attrsOver(target, h))
	if err == nil && !exists {
		w.mode = h.Mode
	}
	return w, err
}

// attrsOver returns the attributes of a file that is written over another: the given ones and, with AttrsBelow, the old ones that they do
// not replace.
func attrsOver(target string, h agent.Header) map[string]string {
	if h.Attrs == nil || h.AttrsBelow == "" {
		return h.Attrs
	}
	attrs := map[string]string{}
	for name, value := range readAttrs(target) {
		if !strings.HasPrefix(name, h.AttrsBelow) {
			attrs[name] = value
		}
	}
	maps.Copy(attrs, h.Attrs)
	return attrs
}

// resolve follows the links of an existing path.
func resolve(name string) (string, error) {
	for range resolveTries {
		real, err := resolveOnce(name)
		if err != nil || real != "" {
			return real, err
		}
	}
	return "", &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
}

// resolveTries is how often a name is looked up of whose file another one takes the place.
const resolveTries = 100

// resolveOnce gives nothing if another file has taken the place of the one that it found: the kernel then names it "NAME (deleted)", which
// must not be taken for a name.
func resolveOnce(name string) (string, error) {
	fd, err := unix.Open(name, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", &fs.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(fd)
	real, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil || !strings.HasSuffix(real, " (deleted)") {
		return real, err
	}
	var found, there unix.Stat_t
	if err := unix.Fstat(fd, &found); err != nil {
		return "", &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	if unix.Lstat(real, &there) == nil && there.Dev == found.Dev && there.Ino == found.Ino {
		return real, nil // it has that name
	}
	return "", nil
}

// openAppend opens an existing file to write at its end.
func openAppend(target string, turns *turns) (*fileWriter, error) {
	f, err := os.OpenFile(target, os.O_WRONLY|os.O_APPEND|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &fileWriter{file: f, target: target, turns: turns, size: st.Size()}, nil
}

// openTemp creates a file that will become target. Its attributes are the given ones, or else those of the target.
func (s *Server) openTemp(target string, perm fs.FileMode, owner identity, attrs map[string]string) (*fileWriter, error) {
	if err := checkAttrs(attrs); err != nil {
		return nil, err
	}
	if attrs == nil {
		attrs = readAttrs(target)
	}
	random := make([]byte, 6)
	rand.Read(random)
	temp := path.Join(path.Dir(target), tempPrefix+hex.EncodeToString(random))
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return nil, err
	}
	w := &fileWriter{file: f, temp: temp, target: target, turns: &s.turns}
	if err := errors.Join(f.Chmod(perm), s.give(temp, owner), setAttrs(temp, attrs)); err != nil {
		w.abort()
		return nil, err
	}
	return w, nil
}

// commit makes the written file visible under its name, while no other call changes that.
func (w *fileWriter) commit() error {
	done := w.turns.take(fileOf(w.target))
	defer done()
	return w.commitNow()
}

// commitNow is commit for a caller that has the turn of the target.
func (w *fileWriter) commitNow() error {
	if err := w.file.Close(); err != nil {
		return err
	}
	if w.temp != "" {
		if err := w.rename(); err != nil {
			return err
		}
	}
	w.done = true
	return nil
}

// rename gives the file its name. A target that did not exist when openWrite began, but has been created meanwhile, is not replaced: in
// mode append the content is appended to it, and mode create fails.
func (w *fileWriter) rename() error {
	if w.mode != agent.ModeCreate && w.mode != agent.ModeAppend {
		return os.Rename(w.temp, w.target)
	}
	err := unix.Renameat2(unix.AT_FDCWD, w.temp, unix.AT_FDCWD, w.target, unix.RENAME_NOREPLACE)
	if err == nil {
		return nil
	}
	if err != unix.EEXIST || w.mode == agent.ModeCreate {
		return &fs.PathError{Op: "create", Path: w.target, Err: err}
	}
	from, err := os.Open(w.temp)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := openAppend(w.target, w.turns)
	if err != nil {
		return err
	}
	defer to.abort()
	if _, err := io.Copy(to, from); err != nil {
		return err
	}
	if err := to.commitNow(); err != nil {
		return err
	}
	_ = os.Remove(w.temp) // its content is in the target
	return nil
}

// abort undoes everything unless commit has succeeded. What others have appended meanwhile stays.
func (w *fileWriter) abort() {
	if w.done {
		return
	}
	if w.temp == "" {
		if st, err := w.file.Stat(); err == nil && st.Size() == w.size+w.wrote {
			_ = w.file.Truncate(w.size) // after an error, such as of a lost disk, there is nothing else to try
		}
	}
	_ = w.file.Close()
	if w.temp != "" {
		_ = os.Remove(w.temp)
	}
}

// tempPrefix begins the names of temporary files that are renamed once they are complete.
const tempPrefix = ".soulbox-"
