package gvisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// process is a machine's process on the host. Another process may get its PID after it has ended; PID and start time together are unique.
type process struct {
	pid    int
	start  uint64 // ticks since the start of the host
	sentry bool   // the machine's kernel: without it there is no machine
}

// processesOf finds all processes of a machine: runsc has the machine's directory on the command line of each. So they are found whatever
// happened to the server that started them. An error means that the processes are not known.
func (r *Runtime) processesOf(dir string) ([]process, error) {
	entries, err := r.readDir("readdir /proc", "/proc")
	if err != nil {
		return nil, err
	}
	self, seen := os.Getpid(), false
	var found []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == self {
			seen = seen || err == nil
			continue
		}
		p, ours, err := r.isOf(pid, dir)
		if err != nil {
			return nil, err
		}
		if ours {
			found = append(found, p)
		}
	}
	if !seen { // /proc is empty or another namespace's, so it says nothing about this machine
		return nil, errors.New("/proc does not show this process")
	}
	return found, nil
}

// isOf reports whether a process belongs to a machine. The machine's directory on the command line is not enough: the process must also run
// runsc as the user that sandboxes run as.
func (r *Runtime) isOf(pid int, dir string) (p process, ours bool, err error) {
	line, err := r.readFile("read cmdline", fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !bytes.Contains(append(line, 0), []byte("\x00--root="+runDir(dir)+"\x00")) {
		return p, false, notShown(err)
	}
	s, err := r.readStatus(pid)
	if owner, _ := Owner(); err != nil || len(s.uids) < 2 || s.uids[0] != strconv.Itoa(owner) || s.uids[1] != s.uids[0] {
		return p, false, notShown(err)
	}
	title, _, _ := bytes.Cut(line, []byte{0})
	if is, err := r.isRunsc(pid, string(title)); err != nil || !is {
		return p, false, notShown(err)
	}
	start, err := r.startOf(pid)
	return process{pid: pid, start: start, sentry: string(title) == sentryTitle}, err == nil, notShown(err)
}

// sentryTitle is the title of the sentry's process (gVisor, runsc/sandbox).
const sentryTitle = "runsc-sandbox"

// notShown drops errors which mean that a process has ended or that this server may not look at it.
func notShown(err error) error {
	if hasEnded(err) || errors.Is(err, fs.ErrPermission) {
		return nil
	}
	return err
}

// isRunsc reports whether a process runs runsc: the same file, or one of that name, because an older server may have had it elsewhere, or
// it may have been replaced. If the kernel does not show that, as to a root without CAP_SYS_PTRACE, the process's title is believed.
func (r *Runtime) isRunsc(pid int, title string) (bool, error) {
	exe := fmt.Sprintf("/proc/%d/exe", pid)
	name, err := r.readLink("read exe", exe)
	if errors.Is(err, fs.ErrPermission) {
		return title == "runsc" || strings.HasPrefix(title, "runsc-"), nil
	}
	if err != nil {
		return false, err
	}
	if base := filepath.Base(strings.TrimSuffix(name, " (deleted)")); base == "runsc" || base == filepath.Base(r.Runsc) {
		return true, nil
	}
	var it, ours os.FileInfo
	err = r.ask("stat exe", func() (err error) {
		if it, err = os.Stat(exe); err == nil {
			ours, err = os.Stat(r.Runsc)
		}
		return err
	})
	return err == nil && os.SameFile(it, ours), err
}

// isThere reports whether a process still exists and is the same one.
func (r *Runtime) isThere(p process) (bool, error) {
	start, err := r.startOf(p.pid)
	if hasEnded(err) {
		return false, nil
	}
	return err == nil && start == p.start, err
}

// Reap implements sandbox.Runtime.
func (r *Runtime) Reap(ctx context.Context, dir string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("reap %s: %w", filepath.Base(dir), err)
		}
	}()
	if err := r.killAll(ctx, dir); err != nil {
		return err
	}
	mf, err := r.readManifest(dir)
	if err != nil && !errors.Is(err, errNoManifest) {
		return err
	}
	if mf.Cgroup != nil {
		if err := r.ask("remove cgroup", mf.Cgroup.remove); err != nil {
			return err
		}
	}
	// runsc mounts here. The mount vanishes with its namespace, unless runsc was run without one.
	err = unix.Unmount(filepath.Join(runDir(dir), "null-netns"), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && err != unix.EINVAL && err != unix.ENOENT && err != unix.EPERM {
		return fmt.Errorf("unmount: %w", err)
	}
	for _, name := range parts {
		if err := r.ask("remove "+name, func() error { return os.RemoveAll(filepath.Join(dir, name)) }); err != nil {
			return err
		}
	}
	return nil
}

// killAll ends all processes of a machine and waits until they have ended.
func (r *Runtime) killAll(ctx context.Context, dir string) error {
	for {
		processes, err := r.processesOf(dir)
		if err != nil {
			return fmt.Errorf("find its processes: %w", err)
		}
		if len(processes) == 0 {
			return nil
		}
		for _, p := range processes {
			if err := r.kill(ctx, p); err != nil {
				return err
			}
		}
	}
}

// kill kills a process and waits for its end by a pidfd, so that it cannot hit another process. A zombie counts as ended.
func (r *Runtime) kill(ctx context.Context, p process) error {
	var fd int
	err := r.ask("open pidfd", func() (err error) {
		fd, err = unix.PidfdOpen(p.pid, 0)
		return err
	})
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", p.pid, err)
	}
	defer unix.Close(fd)
	if there, err := r.isThere(p); err != nil || !there {
		return err
	}
	err = r.ask("kill", func() error { return unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) })
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.pid, err)
	}
	for {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("wait for the end of process %d: %w", p.pid, context.Cause(ctx))
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		if err != nil && err != unix.EINTR && err != unix.EAGAIN {
			return fmt.Errorf("wait for the end of process %d: %w", p.pid, err)
		}
		if n > 0 {
			return nil
		}
	}
}

// ours returns those of the machine's processes that still exist.
func (m *machine) ours() ([]process, error) {
	var failed error
	left := slices.DeleteFunc(slices.Clone(m.processes), func(p process) bool {
		there, err := m.runtime.isThere(p)
		failed = errors.Join(failed, err)
		return !there
	})
	return left, failed
}
