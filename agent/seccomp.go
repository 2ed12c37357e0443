package agent

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// restrict installs a filter (seccomp(2)) on all threads of the agent, which its children inherit. It keeps from all of them, also from
// root in a user namespace of its own, what nobody needs once the machine is set up: to mount, since a writable cgroup tree lifts limits
// and a tmpfs takes memory that no limit counts; and to signal or limit the agent by its pid.
//
// It is short on purpose: the sentry runs it for every system call there is at each fork, to know which results depend on arguments.
func restrict() error {
	const (
		offsetNr, offsetArg0 = 0, 16 // of struct seccomp_data
		jump                 = unix.BPF_JMP | unix.BPF_K
	)
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offsetNr},
		{Code: jump | unix.BPF_JGE, K: unix.SYS_OPEN_TREE, Jf: 1},     // the new calls to mount are one range of numbers, on all machines
		{Code: jump | unix.BPF_JGT, K: unix.SYS_FSPICK, Jt: 7, Jf: 6}, // beyond them or one of them
		{Code: jump | unix.BPF_JEQ, K: unix.SYS_MOUNT, Jt: 5},
		{Code: jump | unix.BPF_JEQ, K: unix.SYS_KILL, Jt: 2},
		{Code: jump | unix.BPF_JEQ, K: unix.SYS_TGKILL, Jt: 1},
		{Code: jump | unix.BPF_JEQ, K: unix.SYS_PRLIMIT64, Jf: 3},      // anything else is allowed
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offsetArg0}, // the three have the pid first
		{Code: jump | unix.BPF_JEQ, K: 1, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program)))
	runtime.KeepAlive(filter)
	if errno != 0 {
		return fmt.Errorf("restrict system calls: %w", errno)
	}
	return nil
}
