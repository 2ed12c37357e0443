package guest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/agent/guest/rawsys"
)

// cgroups is the part of the guest's cgroup tree that holds all user processes. The agent reaches it by descriptors only: what users see at
// /sys/fs/cgroup is read-only, so that root in the sandbox cannot lift its limits.
type cgroups struct {
	dir *os.File
	// The files that the guard reads stay open, as do those of each cgroup: a system call of the guest costs tens of microseconds.
	memory, tasks *os.File
	bridges       *os.File // the processes of the agent's own cgroup
	limits        atomic.Pointer[groupLimits]
	seq           atomic.Int64 // for the names of cgroups
	// ready holds cgroups made in advance, and empty ones for reuse: making a cgroup takes about a tenth of the time of a short command.
	ready chan *cgroup
	cpu   atomic.Int64 // milliseconds used in cgroups that were removed
}

// groupLimits are the limits that a cgroup was made with: a cgroup with other limits than the current ones is not reused.
type groupLimits struct {
	pids, memory int64
	cpu          float64
}

// write sets the limits of a cgroup. gVisor enforces only the number of tasks; the other limits tell programs, which look in their own
// cgroup or at the root of the mount, what the guard and the host enforce. Zero is no limit.
func (l groupLimits) write(dir *os.File) error {
	most := func(n int64) string {
		if n <= 0 {
			return "max"
		}
		return strconv.FormatInt(n, 10)
	}
	for _, f := range [][2]string{
		{"pids.max", most(l.pids)}, {"memory.max", most(l.memory)},
		{"cpu.max", fmt.Sprintf("%s %d", most(int64(l.cpu*cpuPeriod)), cpuPeriod)},
	} {
		if err := writeAt(dir, f[0], f[1]); err != nil {
			return fmt.Errorf("limit %s: %w", f[0], err)
		}
	}
	return nil
}

// cpuPeriod is the period of cpu.max in microseconds: the default of Linux.
const cpuPeriod = 100_000

// cgroup holds one process and everything it started. Outside a sandbox it is nil, and empty.
type cgroup struct {
	*groupDir
	cpuBefore, refusedBefore int64 // by earlier users of the directory: milliseconds, and refused forks

	mu   sync.Mutex
	gone bool // the directory was removed, or has another user
}

// groupDir is a cgroup's directory.
type groupDir struct {
	parent              *cgroups
	name                string
	limits              *groupLimits
	dir                 *os.File
	procs, cpu, refused *os.File
}

const cgroupMount = "/sys/fs/cgroup"

// mountCgroups moves the agent into a cgroup of its own, makes the users' cgroup, and hides the writable tree. Each user process begins in
// a cgroup namespace of its own (rawsys.Attr.Group): root of another user namespace that mounts cgroups sees only its own cgroup, and none
// beside or above it.
func mountCgroups() (*cgroups, error) {
	agent, user := filepath.Join(cgroupMount, "agent"), filepath.Join(cgroupMount, "user")
	for _, dir := range []string{agent, user} {
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, fmt.Errorf("make cgroup: %w", err)
		}
	}
	root, err := os.Open(cgroupMount)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	dir, err := os.Open(user)
	if err != nil {
		return nil, err
	}
	if err := showCgroup(dir); err != nil {
		return nil, err
	}
	if err := writeAt(root, "agent/cgroup.procs", "0"); err != nil {
		return nil, fmt.Errorf("enter cgroup: %w", err)
	}
	for _, d := range []*os.File{root, dir} {
		if err := writeAt(d, "cgroup.subtree_control", "+cpu +memory +pids"); err != nil {
			return nil, fmt.Errorf("enable cgroup controllers: %w", err)
		}
	}
	// Each process has one cgroup without children: programs cannot make more of them, so nothing has to bound their number.
	if err := writeAt(dir, "cgroup.max.depth", "1"); err != nil {
		return nil, fmt.Errorf("limit the depth of cgroups: %w", err)
	}
	c := &cgroups{dir: dir, ready: make(chan *cgroup, 4)}
	c.limits.Store(&groupLimits{})
	if c.memory, err = openAt(dir, "memory.current"); err != nil {
		return nil, err
	}
	if c.tasks, err = openAt(dir, "pids.current"); err != nil {
		return nil, err
	}
	c.bridges, err = openAt(root, "agent/cgroup.procs")
	return c, err
}

// showCgroup mounts the cgroup in dir and its children where programs look for cgroups: read-only, and in place of all others. A mount
// shows the root of the caller's cgroup namespace, so the thread enters a namespace with this root for that time.
func showCgroup(dir *os.File) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before, err := unix.Open("/proc/thread-self/ns/cgroup", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open cgroup namespace: %w", err)
	}
	defer unix.Close(before)
	if err := writeAt(dir, "cgroup.procs", "0"); err != nil {
		return fmt.Errorf("enter cgroup: %w", err)
	}
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("make cgroup namespace: %w", err)
	}
	if err := unix.Unmount(cgroupMount, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("hide cgroups: %w", err)
	}
	if err := unix.Mount("cgroup2", cgroupMount, "cgroup2", unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("mount cgroups read-only: %w", err)
	}
	if err := unix.Setns(before, unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("leave cgroup namespace: %w", err)
	}
	return nil
}

// limit sets the limits of all user processes together.
func (c *cgroups) limit(l groupLimits) error {
	c.limits.Store(&l)
	for stale := true; stale; { // ready cgroups have the old limits
		select {
		case g := <-c.ready:
			g.remove()
		default:
			stale = false
		}
	}
	return l.write(c.dir)
}

// add returns a cgroup for a process. The process may fill seven eighths of the users' cgroup, so that a fork bomb in it leaves room for
// others.
func (c *cgroups) add() (*cgroup, error) {
	select {
	case g := <-c.ready:
		return g, nil
	default:
		return c.make()
	}
}

// stock makes a cgroup in advance if there is none; it is called when no caller waits.
func (c *cgroups) stock() {
	if len(c.ready) > 0 {
		return
	}
	g, err := c.make()
	if err != nil {
		return // add will get the same error, and report it
	}
	select {
	case c.ready <- g:
	default:
		g.remove()
	}
}

func (c *cgroups) make() (*cgroup, error) {
	d := &groupDir{parent: c, name: "p" + strconv.FormatInt(c.seq.Add(1), 10), limits: c.limits.Load()}
	g := &cgroup{groupDir: d}
	if err := unix.Mkdirat(int(c.dir.Fd()), d.name, 0o755); err != nil {
		return nil, fmt.Errorf("make cgroup %s: %w", d.name, err)
	}
	var err error
	for _, f := range []struct {
		file **os.File
		in   *os.File
		name string
	}{{&d.dir, c.dir, d.name}, {&d.procs, nil, "cgroup.procs"}, {&d.cpu, nil, "cpu.stat"}, {&d.refused, nil, "pids.events"}} {
		if f.in == nil {
			f.in = d.dir
		}
		if *f.file, err = openAt(f.in, f.name); err != nil {
			g.remove()
			return nil, fmt.Errorf("open cgroup %s: %w", d.name, err)
		}
	}
	own := *d.limits
	own.pids = own.pids / 8 * 7
	if err := own.write(d.dir); err != nil {
		g.remove()
		return nil, fmt.Errorf("cgroup %s: %w", d.name, err)
	}
	return g, nil
}

// leftMemory is how much memory an empty cgroup may still have to be reused: it would be charged to the next process.
const leftMemory = 4 << 20

// release keeps the cgroup for reuse if it is empty, and removes it otherwise. A process that did not last cannot have left much memory as
// files, so release does not look for it: that would take a part of a short command's time.
func (g *cgroup) release(lasted bool) {
	if g == nil {
		return
	}
	g.mu.Lock()
	c := g.parent
	if g.gone || g.limits != c.limits.Load() || len(c.ready) == cap(c.ready) || readFile(g.procs) != "" ||
		lasted && number(readAt(g.dir, "memory.current")) > leftMemory {
		g.mu.Unlock()
		g.remove()
		return
	}
	next := &cgroup{groupDir: g.groupDir, cpuBefore: g.groupDir.cpuMS(), refusedBefore: g.groupDir.refusals()}
	g.gone = true
	g.mu.Unlock()
	select {
	case c.ready <- next:
	default:
		next.remove()
	}
}

// remove removes the cgroup if it is empty, and reports whether it is gone.
func (g *cgroup) remove() bool {
	if g == nil {
		return true
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.gone {
		return true
	}
	cpu := g.groupDir.cpuMS() // the parent's count loses it
	if err := unix.Unlinkat(int(g.parent.dir.Fd()), g.name, unix.AT_REMOVEDIR); err != nil {
		return false
	}
	g.parent.cpu.Add(cpu)
	g.gone = true
	for _, f := range []*os.File{g.dir, g.procs, g.groupDir.cpu, g.refused} {
		_ = f.Close() // nil if it could not be opened
	}
	return true
}

// cpuMS returns the CPU time used in the directory since it was made, in milliseconds.
func (d *groupDir) cpuMS() int64 { return keyed(readFile(d.cpu), "usage_usec") / 1000 }

// refusals counts the forks refused in the directory since it was made.
func (d *groupDir) refusals() int64 { return keyed(readFile(d.refused), "max") }

// pids lists the processes in the cgroup.
func (g *cgroup) pids() []int {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.gone {
		return nil
	}
	return parsePIDs(readFile(g.procs))
}

// parsePIDs parses a list of processes and leaves out the agent.
func parsePIDs(list string) (pids []int) {
	for _, word := range strings.Fields(list) {
		if pid, err := strconv.Atoi(word); err == nil && pid > 1 {
			pids = append(pids, pid)
		}
	}
	return pids
}

// kill kills every process in the cgroup.
func (g *cgroup) kill() {
	if g == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.gone {
		_ = writeAt(g.dir, "cgroup.kill", "1")
	}
}

// hitLimit reports whether a fork in the cgroup was refused because of its number of tasks.
func (g *cgroup) hitLimit() bool {
	if g == nil {
		return false
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return !g.gone && g.refusals() > g.refusedBefore
}

// usage returns the CPU time in milliseconds and the memory in bytes of the cgroup or, outside a sandbox, of the process.
func (g *cgroup) usage(pid int) (cpuMS, memory int64) {
	if g == nil {
		return procUsage(pid)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.gone {
		return 0, 0
	}
	return g.groupDir.cpuMS() - g.cpuBefore, number(readAt(g.dir, "memory.current"))
}

func procUsage(pid int) (cpuMS, memory int64) {
	fields := procStat(pid)
	if len(fields) < 22 {
		return 0, 0
	}
	const tick = 10 // milliseconds: USER_HZ is 100 on every Linux
	return (number(fields[11]) + number(fields[12])) * tick, number(fields[21]) * int64(os.Getpagesize())
}

// procStat returns the fields of a process's stat file (proc(5)) from its state on; nil if there is no such process.
func procStat(pid int) []string {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil
	}
	return strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
}

// usage returns the resource usage of all user processes.
func (c *cgroups) usage() agent.Usage {
	return agent.Usage{
		Memory:    number(readFile(c.memory)),
		CPUMS:     c.cpu.Load() + keyed(readAt(c.dir, "cpu.stat"), "usage_usec")/1000,
		Processes: number(readFile(c.tasks)),
	}
}

// openAt opens a cgroup, or a file in it, for reading.
func openAt(dir *os.File, name string) (*os.File, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// readAt reads a file of a cgroup; "" if that fails.
func readAt(dir *os.File, name string) string {
	f, err := openAt(dir, name)
	if err != nil {
		return ""
	}
	defer f.Close()
	return readFile(f)
}

// readFile reads the current content of an open file of a cgroup; "" if that fails.
func readFile(f *os.File) string {
	var all []byte
	buf := make([]byte, 4<<10)
	for len(all) < 1<<20 {
		n, err := rawsys.Pread(int(f.Fd()), buf, int64(len(all)))
		if n <= 0 || err != nil {
			break
		}
		all = append(all, buf[:n]...)
		if n < len(buf)/2 {
			break // cgroupfs returns a small file in one read
		}
	}
	return string(all)
}

func writeAt(dir *os.File, name, text string) error {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte(text))
	return err
}

func number(text string) int64 {
	n, _ := strconv.ParseInt(strings.TrimSpace(text), 10, 64) // 0 if unreadable
	return n
}

func keyed(text, key string) int64 {
	for line := range strings.Lines(text) {
		if k, v, ok := strings.Cut(line, " "); ok && k == key {
			return number(v)
		}
	}
	return 0
}
