package rawsys

import (
	"math"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Attr says how Spawn starts a process.
type Attr struct {
	Dir   string
	Env   []string
	Stdio [3]int      // descriptors that become 0, 1 and 2; each is its own target or above 2
	Group int         // descriptor of the cgroup to start in; 0 means the caller's
	User  *Credential // nil means the caller's
	TTY   bool        // descriptor 0 becomes its controlling terminal
	Pidfd bool
	Files *unix.Rlimit // limit of its descriptors; nil means the caller's
	// Limit, if not nil, gets a function that kills a child that has not executed yet, if Pidfd is set. It is called before the start; what
	// it returns is called when the child has executed or ended.
	Limit func(kill func()) (stop func())
}

// Credential is the user as which a process runs.
type Credential struct {
	UID, GID uint32
	Groups   []uint32
}

// Child is what Spawn started. Pidfd is -1 if none was asked for.
type Child struct{ PID, Pidfd int }

// Spawn starts a program as the leader of a new session. It does the same as syscall.ForkExec with a third of the system calls, each of
// which costs microseconds in gVisor: the kernel resets the signal handlers (CLONE_CLEAR_SIGHAND), and an error comes back in shared
// memory. Only the calling thread waits until the child has executed, which may take as long as the guest wants.
func Spawn(name string, args []string, attr Attr) (c Child, err error) {
	c.Pidfd = -1
	path, err := syscall.BytePtrFromString(name)
	if err != nil {
		return c, err
	}
	argv, err := syscall.SlicePtrFromStrings(args)
	if err != nil {
		return c, err
	}
	envv, err := syscall.SlicePtrFromStrings(attr.Env)
	if err != nil {
		return c, err
	}
	var dir *byte
	if attr.Dir != "" {
		if dir, err = syscall.BytePtrFromString(attr.Dir); err != nil {
			return c, err
		}
	}
	m := &spawnMemory{masks: [2]uint64{^uint64(0), 0}, pidfd: -1}
	m.plan(attr, dir)
	m.add(unix.SYS_EXECVE, uintptr(unsafe.Pointer(path)), uintptr(unsafe.Pointer(&argv[0])), uintptr(unsafe.Pointer(&envv[0])))
	watch := m.watch(attr.Limit)
	pid := cloneAndRun(&m.clone, unsafe.Sizeof(m.clone), &m.steps[0], uintptr(m.n), &m.masks, &m.failed)
	watch()
	runtime.KeepAlive(path)
	runtime.KeepAlive(argv)
	runtime.KeepAlive(envv)
	runtime.KeepAlive(dir)
	runtime.KeepAlive(m)
	if errno := -int(pid); errno > 0 && errno < 4096 {
		m.failed = uintptr(errno)
		pid = 0
	}
	c = Child{PID: int(pid), Pidfd: int(m.pidfd)}
	if m.failed == 0 {
		return c, nil
	}
	if c.Pidfd >= 0 {
		_ = unix.Close(c.Pidfd)
	}
	if c.PID > 0 {
		_ = waitFor(c.PID, nil) // ECHILD: the reaper was faster
	}
	return Child{Pidfd: -1}, syscall.Errno(m.failed)
}

// plan sets the attributes of the child and its system calls before execve; dir is its directory, or nil for the caller's.
func (m *spawnMemory) plan(attr Attr, dir *byte) {
	m.clone.flags, m.clone.exitSignal = unix.CLONE_VM|unix.CLONE_VFORK|unix.CLONE_CLEAR_SIGHAND, uint64(syscall.SIGCHLD)
	if attr.Group > 0 {
		m.clone.flags |= unix.CLONE_INTO_CGROUP
		m.clone.cgroup = uint64(attr.Group)
	}
	if attr.Pidfd {
		m.clone.flags |= unix.CLONE_PIDFD
		m.clone.pidfd = uint64(uintptr(unsafe.Pointer(&m.pidfd)))
	}
	m.add(unix.SYS_SETSID)
	if attr.Group > 0 { // its cgroup becomes the root of all that it can mount, so it cannot change its own limits
		m.add(unix.SYS_UNSHARE, unix.CLONE_NEWCGROUP)
	}
	for to, from := range attr.Stdio {
		if from != to {
			m.add(unix.SYS_DUP3, uintptr(from), uintptr(to))
		}
	}
	// Closing on exec is not enough: exec may take as long as the guest wants, and the child would hold everyone's pipes until then.
	m.add(unix.SYS_CLOSE_RANGE, 3, math.MaxUint32, 0)
	if attr.Files != nil {
		m.files = *attr.Files
		m.add(unix.SYS_PRLIMIT64, 0, unix.RLIMIT_NOFILE, uintptr(unsafe.Pointer(&m.files)), 0)
	}
	if u := attr.User; u != nil {
		m.groups = append(m.groups, u.Groups...)
		m.add(unix.SYS_SETGROUPS, uintptr(len(m.groups)), uintptr(unsafe.Pointer(unsafe.SliceData(m.groups))))
		m.add(unix.SYS_SETGID, uintptr(u.GID))
		m.add(unix.SYS_SETUID, uintptr(u.UID))
	}
	if dir != nil {
		m.add(unix.SYS_CHDIR, uintptr(unsafe.Pointer(dir)))
	}
	if attr.TTY {
		m.add(unix.SYS_IOCTL, 0, unix.TIOCSCTTY, 1)
	}
	m.add(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&m.none)), 0, 8)
}

// watch has limit kill a child that has not executed. The caller calls done when the child has executed or ended.
func (m *spawnMemory) watch(limit func(kill func()) (stop func())) (done func()) {
	if limit == nil {
		return func() {}
	}
	var mu sync.Mutex
	over := false
	stop := limit(func() {
		mu.Lock()
		defer mu.Unlock()
		if fd := atomic.LoadInt32(&m.pidfd); !over && fd >= 0 {
			_ = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) // an error means that it has ended
		}
	})
	return func() {
		stop()
		mu.Lock()
		defer mu.Unlock()
		over = true
	}
}

func waitFor(pid int, status *syscall.WaitStatus) error {
	for {
		if _, err := syscall.Wait4(pid, status, unix.WALL, nil); err != syscall.EINTR {
			return err
		}
	}
}

// spawnMemory is what the child needs between fork and exec. It is on the heap, which does not move.
type spawnMemory struct {
	clone  cloneArgs
	steps  [14]step
	n      int
	masks  [2]uint64 // signal masks: all signals, and the caller's
	none   uint64    // the child's signal mask
	failed uintptr   // errno of the child's system call that failed
	pidfd  int32
	files  unix.Rlimit
	groups []uint32
}

// cloneArgs is struct clone_args of clone3(2).
type cloneArgs struct {
	flags, pidfd uint64
	_            [2]uint64 // child_tid, parent_tid
	exitSignal   uint64
	_            [5]uint64 // stack, stack_size, tls, set_tid, set_tid_size
	cgroup       uint64
}

// step is a system call of the child.
type step struct {
	number uintptr
	args   [6]uintptr
}

func (m *spawnMemory) add(number uintptr, args ...uintptr) {
	m.steps[m.n].number = number
	copy(m.steps[m.n].args[:], args)
	m.n++
}

// cloneAndRun creates a process with clone3(2) that makes n system calls, the last of which should be execve. The first call that fails
// ends the process and leaves its errno in failed. All signals are blocked meanwhile: masks[0] is the set of all signals, masks[1] receives
// the caller's mask. The Go scheduler knows that the thread waits.
func cloneAndRun(args *cloneArgs, size uintptr, steps *step, n uintptr, masks *[2]uint64, failed *uintptr) (pid uintptr)
