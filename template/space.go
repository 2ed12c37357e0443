package template

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/sandbox"
)

// Disk is the disk space that the templates take and may take, in bytes.
type Disk struct{ Used, Budget int64 }

// Disk returns the disk space of the whole store: images, layers, what builds keep to save time, and what is being made.
func (s *Store) Disk() (Disk, error) {
	d := Disk{Budget: s.Budget}
	var disk unix.Statfs_t
	err := unix.Statfs(s.Dir, &disk)
	if err == unix.ENOENT { // nothing has been made yet
		err = unix.Statfs(filepath.Dir(s.Dir), &disk)
	}
	if err != nil {
		return d, fmt.Errorf("disk of %s: %w", s.Dir, err)
	}
	if d.Budget <= 0 {
		d.Budget = min(defaultBudget, max(int64(disk.Blocks)*disk.Bsize/10, leastBudget))
	}
	d.Used, err = sizeOf(s.Dir)
	return d, err
}

// The default budget is a tenth of the disk, but at least what a base template with a build on it takes.
const (
	defaultBudget = 20 << 30
	leastBudget   = 4 << 30
)

// sizeOf returns the disk space of a file or a directory. Files that disappear meanwhile do not count.
func sizeOf(name string) (sum int64, err error) {
	err = filepath.WalkDir(name, func(name string, _ fs.DirEntry, err error) error {
		var n int64
		if err == nil {
			n, err = size(name)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		sum += n
		return err
	})
	return sum, err
}

// NoSpaceError says that the disk, or the templates' share of it, is full.
type NoSpaceError struct {
	Needed int64 // bytes; 0 means unknown
	Free   int64 // bytes
	Budget int64 // of the templates, if that is used up; 0 if it is the disk itself
	Step   int64 // disk of the sandbox in which a step ran, if that is used up
	Err    error // of the system or of the step; nil if the check itself found no space
}

// Error implements error.
func (e *NoSpaceError) Error() string {
	needed := fmt.Sprintf("%d MB", (e.Needed+1<<20-1)>>20)
	if e.Needed <= e.Free || e.Needed < 1<<20 {
		needed = "more"
	}
	text := fmt.Sprintf("no room: %s needed, %d MB free on the disk; free some of it, or delete templates", needed, e.Free>>20)
	if e.Budget > 0 {
		text = fmt.Sprintf("no room: %s needed, %d MB free of the %d MB of all templates; delete some, or allow more by "+
			"--template-budget-mb",
			needed, e.Free>>20, e.Budget>>20)
	}
	if e.Step > 0 {
		text = fmt.Sprintf("no room: %s needed, %d MB free of the %d MB of disk of this build's sandbox; give it more disk, or write less",
			needed, e.Free>>20, e.Step>>20)
	}
	if e.Err != nil {
		text += fmt.Sprintf(" (%v)", e.Err)
	}
	return text
}

// Is makes a NoSpaceError match sandbox.ErrNoDisk.
func (e *NoSpaceError) Is(target error) bool { return target == sandbox.ErrNoDisk }

// Unwrap returns the cause.
func (e *NoSpaceError) Unwrap() error { return e.Err }

// ensureSpace makes sure that there is space for needed bytes. If there is not, it removes files that only save time.
func (s *Store) ensureSpace(needed int64) error {
	lack, short, err := s.shortage(needed)
	if err != nil || lack == nil {
		return err
	}
	if err := s.collect(short); err != nil {
		return errors.Join(lack, err)
	}
	if lack, _, err = s.shortage(needed); lack == nil {
		return err
	}
	return lack
}

// shortage returns nil if there is space for needed bytes, otherwise the error and how many bytes must be removed.
func (s *Store) shortage(needed int64) (lack *NoSpaceError, short int64, err error) {
	d, err := s.Disk()
	if err != nil {
		return nil, 0, err
	}
	free, spare, err := s.free()
	if err != nil {
		return nil, 0, err
	}
	of, left := d.Budget, d.Budget-d.Used
	if free-spare < left {
		of, left = 0, free-spare
	}
	if left >= needed {
		return nil, 0, nil
	}
	return &NoSpaceError{Needed: needed, Free: max(0, left), Budget: of}, needed - left, nil
}

// free returns the free bytes of the disk, and how many of them the store leaves to others.
func (s *Store) free() (free, spare int64, err error) {
	var disk unix.Statfs_t
	if err := unix.Statfs(s.Dir, &disk); err != nil {
		return 0, 0, fmt.Errorf("disk of %s: %w", s.Dir, err)
	}
	return int64(disk.Bavail) * disk.Bsize, min(spareDisk, int64(disk.Blocks)*disk.Bsize/20), nil
}

// spareDisk is how many bytes the store leaves free on its disk, at most a twentieth of it; spaceEvery is how many bytes are read between
// checks.
const (
	spareDisk  = 512 << 20
	spaceEvery = 32 << 20
)

// whileSpace returns a reader that fails when there is no space for what it reads: a small archive may have a large content.
func (s *Store) whileSpace(r io.Reader) io.Reader { return &spaceReader{r: r, s: s} }

type spaceReader struct {
	r    io.Reader
	s    *Store
	left int64
}

// Read implements io.Reader.
func (r *spaceReader) Read(p []byte) (int, error) {
	if r.left <= 0 {
		r.left = spaceEvery
		if err := r.s.ensureSpace(1); err != nil {
			return 0, err
		}
	}
	n, err := r.r.Read(p)
	r.left -= int64(n)
	return n, err
}

// fullDisk is the number of free bytes below which a disk counts as full. It is not 0, because the sandbox's kernel takes several at a
// time.
const fullDisk = 4 << 20

// ifFull turns an error into a NoSpaceError if the disk is full, because that is the likely cause.
func (s *Store) ifFull(err error) error {
	free, _, ferr := s.free()
	if ferr != nil || free >= fullDisk || errors.As(err, new(*NoSpaceError)) {
		return err
	}
	return &NoSpaceError{Free: free, Err: err}
}

// asNoSpace turns the system's error for a full disk into a NoSpaceError.
func (s *Store) asNoSpace(err error) error {
	if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) || errors.As(err, new(*NoSpaceError)) {
		return err
	}
	free, _, ferr := s.free()
	return errors.Join(&NoSpaceError{Free: free, Err: err}, ferr)
}
