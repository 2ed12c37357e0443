package guest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// attachSocket is the socket where bridges reach the agent. It is abstract, so no program can remove or replace it in the file system.
const attachSocket = "@soulbox-agent"

// setUpMachine prepares a freshly booted sandbox.
func setUpMachine(image bool) (*cgroups, error) {
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

// ListenAttach serves bridges until the machine ends. A bridge runs as root in the agent's own cgroup, where only the runtime can put a
// process: a client of the agent can lift the limits, so no user's process may be one, not even root's.
func (s *Server) ListenAttach() error {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: attachSocket, Net: "unix"})
	if err != nil {
		return err
	}
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			return err
		}
		if !isBridge(conn) {
			_ = conn.Close()
			continue
		}
		go func() { _ = s.Serve(conn) }() // how it ends matters only to the bridge
	}
}

func isBridge(conn *net.UnixConn) bool {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil ||
		cerr != nil || cred.Uid != 0 {
		return false
	}
	in, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", cred.Pid))
	return err == nil && strings.TrimSpace(string(in)) == "0::/agent"
}

// Attach is the bridge: it connects stdio with the agent of the machine that it runs in.
func Attach(in io.Reader, out io.WriteCloser) error {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: attachSocket, Net: "unix"})
	if err != nil {
		return err
	}
	defer conn.Close()
	go func() {
		_, _ = io.Copy(conn, in)
		_ = conn.Close() // the host has closed its end
	}()
	_, err = io.Copy(out, conn)
	return errors.Join(err, out.Close())
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
