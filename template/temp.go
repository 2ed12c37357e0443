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

// Prefixes of temporary names. While a file's lock is held, its maker lives; otherwise tidy removes the file.
const (
	tempPrefix = ".temp-" // being made
	gonePrefix = ".gone-" // being removed
	lockPrefix = ".lock-" // keeps two jobs from making the same thing
)

// walkable are the directories of files that sandboxes boot from: the sandboxes' user may enter these and no others.
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

// temp makes a file of a kind. The file is removed if its maker dies before it is renamed. The caller closes it after it has renamed or
// removed it.
func (s *Store) temp(kind string) (*os.File, error) {
	if err := s.makeKind(kind); err != nil {
		return nil, err
	}
	if _, err := s.Durable.Step("create", s.file(kind, ""), 0); err != nil {
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
		if cerr := f.Close(); err != nil && err != unix.EWOULDBLOCK || cerr != nil { // otherwise tidy has removed it: try again
			return nil, errors.Join(err, cerr, os.Remove(f.Name()))
		}
	}
}

// linked reports whether an open file still has a name.
func linked(f *os.File) bool {
	var st unix.Stat_t
	return unix.Fstat(int(f.Fd()), &st) == nil && st.Nlink > 0
}

// abandoned reports whether the lock of a file is free.
func abandoned(name string) bool {
	f, err := os.Open(name)
	if err != nil {
		return false
	}
	defer f.Close()
	return durable.Flock(f, unix.LOCK_EX|unix.LOCK_NB) == nil
}

// tidy removes what dead servers were making or removing.
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

// collecting takes the lock between Collect (unix.LOCK_EX), which removes what is not needed, and jobs that declare what they need
// (unix.LOCK_SH). Both hold it only briefly.
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

// seal restricts a file to those who must read it: the server's user, and for an image also the sandboxes' user.
func (s *Store) seal(f *os.File, image bool) error {
	if image && s.UID != 0 {
		return errors.Join(f.Chown(os.Geteuid(), s.GID), f.Chmod(0o640))
	}
	return f.Chmod(0o600)
}

// sealExisting is seal for an existing file: older versions left some readable to everybody.
func (s *Store) sealExisting(name string, image bool) error {
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
