package template

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"soulbox.dev/soulbox/internal/durable"
)

// How names begin of what is not there for good. As long as somebody has the lock of a file, its maker lives; else tidy removes it.
const (
	tempPrefix = ".temp-" // is being made
	gonePrefix = ".gone-" // is being removed
	lockPrefix = ".lock-" // keeps two from making the same
)

// walkable are the kinds of files that sandboxes boot from: their user walks to them, and to no others.
var walkable = map[string]fs.FileMode{"images": 0o711, "started": 0o711}

// kinds are all directories of the store.
var kinds = []string{"names", "layers", "images", "steps", "builds", "started", "caches", "uploads", jobsKind}

func (s *Store) makeKind(kind string) error {
	mode, ok := walkable[kind]
	if !ok {
		mode = 0o700
	}
	if err := os.MkdirAll(s.Dir, 0o711); err != nil {
		return err
	}
	err := os.Mkdir(s.file(kind, ""), mode)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

// temp makes a file of a kind that is removed when its maker dies before it has another name. Whoever made it closes it once it has, or
// is removed.
func (s *Store) temp(kind string) (*os.File, error) {
	if err := s.makeKind(kind); err != nil {
		return nil, err
	}
	for {
		f, err := os.CreateTemp(s.file(kind, ""), tempPrefix)
		if err != nil {
			return nil, err
		}
		err = durable.Flock(f, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil && linked(f) {
			return f, nil
		}
		if cerr := f.Close(); err != nil && err != unix.EWOULDBLOCK || cerr != nil { // else tidy was here
			return nil, errors.Join(err, cerr, os.Remove(f.Name()))
		}
	}
}

// linked says whether an open file still has a name.
func linked(f *os.File) bool {
	var st unix.Stat_t
	return unix.Fstat(int(f.Fd()), &st) == nil && st.Nlink > 0
}

// abandoned says whether nobody has the lock of a file.
func abandoned(name string) bool {
	f, err := os.Open(name)
	if err != nil {
		return false
	}
	defer f.Close()
	return durable.Flock(f, unix.LOCK_EX|unix.LOCK_NB) == nil
}

// tidy removes what servers that are dead were making, or removing.
func (s *Store) tidy(kind string, entries []os.DirEntry) (err error) {
	for _, e := range entries {
		name := e.Name()
		for _, prefix := range []string{tempPrefix, gonePrefix, lockPrefix} {
			if strings.HasPrefix(name, prefix) && abandoned(s.file(kind, name)) {
				err = errors.Join(err, os.RemoveAll(s.file(kind, name)))
			}
		}
	}
	return err
}

// collecting takes the lock between Collect (unix.LOCK_EX), which removes what nobody needs, and those who say what they need
// (unix.LOCK_SH). Both have it for a moment.
func (s *Store) collecting(ctx context.Context, how int) (unlock func(), err error) {
	if err := os.MkdirAll(s.Dir, 0o711); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(s.Dir, ".collecting"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := durable.Flock(f, how|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if err != unix.EWOULDBLOCK {
			return nil, errors.Join(err, f.Close())
		}
		select {
		case <-time.After(lockPoll):
		case <-ctx.Done():
			return nil, errors.Join(context.Cause(ctx), f.Close())
		}
	}
}

// seal has only those read a file who have to: the server's user, and of an image also whom sandboxes run as.
func (s *Store) seal(f *os.File, image bool) error {
	if image && s.UID != 0 {
		return errors.Join(f.Chown(os.Geteuid(), s.GID), f.Chmod(0o640))
	}
	return f.Chmod(0o600)
}

// sealed is seal of a file that is there: older versions left some to everybody.
func (s *Store) sealed(name string, image bool) error {
	info, err := os.Lstat(name)
	if err != nil || !info.Mode().IsRegular() || info.Mode().Perm()&0o007 == 0 {
		return err
	}
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(s.seal(f, image), f.Close())
}
