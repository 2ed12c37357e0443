package template

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"soulbox.dev/soulbox/sandbox"
)

// Bounds of what an owner may have sent and not used for a day.
const (
	maxUploads     = 200
	maxUploadBytes = 2 * maxContext
)

// uploadsOf begins the names of the files of an owner, and uploadFile is where files are by the name that his client gave them. Neither
// name becomes part of a path.
func uploadsOf(owner string) string { return hashOf(owner)[:20] + "-" }

func (s *Store) uploadFile(owner, name string) string {
	return s.file("uploads", uploadsOf(owner)+hashOf(name)+".tar")
}

// HasUpload says whether an owner has sent files of a name, which then are kept for a while.
func (s *Store) HasUpload(owner, name string) bool { return touch(s.uploadFile(owner, name)) == nil }

// SaveUpload keeps files of an owner's builds: a tar, which may be compressed, and is not looked at yet.
func (s *Store) SaveUpload(owner, name string, from io.Reader) error {
	left, err := s.roomForUploads(owner)
	if err != nil {
		return err
	}
	body := &atMost{r: from, left: min(left, maxContext)}
	err = s.write("uploads", s.uploadFile(owner, name), func(f *os.File) error {
		_, err := io.Copy(f, s.whileRoom(body))
		return err
	})
	if err != nil {
		return fmt.Errorf("keep the files of a build: %w", s.noRoom(err))
	}
	return nil
}

// roomForUploads is how many bytes an owner may still send.
func (s *Store) roomForUploads(owner string) (int64, error) {
	n, left := 0, int64(maxUploadBytes)
	err := s.each("uploads", func(name string) error {
		if !strings.HasPrefix(filepath.Base(name), uploadsOf(owner)) {
			return nil
		}
		info, err := os.Stat(name)
		if err == nil {
			n++
			left -= info.Size()
		}
		return err
	})
	if err == nil && (n >= maxUploads || left <= 0) {
		err = fmt.Errorf("you have sent %d files of builds that were not used; they are kept for a day: %w", n, sandbox.ErrTooMany)
	}
	return left, err
}

// OpenUpload gives files that an owner has sent.
func (s *Store) OpenUpload(ctx context.Context, owner, name string) (*Files, error) {
	f, err := os.Open(s.uploadFile(owner, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the files %s were not sent, or too long ago; send them again: %w", clip(name), sandbox.ErrInvalid)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return s.ReadContext(ctx, owner, f)
}
