package agent

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// cgroups is the part of the guest's cgroup tree that holds all user processes. It is reached by descriptors only: what users
// see at /sys/fs/cgroup is read-only, so that root in the sandbox cannot lift its limits.
type cgroups struct {
	dir  *os.File
	pids atomic.Int64 // the limit of tasks, or 0
	seq  atomic.Int64 // names of cgroups
	// ready holds cgroups made ahead: making one costs about as much as a tenth of a short command.
	ready chan *cgroup
	cpu   atomic.Int64 // milliseconds used in cgroups that are removed
}

// cgroup holds one process and everything it started. A nil cgroup is one outside a sandbox: it is empty.
type cgroup struct {
	dir    *os.File
	parent *cgroups
	name   string

	mu      sync.Mutex
	removed bool
}

const cgroupMount = "/sys/fs/cgroup"

// mountCgroups moves the agent out of the way, makes the users' cgroup, and hides the writable tree.
func mountCgroups() (*cgroups, error) {
	agent, user := filepath.Join(cgroupMount, "agent"), filepath.Join(cgroupMount, "user")
	for _, dir := range []string{agent, user} {
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, fmt.Errorf("make cgroup: %w", err)
		}
	}
	if err := os.WriteFile(filepath.Join(agent, "cgroup.procs"), []byte("0"), 0); err != nil {
		return nil, fmt.Errorf("enter cgroup: %w", err)
	}
	for _, dir := range []string{cgroupMount, user} {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+cpu +memory +pids"), 0); err != nil {
			return nil, fmt.Errorf("enable cgroup controllers: %w", err)
		}
	}
	dir, err := os.Open(user)
	if err != nil {
		return nil, err
	}
	if err := unix.Unmount(cgroupMount, unix.MNT_DETACH); err != nil {
		return nil, fmt.Errorf("hide cgroups: %w", err)
	}
	if err := unix.Mount("cgroup2", cgroupMount, "cgroup2", unix.MS_RDONLY, ""); err != nil {
		return nil, fmt.Errorf("mount cgroups read-only: %w", err)
	}
	return &cgroups{dir: dir, ready: make(chan *cgroup, 4)}, nil
}

// limit bounds the number of tasks of all user processes together, and tells programs the memory limit, which the guard enforces.
func (c *cgroups) limit(pids, memory int64) error {
	c.pids.Store(pids)
	for stale := true; stale; { // they have the old limit
		select {
		case g := <-c.ready:
			g.remove()
		default:
			stale = false
		}
	}
	for name, value := range map[string]int64{"pids.max": pids, "memory.max": memory} {
		text := "max"
		if value > 0 {
			text = strconv.FormatInt(value, 10)
		}
		if err := writeAt(c.dir, name, text); err != nil {
			return fmt.Errorf("limit %s: %w", name, err)
		}
	}
	return nil
}

// add gives a cgroup for a process. It may fill all but an eighth of the users' cgroup, so that a fork bomb in one leaves room for others.
func (c *cgroups) add() (*cgroup, error) {
	select {
	case g := <-c.ready:
		return g, nil
	default:
		return c.make()
	}
}

// stock makes a cgroup ahead, if there is none; it is called when nobody waits.
func (c *cgroups) stock() {
	if len(c.ready) > 0 {
		return
	}
	g, err := c.make()
	if err != nil {
		return // add will meet the same error, and tell it
	}
	select {
	case c.ready <- g:
	default:
		g.remove()
	}
}

func (c *cgroups) make() (*cgroup, error) {
	name := "p" + strconv.FormatInt(c.seq.Add(1), 10)
	if err := unix.Mkdirat(int(c.dir.Fd()), name, 0o755); err != nil {
		return nil, fmt.Errorf("make cgroup %s: %w", name, err)
	}
	fd, err := unix.Openat(int(c.dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		_ = unix.Unlinkat(int(c.dir.Fd()), name, unix.AT_REMOVEDIR)
		return nil, fmt.Errorf("open cgroup %s: %w", name, err)
	}
	g := &cgroup{dir: os.NewFile(uintptr(fd), name), parent: c, name: name}
	if share := c.pids.Load() / 8 * 7; share > 0 {
		if err := writeAt(g.dir, "pids.max", strconv.FormatInt(share, 10)); err != nil {
			g.remove()
			return nil, fmt.Errorf("limit cgroup %s: %w", name, err)
		}
	}
	return g, nil
}

// remove takes the cgroup away if nothing is left in it.
func (g *cgroup) remove() bool {
	if g == nil {
		return true
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.removed {
		return true
	}
	cpu := keyed(readAt(g.dir, "cpu.stat"), "usage_usec") / 1000 // the parent forgets it
	if err := unix.Unlinkat(int(g.parent.dir.Fd()), g.name, unix.AT_REMOVEDIR); err != nil {
		return false
	}
	g.parent.cpu.Add(cpu)
	g.removed = true
	_ = g.dir.Close()
	return true
}

// read reads a file of the cgroup; "" when it is gone.
func (g *cgroup) read(name string) string {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.removed {
		return ""
	}
	return readAt(g.dir, name)
}

// pids lists what runs in the cgroup.
func (g *cgroup) pids() []int {
	if g == nil {
		return nil
	}
	var pids []int
	for _, line := range strings.Fields(g.read("cgroup.procs")) {
		if pid, err := strconv.Atoi(line); err == nil && pid > 1 {
			pids = append(pids, pid)
		}
	}
	return pids
}

// kill ends everything in the cgroup.
func (g *cgroup) kill() {
	if g == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.removed {
		_ = writeAt(g.dir, "cgroup.kill", "1")
	}
}

// hitLimit says whether a fork in the cgroup was refused for its number of tasks.
func (g *cgroup) hitLimit() bool { return g != nil && keyed(g.read("pids.events"), "max") > 0 }

// usage gives CPU milliseconds and memory bytes of the cgroup, or outside a sandbox of the process.
func (g *cgroup) usage(pid int) (cpuMS, memory int64) {
	if g == nil {
		return procUsage(pid)
	}
	return keyed(g.read("cpu.stat"), "usage_usec") / 1000, number(g.read("memory.current"))
}

func procUsage(pid int) (cpuMS, memory int64) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 22 {
		return 0, 0
	}
	const tick = 10 // milliseconds: USER_HZ is 100 on every Linux
	return (number(fields[11]) + number(fields[12])) * tick, number(fields[21]) * int64(os.Getpagesize())
}

// usage is the consumption of all user processes.
func (c *cgroups) usage() Usage {
	return Usage{
		Memory:    number(readAt(c.dir, "memory.current")),
		CPUMS:     c.cpu.Load() + keyed(readAt(c.dir, "cpu.stat"), "usage_usec")/1000,
		Processes: number(readAt(c.dir, "pids.current")),
	}
}

func readAt(dir *os.File, name string) string {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(fd)
	var all []byte
	buf := make([]byte, 4<<10)
	for len(all) < 1<<20 {
		n, err := unix.Read(fd, buf)
		if n <= 0 || err != nil {
			break
		}
		all = append(all, buf[:n]...)
		if n < len(buf)/2 {
			break // cgroupfs gives a small file at once
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
	n, _ := strconv.ParseInt(strings.TrimSpace(text), 10, 64) // unreadable is 0
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

// guard keeps the memory of all user processes under a limit, which gVisor's memory.max does not: it kills the largest one. It looks
// often when little is left, seldom when much is, and not at all while nothing runs.
type guard struct {
	server *Server
	woken  chan struct{}
	awake  atomic.Bool // it will look again by itself
	victim int         // pid of the last one
	killed time.Time
}

func (g *guard) wake() {
	if g.awake.Load() {
		return
	}
	select {
	case g.woken <- struct{}{}:
	default:
	}
}

func (g *guard) run() {
	timer := time.NewTimer(0)
	for {
		select {
		case <-g.server.ctx.Done():
			return
		case <-g.woken:
		case <-timer.C:
		}
		g.awake.Store(false) // who starts a process from here on wakes it again
		g.server.mu.Lock()
		limit := g.server.config.MaxMemory
		g.server.mu.Unlock()
		if limit <= 0 {
			continue
		}
		used := number(readAt(g.server.groups.dir, "memory.current"))
		pause := 100 * time.Millisecond
		switch {
		case used > limit:
			g.relieve(used, limit)
			pause = 2 * time.Millisecond
		case used > limit/2:
			pause = 10 * time.Millisecond
		case number(readAt(g.server.groups.dir, "pids.current")) == 0:
			continue // until the next start
		}
		g.awake.Store(true)
		timer.Reset(pause)
	}
}

// relieve kills the largest process, unless the last victim's memory is still being freed. Far beyond the limit it does not wait: many
// processes that grow at once would outrun it.
func (g *guard) relieve(used, limit int64) {
	if used < limit+limit/4 && g.victim > 0 && time.Since(g.killed) < victimTime && syscall.Kill(g.victim, 0) == nil {
		return
	}
	g.victim, g.killed = g.server.killLargest(used, limit), time.Now()
}

// victimTime is how long a killed process may take to be gone before another one is killed.
const victimTime = 300 * time.Millisecond

// killLargest kills the user process with the most memory, and gives its pid, or 0 where there is none.
func (s *Server) killLargest(used, limit int64) int {
	var victim *process
	var worst, pid int64
	for _, p := range s.all() {
		for _, candidate := range p.group.pids() {
			if _, rss := procUsage(candidate); rss > worst {
				victim, worst, pid = p, rss, int64(candidate)
			}
		}
	}
	if victim == nil {
		return 0
	}
	victim.blame(CauseOOM)
	s.oomKills.Add(1)
	s.log("out of memory: %d of %d bytes used: kill pid %d of process %s with %d bytes", used, limit, pid, victim.id, worst)
	_ = unix.Kill(int(pid), unix.SIGKILL)
	return int(pid)
}
