package agent

import (
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// exitStatus is how a process ended.
type exitStatus struct {
	status syscall.WaitStatus
	usage  syscall.Rusage
}

// reaper waits for children. As init it waits for every process of the sandbox, orphans too, so that no zombie stays.
type reaper struct {
	init bool

	mu       sync.Mutex
	started  *sync.Cond // a child may exist
	starting int        // forks whose child nobody waits for yet
	forks    int        // forks begun so far
	waiting  map[int]func(exitStatus)
	early    map[int]exitStatus // ended before somebody waited for them
}

func newReaper(init bool) *reaper {
	r := &reaper{init: init, waiting: map[int]func(exitStatus){}, early: map[int]exitStatus{}}
	r.started = sync.NewCond(&r.mu)
	if init {
		go r.run() // for the life of the machine
	}
	return r
}

// forkExec starts a child. If that works, await must follow.
func (r *reaper) forkExec(name string, args []string, attr *syscall.ProcAttr) (pid int, err error) {
	r.mu.Lock()
	r.starting++
	r.forks++
	r.started.Broadcast()
	r.mu.Unlock()
	if pid, err = syscall.ForkExec(name, args, attr); err != nil {
		r.mu.Lock()
		r.settled()
		r.mu.Unlock()
	}
	return pid, err
}

// await has ended called, once, when the child of forkExec has ended: on the thread that waits, since to wake another one costs about
// as much as all that ended does. It must be short.
func (r *reaper) await(pid int, ended func(exitStatus)) {
	r.mu.Lock()
	status, over := r.early[pid]
	if !over && r.init {
		r.waiting[pid] = ended
	}
	r.settled()
	r.mu.Unlock()
	switch {
	case over:
		ended(status)
	case !r.init:
		go waitOne(pid, ended)
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

// run reaps everything. Orphans come to init at any time, so where there is no child at all it asks again whenever
// something is started; a process without ancestors in the table cannot appear otherwise, but for exec of the runtime.
func (r *reaper) run() {
	for {
		r.mu.Lock()
		forks := r.forks
		r.mu.Unlock()
		var s exitStatus
		pid, err := syscall.Wait4(-1, &s.status, unix.WALL, &s.usage)
		r.mu.Lock()
		switch {
		case err == syscall.ECHILD:
			// A fork in flight makes a child soon; otherwise sleep until one begins.
			if r.starting == 0 && r.forks == forks {
				r.started.Wait()
			}
			r.mu.Unlock()
			unix.Nanosleep(&unix.Timespec{Nsec: 200_000}, nil)
			continue
		case err == nil:
			if ended, ok := r.waiting[pid]; ok {
				delete(r.waiting, pid)
				r.mu.Unlock()
				ended(s)
				continue
			}
			if r.starting > 0 {
				r.early[pid] = s
			}
		}
		r.mu.Unlock()
	}
}
