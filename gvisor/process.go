package gvisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// hostProcess is a process of a machine on the host.
type hostProcess struct {
	pid   int
	state byte // of /proc/PID/stat
}

// processesOf finds all processes of a machine: runsc names the machine's directory on the command line of each. So they are found
// whatever happened to whoever started them.
func processesOf(dir string) ([]hostProcess, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	want := []byte("--root=" + runDir(dir) + "\x00")
	self := os.Getpid()
	var found []hostProcess
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == self {
			continue
		}
		line, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil || !bytes.Contains(append(line, 0), want) {
			continue // gone, or another user's
		}
		found = append(found, hostProcess{pid: pid, state: stateOf(pid)})
	}
	return found, nil
}

func stateOf(pid int) byte {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 'X'
	}
	rest := stat[bytes.LastIndexByte(stat, ')')+1:]
	if len(rest) < 2 {
		return 'X'
	}
	return rest[1]
}

// killAll ends all processes of a machine and waits until they are gone.
func killAll(ctx context.Context, dir string) error {
	for {
		processes, err := processesOf(dir)
		if err != nil {
			return err
		}
		if len(processes) == 0 {
			return nil
		}
		for _, p := range processes {
			if err := killPID(ctx, p.pid); err != nil {
				return err
			}
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

// readPSS reads the memory of a process in bytes, shared pages in part (proc(5), smaps_rollup).
func readPSS(pid int) (int64, error) {
	body, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		if errors.Is(err, syscall.ESRCH) {
			err = fs.ErrNotExist
		}
		return 0, err
	}
	for line := range strings.Lines(string(body)) {
		if rest, ok := strings.CutPrefix(line, "Pss:"); ok {
			kb, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return kb << 10, err
		}
	}
	return 0, nil
}

// onCPUs does something with the calling thread, and so the processes it starts, bound to as many cores as a CPU limit
// allows, which is all that an ordinary user can do about CPU time.
func (r *Runtime) onCPUs(limit float64, do func() error) error {
	want := int(math.Ceil(limit))
	if want <= 0 || want >= runtime.NumCPU() {
		return do()
	}
	done := make(chan error)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and nobody else inherits its mask.
		runtime.LockOSThread()
		var all, some unix.CPUSet
		if err := unix.SchedGetaffinity(0, &all); err != nil {
			done <- err
			return
		}
		var cores []int
		for cpu := range 1024 {
			if all.IsSet(cpu) {
				cores = append(cores, cpu)
			}
		}
		start := int(r.nextCPU.Add(uint32(want)))
		for i := range min(want, len(cores)) {
			some.Set(cores[(start+i)%len(cores)])
		}
		if err := unix.SchedSetaffinity(0, &some); err != nil {
			done <- err
			return
		}
		done <- do()
	}()
	return <-done
}
