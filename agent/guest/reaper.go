package guest

import (
	"sync"
	"syscall"

	"soulbox.dev/soulbox/agent/guest/rawsys"
)

// exitStatus is how a process ended.
type exitStatus struct {
	status syscall.WaitStatus
	usage  syscall.Rusage
}

// reaper waits for children. As init it waits for every process of the sandbox, including orphans, so that no zombies remain.
type reaper struct {
	init      bool
	collector *collector // reports the end of children

	mu       sync.Mutex
	starting int // forks whose child is not awaited yet
	waiting  map[int]func(exitStatus)
	reaped   int               // how many children without a waiter were reaped
	early    map[int]earlyExit // children that ended before they were awaited, by pid
}

// earlyExit is an exit that may be an orphan's. A child that was started after it may have the same pid; the number tells them apart.
type earlyExit struct {
	exitStatus
	number int
}

func newReaper(init bool, c *collector) *reaper {
	return &reaper{init: init, collector: c, waiting: map[int]func(exitStatus){}, early: map[int]earlyExit{}}
}

// forkExec starts a child. If it succeeds, the caller must pass the result to await.
func (r *reaper) forkExec(name string, args []string, attr rawsys.Attr) (c child, err error) {
	attr.Pidfd = r.init
	r.mu.Lock()
	r.starting++
	since := r.reaped
	r.mu.Unlock()
	if c.Child, err = rawsys.Spawn(name, args, attr); err != nil {
		r.mu.Lock()
		r.settled()
		r.mu.Unlock()
	}
	c.since = since
	return c, err
}

// child is what forkExec started.
type child struct {
	rawsys.Child
	since int // reaper.reaped before the start
}

// await calls ended, once, when the child of forkExec has ended. ended must be short.
func (r *reaper) await(c child, ended func(exitStatus)) {
	r.mu.Lock()
	status, over := r.early[c.PID]
	if over = over && status.number > c.since; over {
		delete(r.early, c.PID)
	} else if r.init {
		r.waiting[c.PID] = ended
	}
	r.settled()
	r.mu.Unlock()
	if r.init {
		r.collector.await(c.Pidfd, func() { r.reapOne(c.PID) })
	} else {
		go waitOne(c.PID, ended)
	}
	if over {
		ended(status.exitStatus)
	}
}

// settled notes that a fork has failed, or that its child is awaited. The caller holds r.mu.
func (r *reaper) settled() {
	if r.starting--; r.starting == 0 {
		clear(r.early) // only orphans are left, and no caller waits for them
	}
}

// waitOne waits for one child. It is used outside a sandbox, where the process has children that are not the agent's.
func waitOne(pid int, ended func(exitStatus)) {
	var s exitStatus
	for {
		if _, err := syscall.Wait4(pid, &s.status, 0, &s.usage); err != syscall.EINTR {
			ended(s)
			return
		}
	}
}

// reap takes the status of all children that have ended. The guard calls it from time to time for orphans, whose end nothing reports.
func (r *reaper) reap() {
	for r.reapOne(-1) {
	}
}

// reapOne takes the status of a child that has ended, and reports whether there was one; pid -1 means any child.
func (r *reaper) reapOne(pid int) bool {
	var s exitStatus
	pid, err := rawsys.Wait(pid, &s.status, &s.usage)
	if err == syscall.EINTR {
		return true
	}
	if err != nil || pid <= 0 {
		return false
	}
	r.mu.Lock()
	ended, ok := r.waiting[pid]
	delete(r.waiting, pid)
	if !ok && r.starting > 0 {
		r.reaped++
		r.early[pid] = earlyExit{s, r.reaped}
	}
	r.mu.Unlock()
	if ok {
		ended(s)
	}
	return true
}
