// Package durable changes files so that a crash or a power cut at any moment leaves the old or the new content. It knows nothing about that
// content.
package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Disk changes files. The zero Disk is ready to use. It is safe for concurrent use on different names.
type Disk struct {
	// Fault is asked before each step how many of the step's bytes are written. An error stands for a power cut: these bytes are written,
	// and nothing else. Only tests set it.
	Fault func(step, name string, size int) (done int, err error)
}

// Step asks Fault about a step of the caller's own. Without Fault, the whole step is done.
func (d Disk) Step(step, name string, size int) (int, error) {
	if d.Fault == nil {
		return size, nil
	}
	return d.Fault(step, name, size)
}

// Replace writes a file as Make does, with the content body.
func (d Disk) Replace(name string, body []byte, perm fs.FileMode) error {
	return d.Make(name, perm, func(f *os.File) error { return d.Write(f, body) })
}

// ReplaceVolatile is Replace without fsync, which takes some ms. A process that dies at any moment leaves the old or the new content; a
// power cut may leave an empty file. So it is only for what means nothing after a power cut, such as a note about running processes.
func (d Disk) ReplaceVolatile(name string, body []byte, perm fs.FileMode) error {
	return d.put(name, perm, func(f *os.File) error { return d.Write(f, body) }, false)
}

// Make writes a file by way of a temporary file, fsync, rename and fsync of the directory; fill writes the content. A reader of the name
// finds the old or the new content. A failure leaves the old content and no temporary file.
func (d Disk) Make(name string, perm fs.FileMode, fill func(*os.File) error) error {
	return d.put(name, perm, fill, true)
}

func (d Disk) put(name string, perm fs.FileMode, fill func(*os.File) error, sync bool) (err error) {
	if _, err := d.Step("create", name, 0); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+"-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			if _, ferr := d.Step("remove", f.Name(), 0); ferr == nil {
				_ = os.Remove(f.Name()) // no reader uses its name
			}
		}
	}()
	if err := errors.Join(f.Chmod(perm), fill(f)); err != nil {
		return errors.Join(err, f.Close())
	}
	if sync {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return d.rename(f.Name(), name, sync)
}

// Write writes to an open file. It does not sync to disk.
func (d Disk) Write(f *os.File, body []byte) error {
	n, fault := d.Step("write", f.Name(), len(body))
	if _, err := f.Write(body[:n]); err != nil {
		return err
	}
	return fault
}

// Append adds a line to a file, creating it if needed. If the last line was cut off, Append ends it first. It does not sync to disk.
func (d Disk) Append(name string, line []byte) (err error) {
	if _, err := d.Step("open", name, 0); err != nil {
		return err
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	var last [1]byte
	if info.Size() > 0 {
		if _, err := f.ReadAt(last[:], info.Size()-1); err != nil {
			return err
		}
		if last[0] != '\n' {
			line = append([]byte{'\n'}, line...)
		}
	}
	return d.Write(f, append(line, '\n'))
}

// Rename renames a file or directory so that the new name survives a power cut. Its content must be on disk already.
func (d Disk) Rename(from, to string) error { return d.rename(from, to, true) }

// RenameVolatile is Rename without fsync: a power cut may bring the old name back. So it is only for what means the same, or nothing, under
// either name then.
func (d Disk) RenameVolatile(from, to string) error { return d.rename(from, to, false) }

func (d Disk) rename(from, to string, sync bool) error {
	if _, err := d.Step("rename", to, 0); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(to)) // first: if there is no descriptor for it, nothing has been done
	if err != nil {
		return err
	}
	if err := os.Rename(from, to); err != nil || !sync {
		return errors.Join(err, dir.Close())
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// Exchange swaps the names of two files or directories atomically; the swap survives a power cut.
func (d Disk) Exchange(a, b string) error {
	if _, err := d.Step("rename", b, 0); err != nil {
		return err
	}
	if err := unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE); err != nil {
		return err
	}
	return errors.Join(Sync(filepath.Dir(a)), Sync(filepath.Dir(b)))
}

// Mkdir makes a directory that other users can pass through.
func (d Disk) Mkdir(name string) error {
	if _, err := d.Step("mkdir", name, 0); err != nil {
		return err
	}
	return os.Mkdir(name, 0o711)
}

// RemoveAll removes a tree, its top-level entries one by one. It is no error if nothing is there.
func (d Disk) RemoveAll(name string) error {
	if info, err := os.Lstat(name); err == nil && info.IsDir() {
		entries, err := os.ReadDir(name)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if _, err := d.Step("remove", filepath.Join(name, e.Name()), 0); err != nil {
				return err
			}
			if err := os.RemoveAll(filepath.Join(name, e.Name())); err != nil {
				return err
			}
		}
	}
	if _, err := d.Step("remove", name, 0); err != nil {
		return err
	}
	return os.RemoveAll(name)
}

// Create writes a new file and syncs it to disk. It is for files in a directory that gets its name later, by Rename.
func Create(name string, body []byte, perm fs.FileMode) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, perm)
	if err != nil {
		return err
	}
	_, err = f.Write(body)
	return errors.Join(err, f.Sync(), f.Close())
}

// Sync waits until a file's content, or a directory's names, are on disk.
func Sync(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
