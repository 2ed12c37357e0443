package gvisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// processesOf finds all processes of a machine: runsc names the machine's directory on the command line of each. So they are found
// whatever happened to whoever started them.
func processesOf(dir string) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	self := os.Getpid()
	var found []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == self {
			continue
		}
		if isOf(pid, dir) {
			found = append(found, pid)
		}
	}
	return found, nil
}

// isOf says whether a process is a machine's; one that is gone, or another user's, is not.
func isOf(pid int, dir string) bool {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return err == nil && bytes.Contains(append(line, 0), []byte("--root="+runDir(dir)+"\x00"))
}

// readStatus gives the state of a process and its anonymous memory in bytes (proc(5), status).
func readStatus(pid int) (state byte, anonymous int64, err error) {
	body, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0, gone(err)
	}
	for line := range strings.Lines(string(body)) {
		if rest, ok := strings.CutPrefix(line, "State:"); ok {
			state = strings.TrimSpace(rest)[0]
		}
		if rest, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			if anonymous, err = kilobytes(rest); err != nil {
				return 0, 0, err
			}
		}
	}
	return state, anonymous, nil
}

// guestMemoryOf gives how much memory a sentry has for its guest, in bytes: the size of the file in memory that it keeps it in, which has a
// descriptor and the name runsc-memory (gVisor, pkg/sentry/pgalloc). It is 0 for other processes.
func guestMemoryOf(pid int) int64 {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0
	}
	for _, e := range entries {
		name := filepath.Join(dir, e.Name())
		if link, err := os.Readlink(name); err != nil || !strings.HasPrefix(link, "/memfd:runsc-memory") {
			continue
		}
		var st syscall.Stat_t
		if err := syscall.Stat(name, &st); err == nil {
			return st.Blocks * 512
		}
	}
	return 0
}

// kilobytes reads " 12 kB".
func kilobytes(text string) (int64, error) {
	kb, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(text), " kB"), 10, 64)
	return kb << 10, err
}

// gone makes the two ways in which /proc says that a process has ended one.
func gone(err error) error {
	if errors.Is(err, syscall.ESRCH) {
		return fs.ErrNotExist
	}
	return err
}

// killAll ends all processes of a machine and waits until they are gone.
func killAll(ctx context.Context, dir string) error {
	foreign := map[int]bool{} // another user's, who wrote the same on a command line
	for {
		processes, err := processesOf(dir)
		if err != nil {
			return err
		}
		left := false
		for _, pid := range processes {
			if foreign[pid] {
				continue
			}
			left = true
			if err := killPID(ctx, pid); errors.Is(err, unix.EPERM) {
				foreign[pid] = true
			} else if err != nil {
				return err
			}
		}
		if !left {
			return nil
		}
	}
}

// killPID kills a process and waits for its end by a pidfd, so that no other process can be meant. A zombie has ended.
func killPID(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", pid, err)
	}
	for {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("wait for the end of process %d: %w", pid, context.Cause(ctx))
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		if err != nil && err != unix.EINTR {
			return err
		}
		if n > 0 {
			return nil
		}
	}
}

// readPSS reads the memory of a process in bytes, shared pages in part, without shared memory (proc(5), smaps_rollup).
func readPSS(pid int) (int64, error) {
	body, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, gone(err)
	}
	var sum int64
	for line := range strings.Lines(string(body)) {
		for _, part := range []string{"Pss_Anon:", "Pss_File:"} {
			if rest, ok := strings.CutPrefix(line, part); ok {
				n, err := kilobytes(rest)
				if err != nil {
					return 0, err
				}
				sum += n
			}
		}
	}
	return sum, nil
}
