package guest

import (
	"sync"
	"syscall"
)

// exitStatus is how a process ended.
type exitStatus struct {
	status syscall.WaitStatus
	usage  syscall.Rusage
}

// reaper waits for children. As init it waits for every process of the sandbox, orphans too, so that no zombie stays.
type reaper struct {
	init      bool
	collector *collector // tells when a child has ended

	mu       sync.Mutex
	starting int // forks whose child nobody waits for yet
	waiting  map[int]func(exitStatus)
	reaped   int               // how many were, for whom nobody waited
	early    map[int]earlyExit // ended before somebody waited for them
}

// earlyExit is an exitStatus that may be an orphan's: of a start that came after it, whose child may have its pid, it is none.
type earlyExit struct {
	exitStatus
	number int
}

func newReaper(init bool, c *collector) *reaper {
	return &reaper{init: init, collector: c, waiting: map[int]func(exitStatus){}, early: map[int]earlyExit{}}
}

// forkExec starts a child. If that works, await must follow with what it returns.
func (r *reaper) forkExec(name string, args []string, attr spawnAttr) (c child, err error) {
	attr.pidfd = r.init
	r.mu.Lock()
	r.starting++
	since := r.reaped
	r.mu.Unlock()
	if c, err = spawn(name, args, attr); err != nil {
		r.mu.Lock()
		r.settled()
		r.mu.Unlock()
	}
	c.since = since
	return c, err
}

// child is what forkExec started.
type child struct {
	pid, pidfd int
	since      int // reaper.reaped before
}

// await has ended called, once, when the child of forkExec has ended. It must be short.
func (r *reaper) await(c child, ended func(exitStatus)) {
	r.mu.Lock()
	status, over := r.early[c.pid]
	if over = over && status.number > c.since; over {
		delete(r.early, c.pid)
	} else if r.init {
		r.waiting[c.pid] = ended
	}
	r.settled()
	r.mu.Unlock()
	if r.init {
		r.collector.await(c.pidfd, func() { r.reapOne(c.pid) })
	} else {
		go waitOne(c.pid, ended)
	}
	if over {
		ended(status.exitStatus)
	}
}

// settled says that a fork has failed, or that its child is awaited. r.mu is held.
func (r *reaper) settled() {
	if r.starting--; r.starting == 0 {
		clear(r.early) // orphans: nobody waits for them
	}
}

// waitOne waits for one child; it is used outside a sandbox, where other children belong to others.
func waitOne(pid int, ended func(exitStatus)) {
	var s exitStatus
	for {
		if _, err := syscall.Wait4(pid, &s.status, 0, &s.usage); err != syscall.EINTR {
			ended(s)
			return
		}
	}
}

// reap takes the status of every child that has ended. The guard calls it now and then for orphans, of which nothing tells.
func (r *reaper) reap() {
	for r.reapOne(-1) {
	}
}

// reapOne takes the status of a child that has ended, or of any with -1, and says whether there was one.
func (r *reaper) reapOne(pid int) bool {
	pid, s, err := quickWait(pid)
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
