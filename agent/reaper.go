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
	starting int        // forks in flight: their pids are not known yet
	forks    int        // forks begun so far
	waiting  map[int]chan exitStatus
	early    map[int]exitStatus // ended while a fork was in flight: perhaps that fork's child
}

func newReaper(init bool) *reaper {
	r := &reaper{init: init, waiting: map[int]chan exitStatus{}, early: map[int]exitStatus{}}
	r.started = sync.NewCond(&r.mu)
	if init {
		go r.run() // for the life of the machine
	}
	return r
}

// forkExec starts a child, sets p.pid, and gives a channel on which its end will come.
func (r *reaper) forkExec(p *process, name string, args []string, attr *syscall.ProcAttr) (<-chan exitStatus, error) {
	exit := make(chan exitStatus, 1)
	r.mu.Lock()
	r.starting++
	r.forks++
	r.started.Broadcast()
	r.mu.Unlock()
	pid, err := syscall.ForkExec(name, args, attr)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.starting--
	if err == nil {
		p.pid = pid
		if status, ok := r.early[pid]; ok {
			exit <- status
		} else if r.init {
			r.waiting[pid] = exit
		} else {
			go waitOne(pid, exit)
		}
	}
	if r.starting == 0 {
		clear(r.early)
	}
	return exit, err
}

// waitOne waits for one child; it is used outside a sandbox, where other children belong to others.
func waitOne(pid int, exit chan<- exitStatus) {
	var s exitStatus
	for {
		if _, err := syscall.Wait4(pid, &s.status, 0, &s.usage); err != syscall.EINTR {
			exit <- s
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
			if exit, ok := r.waiting[pid]; ok {
				delete(r.waiting, pid)
				exit <- s
			} else if r.starting > 0 {
				r.early[pid] = s
			}
		}
		r.mu.Unlock()
	}
}
