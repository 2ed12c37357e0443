package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"soulbox.dev/soulbox/agent"
)

const (
	maxPath  = 4096
	maxAttrs = 64
)

// checkPath allows only clean absolute paths, so that a path has one meaning.
func checkPath(op, name string) error {
	switch {
	case name == "":
		return agent.Invalid("%s: the path is empty", op)
	case strings.IndexByte(name, 0) >= 0:
		return agent.Invalid("%s: the path contains a NUL byte", op)
	case len(name) > maxPath:
		return fmt.Errorf("%s: the path has %d bytes: %w", op, len(name), syscall.ENAMETOOLONG)
	case !path.IsAbs(name):
		return agent.Invalid("%s %s: the path is relative", op, quoted(name))
	case slices.Contains(strings.Split(name, "/"), ".."):
		return agent.Invalid("%s %s: the path contains \"..\"", op, quoted(name))
	}
	return nil
}

// openRegular opens a regular file for reading and never blocks, neither on a FIFO nor on a device or a lease.
func openRegular(name string) (*os.File, error) {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	switch {
	case info.IsDir():
		return nil, errors.Join(&fs.PathError{Op: "read", Path: name, Err: syscall.EISDIR}, f.Close())
	case !info.Mode().IsRegular():
		return nil, errors.Join(fmt.Errorf("open %s: it is a %s: %w", quoted(name), describeMode(info.Mode()), agent.ErrNotRegular),
			f.Close())
	}
	return f, nil
}

func describeMode(m fs.FileMode) string {
	switch {
	case m&fs.ModeNamedPipe != 0:
		return "named pipe"
	case m&fs.ModeSocket != 0:
		return "socket"
	case m&fs.ModeDevice != 0:
		return "device"
	}
	return "special file"
}

// describeFile makes a FileInfo; name is the path as the caller wrote it.
func describeFile(name string, info fs.FileInfo, owners ownerNames) agent.FileInfo {
	f := agent.FileInfo{Path: name, Type: agent.TypeOther, Size: info.Size(), Mode: fmt.Sprintf("%04o", unixMode(info.Mode())),
		MTime: info.ModTime()}
	switch {
	case info.Mode().IsRegular():
		f.Type = agent.TypeFile
	case info.IsDir():
		f.Type = agent.TypeDir
	case info.Mode()&fs.ModeSymlink != 0:
		f.Type = agent.TypeSymlink
		if target, err := os.Readlink(name); err == nil {
			f.Target = target
		}
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		f.Owner, f.Group = nameOf(owners.users, st.Uid), nameOf(owners.groups, st.Gid)
	}
	return f
}

// describeLink describes a file itself, and where it leads if it is a symlink.
func describeLink(name string, info fs.FileInfo) *agent.Link {
	l := &agent.Link{Permissions: info.Mode().String()}
	if info.Mode()&fs.ModeSymlink == 0 {
		return l
	}
	target, err := filepath.EvalSymlinks(name)
	if err != nil {
		return l
	}
	if there, err := os.Lstat(target); err == nil {
		d := describeFile(target, there, ownerNames{})
		l.Target, l.Type, l.Mode = target, d.Type, d.Mode
	}
	return l
}

func unixMode(m fs.FileMode) uint32 {
	mode := uint32(m.Perm())
	for bit, unixBit := range map[fs.FileMode]uint32{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if m&bit != 0 {
			mode |= unixBit
		}
	}
	return mode
}

func (s *Server) stat(r agent.PathRequest) (agent.FileInfo, error) {
	if err := checkPath("stat", r.Path); err != nil {
		return agent.FileInfo{}, err
	}
	info, err := os.Stat(r.Path)
	if r.Links || errors.Is(err, fs.ErrNotExist) {
		info, err = os.Lstat(r.Path) // a dangling link exists
	}
	if err != nil {
		return agent.FileInfo{}, err
	}
	f := describeFile(r.Path, info, s.ownerNames())
	if r.Links {
		f.Link = describeLink(r.Path, info)
		f.Link.Real, _ = filepath.EvalSymlinks(r.Path) // empty for a link that leads nowhere
	}
	f.Attrs = readAttrs(r.Path)
	return f, nil
}

// dir lists a tree, depth first and in path order, without following symlinks.
func (s *Server) dir(r agent.DirRequest) (agent.DirResult, error) {
	if err := checkPath("list", r.Path); err != nil {
		return agent.DirResult{}, err
	}
	limit := r.Limit
	if limit <= 0 || limit > agent.MaxEntries {
		limit = agent.MaxEntries
	}
	l := lister{owners: s.ownerNames(), limit: limit, links: r.Links, room: agent.MaxMessage * 9 / 10,
		result: agent.DirResult{Entries: []agent.FileInfo{}}}
	if r.After != "" {
		l.after = strings.Split(path.Clean(r.After), "/")
	}
	err := l.list(path.Clean(r.Path), max(r.Depth, 1))
	return l.result, err
}

type lister struct {
	owners ownerNames
	limit  int
	links  bool
	after  []string // the elements of the path after which the list begins
	room   int      // bytes left in the message
	result agent.DirResult
}

func (l *lister) list(dir string, depth int) error {
	f, err := os.OpenFile(dir, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	// Read in batches up to a bound: a directory may have millions of entries.
	var names []string
	for len(names) <= 4*agent.MaxEntries {
		batch, err := f.Readdirnames(1000)
		names = append(names, batch...)
		if err != nil {
			break // io.EOF; after another error, what could be read is listed
		}
	}
	_ = f.Close()
	slices.Sort(names)
	for _, name := range names {
		full := path.Join(dir, name)
		known, above := l.isKnown(full)
		if known && !above {
			continue
		}
		if known {
			if err := l.below(full, depth); err != nil {
				return err
			}
			continue
		}
		if len(l.result.Entries) >= l.limit || l.room < encodedSize(full)+300 {
			l.result.More = true
			return nil
		}
		info, err := os.Lstat(full)
		if err != nil {
			continue // removed meanwhile
		}
		entry := describeFile(full, info, l.owners)
		size := encodedSize(full, entry.Target, entry.Owner, entry.Group) + 300
		if l.links {
			entry.Link = describeLink(full, info)
			entry.Attrs = readAttrs(full)
			size += encodedSize(entry.Link.Target) + 100
			for k, v := range entry.Attrs {
				size += encodedSize(k, v) + 10
			}
		}
		if l.room -= size; l.room < 0 {
			l.result.More = true
			return nil
		}
		l.result.Entries = append(l.result.Entries, entry)
		if info.IsDir() {
			if err := l.below(full, depth); err != nil {
				return err
			}
		}
	}
	return nil
}

// below lists a subdirectory of the tree, unless that is too deep. A subdirectory that was removed meanwhile counts as empty.
func (l *lister) below(dir string, depth int) error {
	if depth <= 1 {
		return nil
	}
	err := l.list(dir, depth-1)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.ENOTDIR) {
		return nil
	}
	return err
}

// isKnown reports whether a file is not after the path l.after, and whether it is that path or a directory above it.
func (l *lister) isKnown(name string) (known, above bool) {
	if l.after == nil {
		return false, false
	}
	at := strings.Split(name, "/")
	if slices.Compare(at, l.after) > 0 {
		return false, false
	}
	return true, len(at) <= len(l.after) && slices.Equal(at, l.after[:len(at)])
}

func (s *Server) mkdir(r agent.PathRequest) (agent.FileInfo, error) {
	if err := checkPath("mkdir", r.Path); err != nil {
		return agent.FileInfo{}, err
	}
	owner, err := s.lookup(r.User)
	if err != nil {
		return agent.FileInfo{}, err
	}
	if err := s.makeDirs(path.Dir(path.Clean(r.Path)), owner); err != nil {
		return agent.FileInfo{}, err
	}
	if err := os.Mkdir(r.Path, 0o755); err != nil {
		return agent.FileInfo{}, err
	}
	if err := s.give(r.Path, owner); err != nil {
		return agent.FileInfo{}, err
	}
	return s.stat(agent.PathRequest{Path: r.Path})
}

// makeDirs creates the missing directories of a path and gives them to owner.
func (s *Server) makeDirs(dir string, owner identity) error {
	if info, err := os.Stat(dir); err == nil {
		if !info.IsDir() {
			return &fs.PathError{Op: "mkdir", Path: dir, Err: syscall.ENOTDIR}
		}
		return nil
	}
	if parent := path.Dir(dir); parent != dir {
		if err := s.makeDirs(parent, owner); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return s.give(dir, owner)
}

// give changes the owner of a new file. Outside a sandbox everything belongs to the agent's user.
func (s *Server) give(name string, owner identity) error {
	if !s.opts.Init {
		return nil
	}
	return os.Lchown(name, int(owner.uid), int(owner.gid))
}

func (s *Server) move(r agent.MoveRequest) (agent.FileInfo, error) {
	if err := errors.Join(checkPath("move", r.From), checkPath("move to", r.To)); err != nil {
		return agent.FileInfo{}, err
	}
	if _, err := os.Lstat(r.From); err != nil {
		return agent.FileInfo{}, err
	}
	owner, err := s.lookup(r.User)
	if err != nil {
		return agent.FileInfo{}, err
	}
	if err := s.makeDirs(path.Dir(path.Clean(r.To)), owner); err != nil {
		return agent.FileInfo{}, err
	}
	done := s.turns.take(placeOf(r.From), placeOf(r.To))
	defer done()
	err = os.Rename(r.From, r.To)
	if errors.Is(err, syscall.EXDEV) {
		err = s.moveAcross(r.From, r.To)
	}
	if err != nil {
		return agent.FileInfo{}, err
	}
	info, err := os.Lstat(r.To)
	if err != nil {
		return agent.FileInfo{}, err
	}
	return describeFile(r.To, info, s.ownerNames()), nil
}

// moveAcross moves between file systems with mv(1), which copies everything, then removes it. Every sandbox image has mv.
func (s *Server) moveAcross(from, to string) error {
	_, lerr := os.Lstat(to)
	fresh := errors.Is(lerr, fs.ErrNotExist)
	p, err := s.spawn(agent.StartRequest{Args: []string{"mv", "-T", "--", from, to}, Cwd: "/", User: s.rootUser()})
	if err != nil {
		return err
	}
	<-p.done
	d := p.describe()
	if d.ExitCode != 0 {
		if fresh {
			_ = os.RemoveAll(to) // the incomplete copy
		}
		out, _ := p.output.window(agent.Window{Head: 1000})
		return fmt.Errorf("move across file systems: %s", strings.TrimSpace(string(out.Head)))
	}
	return nil
}

func (s *Server) rootUser() string {
	if s.opts.Init {
		return "0"
	}
	return ""
}

func (s *Server) remove(r agent.PathRequest) (struct{}, error) {
	none := struct{}{}
	if err := checkPath("remove", r.Path); err != nil {
		return none, err
	}
	clean := path.Clean(r.Path)
	if clean == "/" {
		return none, agent.Invalid("remove: the root directory cannot be removed")
	}
	if _, err := os.Lstat(clean); err != nil {
		return none, err
	}
	done := s.turns.take(placeOf(clean))
	defer done()
	if r.Recursive {
		return none, os.RemoveAll(clean)
	}
	return none, os.Remove(clean)
}

// setattr sets user.* extended attributes.
func (s *Server) setattr(r agent.PathRequest) (agent.FileInfo, error) {
	if err := checkPath("setattr", r.Path); err != nil {
		return agent.FileInfo{}, err
	}
	if err := checkAttrs(r.Attrs); err != nil {
		return agent.FileInfo{}, err
	}
	if err := setAttrs(r.Path, r.Attrs); err != nil {
		return agent.FileInfo{}, err
	}
	return s.stat(r)
}

func checkAttrs(attrs map[string]string) error {
	if len(attrs) > maxAttrs {
		return agent.Invalid("%d attributes, at most %d are possible", len(attrs), maxAttrs)
	}
	for name := range attrs {
		if name == "" || strings.IndexByte(name, 0) >= 0 {
			return agent.Invalid("setattr: %q is not a name of an attribute", agent.Clip(name, 80))
		}
	}
	return nil
}

// setAttrs sets attributes; an empty value removes one.
func setAttrs(file string, attrs map[string]string) error {
	for _, name := range slices.Sorted(maps.Keys(attrs)) {
		var err error
		if value := attrs[name]; value != "" {
			err = unix.Setxattr(file, "user."+name, []byte(value), 0)
		} else if err = unix.Removexattr(file, "user."+name); err == unix.ENODATA {
			err = nil
		}
		if err != nil {
			return &fs.PathError{Op: "setattr", Path: file, Err: err}
		}
	}
	return nil
}

func readAttrs(name string) map[string]string {
	buf := make([]byte, 64<<10)
	n, err := unix.Listxattr(name, buf)
	if err != nil || n <= 0 {
		return nil
	}
	attrs := map[string]string{}
	for _, key := range strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		short, ok := strings.CutPrefix(key, "user.")
		if !ok || len(attrs) >= maxAttrs {
			continue
		}
		value := make([]byte, 4<<10)
		if n, err := unix.Getxattr(name, key, value); err == nil {
			attrs[short] = string(value[:n])
		}
	}
	if len(attrs) == 0 {
		return nil
	}
	return attrs
}
