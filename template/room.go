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

// Disk is what the templates take of the disk, and may take, in bytes.
type Disk struct{ Used, Budget int64 }

// Disk says what all of the store takes: images, layers, what builds keep to be faster, and what is being made.
func (s *Store) Disk() (Disk, error) {
	d := Disk{Budget: s.Budget}
	var disk unix.Statfs_t
	err := unix.Statfs(s.Dir, &disk)
	if err == unix.ENOENT { // nothing was made yet
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

// The budget of a store that names none is a tenth of the disk, but no less than a base template with a build on it takes.
const (
	defaultBudget = 20 << 30
	leastBudget   = 4 << 30
)

// sizeOf sums what a file or a directory takes on disk. What goes meanwhile does not count.
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

// NoRoomError says that the templates' disk is full, or their part of it.
type NoRoomError struct {
	Needed int64 // bytes; 0 is not known
	Free   int64 // bytes
	Budget int64 // of the templates, if that is what ends; 0 is the disk itself
	Step   int64 // of the sandbox in which a step ran, if that is what ends
	Err    error // of the system, or of the step; nil where it was not asked for more
}

// Error implements error.
func (e *NoRoomError) Error() string {
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

// Is makes it a sandbox.ErrNoDisk.
func (e *NoRoomError) Is(target error) bool { return target == sandbox.ErrNoDisk }

// Unwrap gives the system's error.
func (e *NoRoomError) Unwrap() error { return e.Err }

// room makes room for so many bytes, if there is none, of what is only kept to be faster.
func (s *Store) room(needed int64) error {
	lack, short, err := s.lack(needed)
	if err != nil || lack == nil {
		return err
	}
	if err := s.collect(short); err != nil {
		return errors.Join(lack, err)
	}
	if lack, _, err = s.lack(needed); lack == nil {
		return err
	}
	return lack
}

// lack says whether there is no room for so many bytes, and how many have to go for them.
func (s *Store) lack(needed int64) (lack *NoRoomError, short int64, err error) {
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
	return &NoRoomError{Needed: needed, Free: max(0, left), Budget: of}, needed - left, nil
}

// free is what the disk has left, and how much of it the store leaves to others.
func (s *Store) free() (free, spare int64, err error) {
	var disk unix.Statfs_t
	if err := unix.Statfs(s.Dir, &disk); err != nil {
		return 0, 0, fmt.Errorf("disk of %s: %w", s.Dir, err)
	}
	return int64(disk.Bavail) * disk.Bsize, min(spareDisk, int64(disk.Blocks)*disk.Bsize/20), nil
}

// spareDisk is what the store leaves free on its disk, in bytes, of a small one a twentieth; roomEvery is after how many bytes it looks.
const (
	spareDisk = 512 << 20
	roomEvery = 32 << 20
)

// whileRoom reads as long as there is room for what comes of it: an archive may be small and its content large.
func (s *Store) whileRoom(r io.Reader) io.Reader { return &roomReader{r: r, s: s} }

type roomReader struct {
	r    io.Reader
	s    *Store
	left int64
}

// Read implements io.Reader.
func (r *roomReader) Read(p []byte) (int, error) {
	if r.left <= 0 {
		r.left = roomEvery
		if err := r.s.room(1); err != nil {
			return 0, err
		}
	}
	n, err := r.r.Read(p)
	r.left -= int64(n)
	return n, err
}

// fullDisk is when a disk counts as full, in bytes: the sandbox' kernel takes some more at a time.
const fullDisk = 4 << 20

// ifFull gives an error its sentence that may well be of a full disk, as the disk is full.
func (s *Store) ifFull(err error) error {
	free, _, ferr := s.free()
	if ferr != nil || free >= fullDisk || errors.As(err, new(*NoRoomError)) {
		return err
	}
	return &NoRoomError{Free: free, Err: err}
}

// noRoom gives an error of a full disk its sentence.
func (s *Store) noRoom(err error) error {
	if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) || errors.As(err, new(*NoRoomError)) {
		return err
	}
	free, _, ferr := s.free()
	return errors.Join(&NoRoomError{Free: free, Err: err}, ferr)
}
