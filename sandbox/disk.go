package sandbox

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// disk is how the state directory is changed: the one place through which every write of this package goes. fault, which only tests set, is
// asked before each step how many bytes of it are done; an error says that the machine has lost its power then.
type disk struct {
	fault func(step, name string, size int) (done int, err error)
}

func (d disk) step(step, name string, size int) (int, error) {
	if d.fault == nil {
		return size, nil
	}
	return d.fault(step, name, size)
}

// replace writes a file by temp, fsync and rename: the old one or the new one is there at any time.
func (d disk) replace(name string, body []byte) (err error) {
	if _, err := d.step("create", name, 0); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+"-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			if _, ferr := d.step("remove", f.Name(), 0); ferr == nil {
				_ = os.Remove(f.Name())
			}
		}
	}()
	if err := d.write(f, body); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	return d.rename(f.Name(), name)
}

func (d disk) write(f *os.File, body []byte) error {
	n, fault := d.step("write", f.Name(), len(body))
	if _, err := f.Write(body[:n]); err != nil {
		return err
	}
	return fault
}

// add appends a line to a file, which is made if it is not there. A line that was cut off is ended first.
func (d disk) add(name string, line []byte) (err error) {
	if _, err := d.step("open", name, 0); err != nil {
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
	return d.write(f, append(line, '\n'))
}

// rename gives something its name, and has the name outlast a power cut.
func (d disk) rename(from, to string) error {
	if _, err := d.step("rename", to, 0); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(to)) // first: where there is no descriptor for it, nothing has been done
	if err != nil {
		return err
	}
	if err := os.Rename(from, to); err != nil {
		return errors.Join(err, dir.Close())
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// exchange swaps the names of two that are there, and has that outlast a power cut.
func (d disk) exchange(a, b string) error {
	if _, err := d.step("rename", b, 0); err != nil {
		return err
	}
	if err := unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE); err != nil {
		return err
	}
	return errors.Join(syncDir(filepath.Dir(a)), syncDir(filepath.Dir(b)))
}

// syncDir has the names in a directory outlast a power cut.
func syncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (d disk) mkdir(name string) error {
	if _, err := d.step("mkdir", name, 0); err != nil {
		return err
	}
	return os.Mkdir(name, 0o711)
}

// removeAll removes a tree, entry by entry of its top.
func (d disk) removeAll(name string) error {
	if info, err := os.Lstat(name); err == nil && info.IsDir() {
		entries, err := os.ReadDir(name)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if _, err := d.step("remove", filepath.Join(name, e.Name()), 0); err != nil {
				return err
			}
			if err := os.RemoveAll(filepath.Join(name, e.Name())); err != nil {
				return err
			}
		}
	}
	if _, err := d.step("remove", name, 0); err != nil {
		return err
	}
	return os.RemoveAll(name)
}
