package client

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// RuntimeDir returns the directory of the sockets of a user's servers, which need not exist. The caller passes the environment.
func RuntimeDir(getenv func(string) string) string {
	if dir := getenv("SOULBOX_RUNTIME_DIR"); dir != "" {
		return dir
	}
	if dir := getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "soulbox")
	}
	return filepath.Join(os.TempDir(), "soulbox-"+strconv.Itoa(os.Geteuid()))
}

// CheckRuntimeDir refuses a directory that other users could have made or may write to.
func CheckRuntimeDir(dir string) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.IsDir() || int(st.Uid) != os.Geteuid() || info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("the directory %s of servers' sockets is not this user's alone: remove it, or name another "+
			"by SOULBOX_RUNTIME_DIR", dir)
	}
	return nil
}

const socketSuffix = ".sock"

// Socket returns the path of a server's socket.
func Socket(dir string, pid int) string { return filepath.Join(dir, strconv.Itoa(pid)+socketSuffix) }

// Sockets lists the sockets of a user's servers, the oldest first. A server that has ended may have left its socket.
func Sockets(dir string) ([]string, error) {
	if err := CheckRuntimeDir(dir); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	type socket struct {
		path string
		made int64
	}
	var found []socket
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), socketSuffix) || e.Type()&fs.ModeSocket == 0 {
			continue
		}
		if info, err := e.Info(); err == nil { // it may be gone by now
			found = append(found, socket{filepath.Join(dir, e.Name()), info.ModTime().UnixNano()})
		}
	}
	slices.SortFunc(found, func(a, b socket) int { return cmp.Or(cmp.Compare(a.made, b.made), cmp.Compare(a.path, b.path)) })
	paths := make([]string, len(found))
	for i, f := range found {
		paths[i] = f.path
	}
	return paths, nil
}
