package agent

import (
	"cmp"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strconv"
	"syscall"

	"github.com/hashicorp/yamux"
	"golang.org/x/sys/unix"
)

// serveRead sends a file.
func (s *Server) serveRead(stream *yamux.Stream, h header) {
	f, info, err := s.openRead(h)
	if err != nil {
		_ = writeMessage(stream, answer{Error: wireError(err)})
		return
	}
	defer f.Close()
	if err := writeMessage(stream, answer{Info: &info}); err != nil {
		return
	}
	giveUpOnClose(stream)
	var from io.Reader = f
	if h.Limit >= 0 {
		from = io.LimitReader(f, h.Limit)
	}
	src := &sourceReader{r: from}
	_, err = writeChunks(stream, src)
	if err != nil && src.err == nil {
		return // the host is gone
	}
	end := answer{}
	if src.err != nil {
		end.Error = wireError(src.err)
	}
	_ = endChunks(stream, end)
}

func (s *Server) openRead(h header) (*os.File, FileInfo, error) {
	if err := checkPath("read", h.Path); err != nil {
		return nil, FileInfo{}, err
	}
	f, err := openRegular(h.Path)
	if err != nil {
		return nil, FileInfo{}, err
	}
	st, err := f.Stat()
	if err == nil && h.Offset > 0 {
		_, err = f.Seek(h.Offset, io.SeekStart)
	}
	if err != nil {
		return nil, FileInfo{}, errors.Join(err, f.Close())
	}
	return f, describeFile(h.Path, st, s.ownerNames()), nil
}

// serveWrite receives a file. A replaced file is the old one until all has arrived, then the new one.
func (s *Server) serveWrite(stream *yamux.Stream, h header) {
	w, err := s.openWrite(h)
	if err != nil {
		_ = writeMessage(stream, answer{Error: wireError(err)})
		return
	}
	defer w.abort()
	if err := writeMessage(stream, answer{}); err != nil {
		return
	}
	if _, err = io.Copy(w.file, &chunkReader{r: stream}); err == nil {
		err = w.commit()
	}
	a := answer{}
	if err != nil {
		a.Error = wireError(err)
	} else if info, err := s.stat(PathRequest{Path: h.Path}); err != nil {
		a.Error = wireError(err)
	} else {
		a.Info = &info
	}
	_ = writeMessage(stream, a)
}

// fileWriter writes a file; nothing of it is left unless commit succeeds.
type fileWriter struct {
	file   *os.File
	temp   string // renamed to target by commit; "" when the file is written in place
	target string
	undo   func() error // of a write in place
	done   bool
}

func (s *Server) openWrite(h header) (_ *fileWriter, err error) {
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
		return nil, fmt.Errorf("write %q: it is a %s: %w", target, describeMode(old.Mode()), ErrNotRegular)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	exists := err == nil
	switch h.Mode {
	case "", ModeReplace:
	case ModeCreate:
		if exists {
			return nil, &fs.PathError{Op: "create", Path: target, Err: syscall.EEXIST}
		}
	case ModeAppend:
		if exists {
			return openAppend(target, old.Size())
		}
	default:
		return nil, invalid("write: mode %q is none of replace, append, create", clip(h.Mode, 40))
	}
	if exists {
		// Replace what a link points to, not the link.
		if target, err = resolve(target); err != nil {
			return nil, err
		}
		perm = old.Mode().Perm()
		if st, ok := old.Sys().(*syscall.Stat_t); ok {
			owner.uid, owner.gid = st.Uid, st.Gid
		}
	}
	return s.openTemp(target, perm, owner, h.Attrs)
}

// resolve follows the links of an existing path.
func resolve(name string) (string, error) {
	fd, err := unix.Open(name, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", &fs.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(fd)
	return os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
}

func openAppend(target string, size int64) (*fileWriter, error) {
	f, err := os.OpenFile(target, os.O_WRONLY|os.O_APPEND|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	return &fileWriter{file: f, target: target, undo: func() error { return f.Truncate(size) }}, nil
}

// openTemp begins a file that is to become target, with the attributes that it is given, or else those of the target.
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
	w := &fileWriter{file: f, temp: temp, target: target}
	if err := errors.Join(f.Chmod(perm), s.give(temp, owner), setAttrs(temp, attrs)); err != nil {
		w.abort()
		return nil, err
	}
	return w, nil
}

func (w *fileWriter) commit() error {
	if err := w.file.Close(); err != nil {
		return err
	}
	if w.temp != "" {
		if err := os.Rename(w.temp, w.target); err != nil {
			return err
		}
	}
	w.done = true
	return nil
}

// abort takes back everything unless commit has succeeded.
func (w *fileWriter) abort() {
	if w.done {
		return
	}
	if w.undo != nil {
		_ = w.undo() // the disk may be gone; there is nothing else to try
	}
	_ = w.file.Close()
	if w.temp != "" {
		_ = os.Remove(w.temp)
	}
}

// tempPrefix begins the names of files that become others when they are whole.
const tempPrefix = ".soulbox-"
