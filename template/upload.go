package template

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"soulbox.dev/soulbox/sandbox"
)

// uploadFile is where files are that an owner has sent, by the name that his client gave them. Neither becomes part of a path.
func (s *Store) uploadFile(owner, name string) string {
	return s.file("uploads", hashOf(owner, name)+".tar")
}

// HasUpload says whether an owner has sent files of a name, which then are kept for a while.
func (s *Store) HasUpload(owner, name string) bool { return touch(s.uploadFile(owner, name)) == nil }

// SaveUpload keeps files of an owner's builds: a tar, which may be compressed, and is not looked at yet.
func (s *Store) SaveUpload(owner, name string, from io.Reader) error {
	body := &atMost{r: from, left: maxContext}
	err := s.write(s.uploadFile(owner, name), func(f *os.File) error {
		_, err := io.Copy(f, s.whileRoom(body))
		return err
	})
	if err != nil {
		return fmt.Errorf("keep the files of a build: %w", err)
	}
	return nil
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
	return s.ReadContext(ctx, f)
}
