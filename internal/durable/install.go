package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// unfinished begins the names of directories that Install is making.
const unfinished = ".new-"

// Install makes a directory that never changes and whose name stands for its content, in dir, which is created if needed. If the directory
// exists, Install neither writes nor waits. build fills an empty directory. Processes that install at the same time wait for each other;
// what a dead process left unfinished is removed.
func Install(dir, name string, build func(temp string) error) (path string, err error) {
	path = filepath.Join(dir, name)
	if there, err := installed(path); there || err != nil {
		return path, err
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return "", err
	}
	lock, err := Lock(filepath.Join(dir, ".lock"), true)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if there, err := installed(path); there || err != nil { // the process that had the lock made it
		return path, err
	}
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
	if err := errors.Join(os.Chmod(temp, 0o755), build(temp)); err != nil {
		return "", err
	}
	if err := syncTree(temp); err != nil {
		return "", fmt.Errorf("install %s: %w", name, err)
	}
	return path, Disk{}.Rename(temp, path)
}

// installed reports whether the directory exists. It gets its name only once it is complete.
func installed(path string) (bool, error) {
	_, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// syncTree syncs all files of a tree to disk, so that a directory that exists has its content even after a power cut.
func syncTree(root string) error {
	return filepath.WalkDir(root, func(name string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		return Sync(name)
	})
}
