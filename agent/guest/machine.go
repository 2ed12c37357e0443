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

// attachSocket is where a bridge finds the agent: abstract, so that nothing in the file system can be removed or replaced.
const attachSocket = "@soulbox-agent"

// setUpMachine makes a freshly booted sandbox habitable.
func setUpMachine(image bool) (*cgroups, error) {
	groups, err := mountCgroups()
	if err != nil {
		return nil, err
	}
	if err := boundSockets(); err != nil {
		return nil, fmt.Errorf("bound the buffers of sockets: %w", err)
	}
	// As where Docker runs, and not only for a process' own children: who may look at a process is decided by its user. Nobody may look at
	// the agent, or at a bridge to it, since they have capabilities that nobody else has.
	if err := os.WriteFile("/proc/sys/kernel/yama/ptrace_scope", []byte("0"), 0o644); err != nil {
		return nil, fmt.Errorf("let programs be traced: %w", err)
	}
	// A child has the agent's memory until it executes, and its user's id before that: nobody with that id may look at it.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("keep the agent's memory from others: %w", err)
	}
	if image {
		// gVisor mounts memory on an empty /tmp; it is to be a directory as others, on disk, and in what a build makes.
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

// giveHome makes a home and gives it, and what the template put there, to its user.
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

// dropCapabilities takes from the children, also from those of root, what only the agent needs, and where the kernel does not keep the
// agent from who traces, the right to trace. Their bounding set is inherited from the thread that forks, so all threads drop it.
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

// guardMark is told to the first process, as the first of the loads, by a kernel with our patches (gvisor/runsc/main.go); another has 0
// there.
const guardMark = 0x536f756c426f78

// isGuarded says whether the kernel keeps the first process from who may trace (gvisor/runsc/patches/guarded-init.patch).
func isGuarded() bool {
	var info unix.Sysinfo_t
	return unix.Sysinfo(&info) == nil && info.Loads[0] == guardMark
}

// ListenAttach serves bridges until the machine ends. A bridge is root's, and in the agent's own cgroup, where only the runtime can put a
// process: whoever speaks to the agent can lift the limits, so no process of a user may, not even root's.
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
		go func() { _ = s.Serve(conn) }() // its end is the bridge's own affair
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

// Attach is the bridge: it splices stdio to the agent of the machine it runs in.
func Attach(in io.Reader, out io.WriteCloser) error {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: attachSocket, Net: "unix"})
	if err != nil {
		return err
	}
	defer conn.Close()
	go func() {
		_, _ = io.Copy(conn, in)
		_ = conn.Close() // the host has gone
	}()
	_, err = io.Copy(out, conn)
	return errors.Join(err, out.Close())
}

// forgetChildren takes SIGCHLD from the Go runtime's hands, whose handler would run at the end of every process: pidfds tell of those that
// matter.
func forgetChildren() error {
	signal.Ignore(syscall.SIGCHLD) // now the runtime does not handle it, but the kernel would reap children by itself
	byDefault := make([]uint64, 4) // struct sigaction of the kernel: SIG_DFL, no flags, no mask
	_, _, errno := syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, uintptr(syscall.SIGCHLD), uintptr(unsafe.Pointer(&byDefault[0])), 0, 8, 0,
		0)
	if errno != 0 {
		return fmt.Errorf("reset SIGCHLD: %w", errno)
	}
	return nil
}
