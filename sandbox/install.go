package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// unfinished begins the names of what Install is making.
const unfinished = ".new-"

// Install makes a directory that never changes, named by its content, in dir, which is made if missing. build fills an empty directory
// and gives its name; where one of that name is there already, that one is kept. Servers that install at the same time wait for each
// other; what a dead one has left unfinished is removed.
func Install(dir string, build func(temp string) (name string, err error)) (path string, err error) {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return "", err
	}
	lock, err := LockFile(filepath.Join(dir, ".lock"), true)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), unfinished) {
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return "", err
			}
		}
	}
	temp, err := os.MkdirTemp(dir, unfinished)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }()
	if err := os.Chmod(temp, 0o755); err != nil {
		return "", err
	}
	name, err := build(temp)
	if err != nil {
		return "", err
	}
	path = filepath.Join(dir, name)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	if err := syncTree(temp); err != nil {
		return "", fmt.Errorf("install %s: %w", name, err)
	}
	return path, os.Rename(temp, path)
}

// syncTree writes all files of a tree to disk: a name that is there vouches for its content, also after a power cut.
func syncTree(root string) error {
	return filepath.WalkDir(root, func(name string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		return errors.Join(f.Sync(), f.Close())
	})
}
