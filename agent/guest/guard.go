package guest

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"soulbox.dev/soulbox/agent"
)

// guard keeps the memory of all user processes under a limit, which gVisor's memory.max does not. When they use more, it stops all of them
// at once, because many growing processes would outrun it; then it kills the largest, and resumes the others when the memory is free. It
// looks often when little memory is left or the use grows quickly, rarely otherwise, and never while nothing runs.
type guard struct {
	server *Server
	woken  chan struct{}
	awake  atomic.Bool                   // it will look again by itself
	gate   atomic.Pointer[chan struct{}] // closed when new processes may begin; nil lets them begin at once

	// The fields below belong to the guard's own goroutine.
	used    int64 // at the last look
	looked  time.Time
	pause   time.Duration // until the next look
	frozen  time.Time     // when the other processes were stopped; zero if they run
	victims []victim      // killed processes that may still exist
	freed   time.Time     // when memory was last seen to become free
	owed    int64         // memory of killed processes that was not seen to become free yet
	given   int64         // how much may be used above the limit, because it belongs to no process
	stopped map[int]bool  // processes that were already stopped, not by the guard, when it stopped the others

	known    atomic.Pointer[knowledge]
	learning atomic.Bool  // known is about to change
	freezes  atomic.Int64 // how often the processes were stopped
}

// knowledge takes many system calls to gather and so, on a busy machine, seconds.
type knowledge struct {
	at      time.Time
	others  int64        // memory of the agent, and of mapped files
	stopped map[int]bool // processes that were stopped, but not by the guard: it must not resume them
}

// victim is what the guard has killed: one process, or everything in a group.
type victim struct {
	group *cgroup
	pid   int // 0 means everything in the group
	size  int64
}

const (
	firstLook  = 10 * time.Millisecond // after a start
	shortPause = 2 * time.Millisecond
	longPause  = 100 * time.Millisecond
	// settleTime is how long the memory of ended processes may take to become free; owedTime is how long if it is known to be still in use:
	// gVisor frees it in the background, which is slow on a busy machine.
	settleTime = 300 * time.Millisecond
	owedTime   = 2 * time.Second
	// freezeTime is how long the other processes are stopped at most.
	freezeTime = 5 * time.Second
	// learnTime is the largest age of the guard's knowledge.
	learnTime = time.Second
	// smallest: a process with less than the limit divided by this is not killed.
	smallest = 256
)

func newGuard(s *Server) *guard {
	g := &guard{server: s, woken: make(chan struct{}, 1)}
	g.known.Store(&knowledge{})
	return g
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
			// Most commands have ended after firstLook, and a look at the memory costs about a tenth of such a command. Little memory can
			// be filled in that time.
			if !g.awake.Swap(true) {
				timer.Reset(firstLook)
			}
			continue
		case <-timer.C:
		}
		g.awake.Store(false) // a process that starts from here on wakes it again
		if pause := g.look(); pause > 0 {
			g.awake.Store(true)
			timer.Reset(pause)
		}
	}
}

// look does what is necessary now, and returns the time until the next look; 0 means the next start.
func (g *guard) look() time.Duration {
	s := g.server
	s.mu.Lock()
	limit := s.config.MaxMemory
	s.mu.Unlock()
	s.reaper.reap()
	tasks, most := s.countProcesses(), s.groups.limits.Load().pids
	used, now := machineMemory()-g.known.Load().others, time.Now()
	if used < g.used-1<<20 {
		g.freed, g.owed = now, max(0, g.owed-(g.used-used))
	}
	if used <= limit {
		g.given = 0
	}
	grown, since := max(0, used-g.used), now.Sub(g.looked)
	g.used, g.looked = used, now
	g.pause = min(2*max(g.pause, firstLook/2), longPause)
	switch {
	case limit <= 0 && !g.frozen.IsZero(): // the limit was removed
		g.thaw()
		g.pause = shortPause
	case limit > 0 && (used > limit+g.given || !g.frozen.IsZero()):
		g.relieve(limit)
		g.pause = shortPause
	case limit > 0 && used > limit/2:
		g.pause = min(g.pause, firstLook)
		g.learn()
	case tasks == 0:
		g.pause = 0
		return 0 // until the next start
	case most > 0 && tasks > most/2: // some of the tasks may be orphans that have ended
		g.pause = min(g.pause, firstLook)
	}
	if grown > 0 && limit > used { // growth at this rate must not reach the limit between two looks
		g.pause = min(g.pause, max(shortPause, time.Duration(float64(limit-used)/float64(grown)*float64(since)/4)))
	}
	return g.pause
}

// machineMemory returns all memory used in the sandbox, wherever it is counted. While much is in use, gVisor takes a thousand times as long
// to read a cgroup's own memory, because it asks the host about each page.
func machineMemory() int64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0
	}
	return int64(info.Totalram-info.Freeram) * int64(info.Unit)
}

// learn renews the knowledge in the background, so that the guard continues to look.
func (g *guard) learn() {
	if time.Since(g.known.Load().at) < learnTime || g.learning.Swap(true) {
		return
	}
	freezes := g.freezes.Load()
	go func() {
		defer g.learning.Store(false)
		k := knowledge{others: otherMemory(), stopped: map[int]bool{}}
		for _, p := range g.server.all() {
			for _, pid := range p.group.pids() {
				if isStopped(pid) {
					k.stopped[pid] = true
				}
			}
		}
		if k.at = time.Now(); g.gate.Load() == nil && g.freezes.Load() == freezes { // processes that the guard stopped must not be in it
			g.known.Store(&k)
		}
	}()
}

func isStopped(pid int) bool {
	fields := procStat(pid)
	return len(fields) > 0 && fields[0] == "T"
}

// stillStopped returns those of the given processes that are stopped now. It checks at most maxStopped of them, since the other processes
// take more memory meanwhile. A process that it does not check is resumed, which is better than one that stays stopped forever.
func stillStopped(pids map[int]bool) map[int]bool {
	still, looks := map[int]bool{}, 0
	for pid := range pids {
		if looks++; looks > maxStopped {
			break
		}
		if isStopped(pid) {
			still[pid] = true
		}
	}
	return still
}

// maxStopped is how many stopped processes the guard checks.
const maxStopped = 64

// otherMemory returns how much of the machine's memory belongs to the agent or to mapped files.
func otherMemory() int64 {
	_, own := procUsage(os.Getpid())
	info, _ := os.ReadFile("/proc/meminfo") // an unreadable file counts as no mapped memory
	return own + keyed(strings.ReplaceAll(string(info), ":", ""), "Mapped")<<10
}

// relieve stops all processes and kills some until the rest is under the limit: the largest process if that is enough, else everything in
// its group, else also that of the next groups. It waits for the memory of ended processes to become free before it kills others. Then it
// resumes the rest.
func (g *guard) relieve(limit int64) {
	if g.frozen.IsZero() {
		g.freeze()
		if g.used < limit+limit/4 { // it may be memory of the agent or of files
			k := *g.known.Load()
			k.others = otherMemory()
			g.known.Store(&k)
		}
		g.used = machineMemory() - g.known.Load().others
	}
	over := g.used - g.dying() - limit
	settled := g.settled(time.Now())
	if over > 0 && settled {
		need := over + limit/8
		for _, l := range g.server.loads() {
			if need <= 0 || l.Memory < limit/smallest {
				break
			}
			if g.isVictim(l.p.group) {
				continue
			}
			v := choose(&l, need)
			need -= l.Memory
			g.kill(l, v, limit)
		}
	}
	done := len(g.victims) == 0 && (over <= 0 || settled)
	if done && over > 0 { // files in memory of ended processes: killing others would free nothing
		g.given = over + limit/16
		g.server.log("out of memory: %d of %d bytes used, by no process", g.used, limit)
	}
	if done || time.Since(g.frozen) > freezeTime {
		g.thaw()
	}
}

// settled reports whether no more memory of ended processes becomes free. Only then is the next largest killed: before, that could be the
// wrong one.
func (g *guard) settled(now time.Time) bool {
	if g.owed > 0 {
		return now.Sub(g.freed) > owedTime
	}
	return now.Sub(g.freed) > settleTime
}

// choose picks the largest process, and reduces l to it, if that frees enough and most of what its group has; else everything in the group.
func choose(l *load, need int64) victim {
	largest, _ := l.measure(residentMemory)
	if size := min(largest, l.Memory); l.Processes > 1 && size >= need && size >= l.Memory/2 {
		l.Processes, l.Memory = 1, size
		return victim{l.p.group, l.PID, size}
	}
	return victim{l.p.group, 0, l.Memory}
}

// kill kills a victim, and reports it in the events and the log.
func (g *guard) kill(l load, v victim, limit int64) {
	l.p.blame(agent.CauseOOM)
	if v.pid > 0 {
		_ = unix.Kill(v.pid, unix.SIGKILL) // ESRCH: it has ended
	} else {
		l.p.killAll()
	}
	g.victims = append(g.victims, v)
	g.owed += v.size
	g.server.oomKills.Add(1)
	g.server.noteKill(l.Relieved, limit)
	g.server.log("out of memory: %d of %d bytes used: kill %d processes of %s, the largest pid %d, with %d bytes",
		g.used, limit, l.Processes, l.Process, l.PID, l.Memory)
}

// dying returns how much memory killed processes still have to free.
func (g *guard) dying() (memory int64) {
	before := len(g.victims)
	g.victims = slices.DeleteFunc(g.victims, func(v victim) bool {
		pids := v.group.pids()
		if v.pid > 0 && slices.Contains(pids, v.pid) || v.pid == 0 && len(pids) > 0 {
			memory += v.size
			return false
		}
		return true
	})
	if len(g.victims) < before {
		g.freed = time.Now()
	}
	return memory
}

// isVictim reports whether everything in a group is already killed.
func (g *guard) isVictim(group *cgroup) bool {
	return slices.ContainsFunc(g.victims, func(v victim) bool { return v.pid == 0 && v.group == group })
}

// freeze stops all processes but bridges, and holds back new ones. It stops them with one system call: on a busy machine each call takes
// long, and processes that still run take more memory meanwhile. The knowledge of stopped processes is old by now: they may have been
// resumed, or have ended and their pids belong to others.
func (g *guard) freeze() {
	g.frozen = time.Now()
	g.freezes.Add(1)
	g.stopped = stillStopped(g.known.Load().stopped)
	gate := make(chan struct{})
	g.gate.Store(&gate)
	_ = unix.Kill(-1, unix.SIGSTOP) // ESRCH: there is none
	for _, pid := range parsePIDs(readFile(g.server.groups.bridges)) {
		_ = unix.Kill(pid, unix.SIGCONT)
	}
}

// thaw resumes the processes that were not stopped before freeze.
func (g *guard) thaw() {
	g.frozen, g.victims, g.owed = time.Time{}, nil, 0
	defer func() { close(*g.gate.Swap(nil)) }()
	if len(g.stopped) == 0 {
		_ = unix.Kill(-1, unix.SIGCONT)
		return
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		g.server.log("list the processes to resume: %v", err)
		_ = unix.Kill(-1, unix.SIGCONT)
	}
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && pid > 1 && !g.stopped[pid] {
			_ = unix.Kill(pid, unix.SIGCONT)
		}
	}
}

// pass waits until new processes may begin: not while others are stopped because of their memory.
func (g *guard) pass() {
	if g == nil {
		return
	}
	if gate := g.gate.Load(); gate != nil {
		select {
		case <-*gate:
		case <-g.server.ctx.Done():
		}
	}
}
