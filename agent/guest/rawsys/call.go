package rawsys

import (
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// call makes a system call that does not block. The memory that its arguments point to escapes to the heap and stays alive.
//
//go:uintptrescapes
func call(number, a, b, c, d, e uintptr) (int, error) {
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

// Read reads what is available on a non-blocking descriptor.
func Read(fd int, p []byte) (int, error) {
	return call(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), 0, 0)
}

// Pread reads a file of a cgroup, which is in memory.
func Pread(fd int, p []byte, offset int64) (int, error) {
	return call(unix.SYS_PREAD64, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), uintptr(offset), 0)
}

// Close closes a pipe, or another descriptor whose close does no work.
func Close(fd int) {
	_, _, _ = syscall.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) // once: the descriptor is closed even after an error
}

// Pipe makes a pipe; our end of it does not block.
func Pipe(ours int) (fds [2]int, err error) {
	var made [2]int32
	if _, err := call(unix.SYS_PIPE2, uintptr(unsafe.Pointer(&made)), unix.O_CLOEXEC, 0, 0, 0); err != nil {
		return fds, err
	}
	fds = [2]int{int(made[0]), int(made[1])}
	if _, err = call(unix.SYS_FCNTL, uintptr(fds[ours]), unix.F_SETFL, unix.O_NONBLOCK, 0,
		0); err != nil { // a new pipe has no other flags
		Close(fds[0])
		Close(fds[1])
	}
	return fds, err
}

// Chown changes the owner of a pipe.
func Chown(fd int, uid, gid uint32) error {
	_, err := call(unix.SYS_FCHOWN, uintptr(fd), uintptr(uid), uintptr(gid), 0, 0)
	return err
}

// Poll returns the events of an epoll without waiting.
func Poll(epoll int, events []unix.EpollEvent) int {
	n, err := call(unix.SYS_EPOLL_PWAIT, uintptr(epoll), uintptr(unsafe.Pointer(unsafe.SliceData(events))), uintptr(len(events)), 0, 0)
	if err != nil {
		return 0 // the next call sees the events
	}
	return n
}

// EpollCtl adds a descriptor to an epoll, or removes it.
func EpollCtl(epoll, op, fd int, event *unix.EpollEvent) error {
	_, err := call(unix.SYS_EPOLL_CTL, uintptr(epoll), uintptr(op), uintptr(fd), uintptr(unsafe.Pointer(event)), 0)
	return err
}

// Stat describes a file and follows symlinks.
func Stat(name string) (st unix.Statx_t, err error) {
	path, err := syscall.BytePtrFromString(name)
	if err != nil {
		return st, err
	}
	cwd := unix.AT_FDCWD
	if _, err = call(unix.SYS_STATX, uintptr(cwd), uintptr(unsafe.Pointer(path)), 0, unix.STATX_BASIC_STATS,
		uintptr(unsafe.Pointer(&st))); err != nil {
		err = &os.PathError{Op: "stat", Path: name, Err: err}
	}
	return st, err
}

// IsDir reports whether a path leads to a directory.
func IsDir(name string) bool {
	st, err := Stat(name)
	return err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR
}

// Wait takes the status of a child that has ended; pid -1 means any child. got is 0 if there is none.
func Wait(pid int, status *syscall.WaitStatus, usage *syscall.Rusage) (got int, err error) {
	return call(unix.SYS_WAIT4, uintptr(pid), uintptr(unsafe.Pointer(status)), unix.WALL|unix.WNOHANG, uintptr(unsafe.Pointer(usage)), 0)
}

// Pending returns how many bytes a pipe holds.
func Pending(fd int) (int, error) {
	var n int32
	_, err := call(unix.SYS_IOCTL, uintptr(fd), unix.TIOCINQ, uintptr(unsafe.Pointer(&n)), 0, 0)
	return int(n), err
}
