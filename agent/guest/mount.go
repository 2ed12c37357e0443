package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
	"soulbox.dev/soulbox/agent"
)

func (s *Server) mount(r agent.MountRequest) (agent.MountResult, error) {
	if err := checkPath("mount", r.Target); err != nil {
		return agent.MountResult{}, err
	}
	target := path.Clean(r.Target)
	if target == "/" {
		return agent.MountResult{}, agent.Invalid("mount: nothing can be mounted on the root")
	}
	if r.Unmount {
		return agent.MountResult{}, unmount(target, r.Remove)
	}
	isFile := false
	if r.Source != "" {
		if !strings.HasPrefix(path.Clean(r.Source), agent.BuildDir+"/") {
			return agent.MountResult{}, agent.Invalid("mount: %q is not below %s", agent.Clip(r.Source, 200), agent.BuildDir)
		}
		info, err := os.Stat(r.Source)
		if err != nil {
			return agent.MountResult{}, err
		}
		isFile = !info.IsDir()
	}
	made, err := makeTarget(target, isFile)
	if err == nil {
		err = mountOn(target, r)
	}
	if err != nil {
		return agent.MountResult{}, errors.Join(err, removeMade(target, made))
	}
	return agent.MountResult{Made: made}, nil
}

func mountOn(target string, r agent.MountRequest) error {
	kind, source, flags, data := "tmpfs", "tmpfs", uintptr(unix.MS_NODEV), "mode=1777"
	if r.Size > 0 {
		data += fmt.Sprintf(",size=%d", r.Size)
	}
	if r.Source != "" {
		kind, source, flags, data = "", r.Source, unix.MS_BIND, ""
	}
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		return &fs.PathError{Op: "mount", Path: target, Err: err}
	}
	if r.ReadOnly {
		if err := unix.Mount("", target, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
			return errors.Join(&fs.PathError{Op: "mount read-only", Path: target, Err: err}, unix.Unmount(target, 0))
		}
	}
	return nil
}

// makeTarget creates the mount point, and returns how many files and directories it created.
func makeTarget(target string, isFile bool) (made int, err error) {
	if _, err := os.Stat(target); err == nil {
		return 0, nil
	}
	missing := 1
	for dir := path.Dir(target); dir != "/"; dir = path.Dir(dir) {
		if _, err := os.Lstat(dir); err == nil {
			break
		}
		missing++
	}
	if !isFile {
		return missing, os.MkdirAll(target, 0o755)
	}
	if err := os.MkdirAll(path.Dir(target), 0o755); err != nil {
		return 0, err
	}
	f, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return missing - 1, err
	}
	return missing, f.Close()
}

// removeMade removes what makeTarget created. A directory that is no longer empty stays.
func removeMade(target string, made int) error {
	for ; made > 0; made-- {
		err := os.Remove(target)
		if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		target = path.Dir(target)
	}
	return nil
}

func unmount(target string, made int) error {
	if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
		return &fs.PathError{Op: "unmount", Path: target, Err: err}
	}
	return removeMade(target, made)
}
