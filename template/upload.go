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

// Bounds of what an owner may have uploaded and not used for a day.
const (
	maxUploads     = 200
	maxUploadBytes = 2 * maxContext
)

// uploadsOf begins the names of an owner's files, and uploadFile is where a file is that the client has named. Both names are hashed, so
// neither becomes part of a path.
func uploadsOf(owner string) string { return hashOf(owner)[:20] + "-" }

func (s *Store) uploadFile(owner, name string) string {
	return s.file("uploads", uploadsOf(owner)+hashOf(name)+".tar")
}

// HasUpload reports whether an owner has uploaded files under a name. It keeps them for a while.
func (s *Store) HasUpload(owner, name string) bool { return touch(s.uploadFile(owner, name)) == nil }

// SaveUpload stores files for an owner's builds: a tar, which may be compressed. It does not read the tar.
func (s *Store) SaveUpload(owner, name string, from io.Reader) error {
	left, err := s.spaceForUploads(owner)
	if err != nil {
		return err
	}
	body := atMost(from, min(left, maxContext))
	err = s.write("uploads", s.uploadFile(owner, name), func(f *os.File) error {
		_, err := io.Copy(f, s.whileSpace(body))
		return err
	})
	if err != nil {
		return fmt.Errorf("keep the files of a build: %w", s.asNoSpace(err))
	}
	return nil
}

// spaceForUploads returns how many bytes an owner may still upload.
func (s *Store) spaceForUploads(owner string) (int64, error) {
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

// OpenUpload opens files that an owner has uploaded.
func (s *Store) OpenUpload(ctx context.Context, owner, name string) (*Files, error) {
	f, err := os.Open(s.uploadFile(owner, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the files %s were not sent, or have expired; send them again: %w", clip(name), sandbox.ErrInvalid)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return s.ReadContext(ctx, owner, f)
}
