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

// guard keeps the memory of all user processes under a limit, which gVisor's memory.max does not. When more is used all of them are stopped
// at once, for many that grow would outrun the guard; then what takes most is killed, and the others go on when its memory is free. It
// looks often when little is left or much is taken quickly, seldom otherwise, and not at all while nothing runs.
type guard struct {
	server *Server
	woken  chan struct{}
	awake  atomic.Bool                   // it will look again by itself
	gate   atomic.Pointer[chan struct{}] // closed when who begins may go on; nil is at once

	// What follows is the guard's own goroutine's.
	used    int64 // at the last look
	looked  time.Time
	pause   time.Duration // after it
	frozen  time.Time     // since when the others are stopped; zero is not
	victims []victim      // that may still be there
	freed   time.Time     // when memory was last seen to become free since
	owed    int64         // what of the memory of those who were killed was not seen to become free yet
	given   int64         // what may be used beyond the limit, as no process has it
	stopped map[int]bool  // processes that others had stopped when the others were

	known    atomic.Pointer[knowledge]
	learning atomic.Bool  // known is about to change
	freezes  atomic.Int64 // how often the others were stopped
}

// knowledge is what takes many system calls, and so, on a busy machine, seconds.
type knowledge struct {
	at      time.Time
	others  int64        // what is used by the agent, and of files that are mapped
	stopped map[int]bool // processes that others have stopped: they must not go on with those that the guard stops
}

// victim is what the guard has killed: one process, or all of a group.
type victim struct {
	group *cgroup
	pid   int // 0 is all of the group
	size  int64
}

const (
	firstLook  = 10 * time.Millisecond // after a start
	shortPause = 2 * time.Millisecond
	longPause  = 100 * time.Millisecond
	// settleTime is how long the memory of who has ended may take to be free, and owedTime while it is known to be still in use:
	// gVisor gives it back in the background, which on a busy machine takes its time.
	settleTime = 300 * time.Millisecond
	owedTime   = 2 * time.Second
	// freezeTime is how long the others are stopped at most.
	freezeTime = 5 * time.Second
	// learnTime is how old the guard's knowledge may be.
	learnTime = time.Second
	// smallest is the part of the limit that who is killed must have.
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
			// Most commands have ended by then, and a look at the memory costs about as much as a tenth of one. It cannot fill much
			// meanwhile.
			if !g.awake.Swap(true) {
				timer.Reset(firstLook)
			}
			continue
		case <-timer.C:
		}
		g.awake.Store(false) // who starts a process from here on wakes it again
		if pause := g.look(); pause > 0 {
			g.awake.Store(true)
			timer.Reset(pause)
		}
	}
}

// look does what is to be done now, and gives the time until the next look; 0 is the next start.
func (g *guard) look() time.Duration {
	s := g.server
	s.mu.Lock()
	limit := s.config.MaxMemory
	s.mu.Unlock()
	s.reaper.reap()
	tasks, most := s.lookForTasks(), s.groups.limits.Load().pids
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
	case limit <= 0 && !g.frozen.IsZero(): // there is no limit any more
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
	case most > 0 && tasks > most/2: // orphans that have ended may be among them
		g.pause = min(g.pause, firstLook)
	}
	if grown > 0 && limit > used { // what goes on like that must not reach the limit unseen
		g.pause = min(g.pause, max(shortPause, time.Duration(float64(limit-used)/float64(grown)*float64(since)/4)))
	}
	return g.pause
}

// machineMemory is all that is used in the sandbox, wherever it is counted. To read a cgroup's own takes gVisor a thousand times as long
// while much is taken: it asks the host for each page.
func machineMemory() int64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0
	}
	return int64(info.Totalram-info.Freeram) * int64(info.Unit)
}

// learn renews what is known, in the background: the guard looks on.
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
		if k.at = time.Now(); g.gate.Load() == nil && g.freezes.Load() == freezes { // those that the guard has stopped are not meant
			g.known.Store(&k)
		}
	}()
}

func isStopped(pid int) bool {
	fields := procStat(pid)
	return len(fields) > 0 && fields[0] == "T"
}

// stillStopped gives those of some processes that are stopped now. Of many it looks at some only, since the others take more memory
// meanwhile: who is not among them goes on, which is better than never to go on.
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

// maxStopped is how many stopped processes the guard looks at.
const maxStopped = 64

// otherMemory is what of the machine's memory is the agent's, or of files that are mapped.
func otherMemory() int64 {
	_, own := procUsage(os.Getpid())
	info, _ := os.ReadFile("/proc/meminfo") // without it all counts
	return own + keyed(strings.ReplaceAll(string(info), ":", ""), "Mapped")<<10
}

// relieve stops all others and kills until what is left is under the limit: the largest process where that is enough, else all that is in
// its group, else that of the next ones, too. What has ended is given time until its memory is free: nobody dies for it. Then the others go
// on.
func (g *guard) relieve(limit int64) {
	if g.frozen.IsZero() {
		g.freeze()
		if g.used < limit+limit/4 { // it may be others'
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
	if done && over > 0 { // files in memory, of who has ended: to kill others would free nothing
		g.given = over + limit/16
		g.server.log("out of memory: %d of %d bytes used, by no process", g.used, limit)
	}
	if done || time.Since(g.frozen) > freezeTime {
		g.thaw()
	}
}

// settled says whether no more memory becomes free of who has ended. The next largest dies only if that is so: it is the wrong one else.
func (g *guard) settled(now time.Time) bool {
	if g.owed > 0 {
		return now.Sub(g.freed) > owedTime
	}
	return now.Sub(g.freed) > settleTime
}

// choose gives the largest process, and makes l that alone, where that frees as much as is needed and most of what its group has; else all
// of the group.
func choose(l *load, need int64) victim {
	largest, _ := l.measure(residentMemory)
	if size := min(largest, l.Memory); l.Processes > 1 && size >= need && size >= l.Memory/2 {
		l.Processes, l.Memory = 1, size
		return victim{l.p.group, l.PID, size}
	}
	return victim{l.p.group, 0, l.Memory}
}

// kill kills a victim, and notes who it was.
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

// dying is how much memory is still to be free of what is killed already.
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

// isVictim says whether all of a group is killed already.
func (g *guard) isVictim(group *cgroup) bool {
	return slices.ContainsFunc(g.victims, func(v victim) bool { return v.pid == 0 && v.group == group })
}

// freeze stops all processes but bridges, and holds back new ones. It is one system call: on a busy machine each takes long, and who is not
// stopped takes more memory meanwhile. What is known of processes that others have stopped is old by now: they may go on already, or be
// gone and their pids be others'.
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

// thaw has go on who was not stopped before.
func (g *guard) thaw() {
	g.frozen, g.victims, g.owed = time.Time{}, nil, 0
	defer func() { close(*g.gate.Swap(nil)) }()
	if len(g.stopped) == 0 {
		_ = unix.Kill(-1, unix.SIGCONT)
		return
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		g.server.log("list the processes that are to go on: %v", err)
		_ = unix.Kill(-1, unix.SIGCONT)
	}
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && pid > 1 && !g.stopped[pid] {
			_ = unix.Kill(pid, unix.SIGCONT)
		}
	}
}

// pass waits until processes may begin, which is not while others are stopped for their memory.
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
