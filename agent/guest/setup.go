package guest

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// setUpSandbox prepares a freshly booted sandbox.
func setUpSandbox(image bool) (*cgroups, error) {
	groups, err := mountCgroups()
	if err != nil {
		return nil, err
	}
	if err := boundSockets(); err != nil {
		return nil, fmt.Errorf("bound the buffers of sockets: %w", err)
	}
	// Allow tracing as hosts of Docker do, not only by a parent: whether a process may be traced then depends on its user. No program may
	// trace the agent or a bridge to it, since they have capabilities that no other process has.
	if err := os.WriteFile("/proc/sys/kernel/yama/ptrace_scope", []byte("0"), 0o644); err != nil {
		return nil, fmt.Errorf("let programs be traced: %w", err)
	}
	// A child shares the agent's memory until it executes, and already has its user's id before that: other processes with that id must not
	// read it.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("keep the agent's memory from others: %w", err)
	}
	if image {
		// gVisor mounts memory on an empty /tmp; it must be an ordinary directory, on disk, which is part of what a build makes.
		if err := unix.Unmount("/tmp", 0); err != nil && err != unix.EINVAL && err != unix.ENOENT && err != unix.ENOTDIR {
			return nil, fmt.Errorf("unmount /tmp: %w", err)
		}
		return groups, errors.Join(dropCapabilities(), forgetChildren())
	}
	for _, f := range passwdFields("/etc/passwd", 7) {
		uid, uerr := strconv.Atoi(f[2])
		gid, gerr := strconv.Atoi(f[3])
		if uerr != nil || gerr != nil || uid < 1000 || uid >= 60000 {
			continue
		}
		if err := giveHome(f[5], uid, gid); err != nil {
			return nil, fmt.Errorf("set up home of %s: %w", f[0], err)
		}
	}
	return groups, errors.Join(dropCapabilities(), forgetChildren())
}

// giveHome creates a home directory and gives it, with what the template put there, to its user.
func giveHome(home string, uid, gid int) error {
	if err := os.MkdirAll(home, 0o755); err != nil {
		return err
	}
	return filepath.WalkDir(home, func(name string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(name, uid, gid)
	})
}

// dropCapabilities takes from all children, also from those of root, the capabilities that only the agent needs and, if the kernel does not
// protect the agent from tracing, the right to trace. Children inherit the bounding set of the thread that forks, so all threads drop them.
func dropCapabilities() error {
	drop := []uintptr{unix.CAP_SYS_ADMIN}
	if !isGuarded() {
		drop = append(drop, unix.CAP_SYS_PTRACE)
	}
	for _, capability := range drop {
		if _, _, errno := syscall.AllThreadsSyscall6(syscall.SYS_PRCTL, unix.PR_CAPBSET_DROP, capability, 0, 0, 0, 0); errno != 0 {
			return fmt.Errorf("drop capabilities: %w", errno)
		}
	}
	return nil
}

// guardMark is what a kernel with our patches (gvisor/runsc/main.go) tells the first process as the first load average; other kernels tell
// 0.
const guardMark = 0x536f756c426f78

// isGuarded reports whether the kernel protects the first process from tracing (gvisor/runsc/patches/guarded-init.patch).
func isGuarded() bool {
	var info unix.Sysinfo_t
	return unix.Sysinfo(&info) == nil && info.Loads[0] == guardMark
}

// forgetChildren takes SIGCHLD away from the Go runtime, whose handler would run at the end of every process: pidfds report the ends that
// matter.
func forgetChildren() error {
	signal.Ignore(syscall.SIGCHLD) // stops the runtime's handler, but makes the kernel reap children by itself
	byDefault := make([]uint64, 4) // struct sigaction of the kernel: SIG_DFL, no flags, no mask
	_, _, errno := syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, uintptr(syscall.SIGCHLD), uintptr(unsafe.Pointer(&byDefault[0])), 0, 8, 0,
		0)
	if errno != 0 {
		return fmt.Errorf("reset SIGCHLD: %w", errno)
	}
	return nil
}
