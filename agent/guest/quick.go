package guest

import (
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The system calls of this file do not block, and bypass the Go scheduler. The scheduler would wake its monitor for each call after an idle
// time; the monitor then wakes every 20 µs for a millisecond. But only the monitor takes the processor from a goroutine that keeps it, so
// code that runs for long must make an ordinary call in time. Work for the host begins with one, which reads the request (stdio.go).

// quick makes a system call. The memory that its arguments point to escapes to the heap and stays alive.
//
//go:uintptrescapes
func quick(number, a, b, c, d, e uintptr) (int, error) {
	for {
		switch r, _, errno := syscall.RawSyscall6(number, a, b, c, d, e, 0); errno {
		case 0:
			return int(r), nil
		case syscall.EINTR:
		default:
			return -1, errno
		}
	}
}

// quickRead reads what is available on a non-blocking descriptor.
func quickRead(fd int, p []byte) (int, error) {
	return quick(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), 0, 0)
}

// quickPread reads a file of a cgroup, which is in memory.
func quickPread(fd int, p []byte, offset int64) (int, error) {
	return quick(unix.SYS_PREAD64, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), uintptr(offset), 0)
}

// quickClose closes a pipe, or another descriptor whose close does no work.
func quickClose(fd int) {
	_, _, _ = syscall.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) // once: the descriptor is closed even after an error
}

// quickPipe makes a pipe; our end of it does not block.
func quickPipe(ours int) (fds [2]int, err error) {
	var made [2]int32
	if _, err := quick(unix.SYS_PIPE2, uintptr(unsafe.Pointer(&made)), unix.O_CLOEXEC, 0, 0, 0); err != nil {
		return fds, err
	}
	fds = [2]int{int(made[0]), int(made[1])}
	if _, err = quick(unix.SYS_FCNTL, uintptr(fds[ours]), unix.F_SETFL, unix.O_NONBLOCK, 0,
		0); err != nil { // a new pipe has no other flags
		quickClose(fds[0])
		quickClose(fds[1])
	}
	return fds, err
}

// quickChown changes the owner of a pipe.
func quickChown(fd int, uid, gid uint32) error {
	_, err := quick(unix.SYS_FCHOWN, uintptr(fd), uintptr(uid), uintptr(gid), 0, 0)
	return err
}

// quickPoll returns the events of an epoll without waiting.
func quickPoll(epoll int, events []unix.EpollEvent) int {
	n, err := quick(unix.SYS_EPOLL_PWAIT, uintptr(epoll), uintptr(unsafe.Pointer(unsafe.SliceData(events))), uintptr(len(events)), 0, 0)
	if err != nil {
		return 0 // the next call sees the events
	}
	return n
}

func quickEpollCtl(epoll, op, fd int, event *unix.EpollEvent) error {
	_, err := quick(unix.SYS_EPOLL_CTL, uintptr(epoll), uintptr(op), uintptr(fd), uintptr(unsafe.Pointer(event)), 0)
	return err
}

// quickStat describes a file and follows symlinks.
func quickStat(name string) (st unix.Statx_t, err error) {
	path, err := syscall.BytePtrFromString(name)
	if err != nil {
		return st, err
	}
	cwd := unix.AT_FDCWD
	if _, err = quick(unix.SYS_STATX, uintptr(cwd), uintptr(unsafe.Pointer(path)), 0, unix.STATX_BASIC_STATS,
		uintptr(unsafe.Pointer(&st))); err != nil {
		err = &os.PathError{Op: "stat", Path: name, Err: err}
	}
	return st, err
}

func isDir(name string) bool {
	st, err := quickStat(name)
	return err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR
}

// quickWait takes the status of a child that has ended; pid -1 means any child. got is 0 if there is none.
func quickWait(pid int) (got int, s exitStatus, err error) {
	got, err = quick(unix.SYS_WAIT4, uintptr(pid), uintptr(unsafe.Pointer(&s.status)), unix.WALL|unix.WNOHANG,
		uintptr(unsafe.Pointer(&s.usage)), 0)
	return got, s, err
}

// pendingBytes returns how many bytes a pipe holds.
func pendingBytes(fd int) (int, error) {
	var n int32
	_, err := quick(unix.SYS_IOCTL, uintptr(fd), unix.TIOCINQ, uintptr(unsafe.Pointer(&n)), 0, 0)
	return int(n), err
}
