package gvisor

import (
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// pickCores gives a machine as many of the cores that the server may use as its limit allows: which is all that an ordinary user can do
// about CPU time. The first is where it is while it does little. It is bound to them at its boot only where it may not use all, so that it
// boots where the kernel does not tell them.
func pickCores(limit float64) (cores, bound []int, err error) {
	mine, err := coresOf(0)
	cores, unbound := chooseCores(mine, runtime.NumCPU(), limit, rand.Int()) // at random: many servers do this
	if unbound {
		return cores, nil, nil
	}
	return cores, cores, err
}

// chooseCores chooses among the cores that there are, beginning with one of them. There are all of the server's, or fewer by now.
func chooseCores(mine []int, all int, limit float64, first int) (cores []int, unbound bool) {
	want := int(math.Ceil(limit))
	if want <= 0 || want >= max(all, len(mine)) {
		unbound = true
	}
	if want <= 0 || want > len(mine) {
		want = len(mine)
	}
	for i := range want {
		cores = append(cores, mine[(first%len(mine)+i)%len(mine)])
	}
	return cores, unbound
}

// coresOf tells on which cores a thread may run; 0 is the calling one.
func coresOf(thread int) ([]int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(thread, &set); err != nil {
		return nil, fmt.Errorf("get cores: %w", err)
	}
	var cores []int
	for core := range 64 * len(set) {
		if set.IsSet(core) {
			cores = append(cores, core)
		}
	}
	return cores, nil
}

// bind binds a thread to cores; 0 is the calling one.
func bind(thread int, cores []int) error {
	var set unix.CPUSet
	for _, core := range cores {
		set.Set(core)
	}
	return unix.SchedSetaffinity(thread, &set)
}

// onCores does something with the calling thread, and so the processes it starts, bound to cores, if there are any.
func onCores(cores []int, do func() error) error {
	if len(cores) == 0 {
		return do()
	}
	done := make(chan error)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and nobody else inherits its mask.
		runtime.LockOSThread()
		if err := bind(0, cores); err != nil {
			done <- fmt.Errorf("bind to cores: %w", err)
			return
		}
		done <- do()
	}()
	return <-done
}

// Gather implements sandbox.Gatherer.
func (m *machine) Gather(one bool) error {
	cores := m.cores
	if len(cores) < 2 {
		return nil
	}
	if one {
		cores = cores[:1]
	}
	var failed error
	bound := map[int]bool{}
	for range 10 { // threads that are made meanwhile by one that was not bound yet are found by the next round
		before := len(bound)
		ours, err := m.ours()
		if err != nil {
			return err
		}
		for _, thread := range threadsOf(pidsOf(ours)) {
			if bound[thread] {
				continue
			}
			bound[thread] = true
			if err := bind(thread, cores); err != nil && err != unix.ESRCH &&
				err != unix.EPERM { // it has ended, or only says that it is one of ours
				failed = fmt.Errorf("bind thread %d to cores: %w", thread, err)
			}
		}
		if len(bound) == before {
			break // else there are new ones all the time, of those that are bound
		}
	}
	return failed
}

func pidsOf(processes []process) []int {
	pids := make([]int, len(processes))
	for i, p := range processes {
		pids[i] = p.pid
	}
	return pids
}

// threadsOf gives all threads of processes and of all that descend from them: gVisor runs each process of the guest in some of its own.
// Where the kernel does not tell children (proc(5), children), they are not among them.
func threadsOf(pids []int) []int {
	var all []int
	for _, pid := range pids {
		dir := fmt.Sprintf("/proc/%d/task/", pid)
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue // it has ended
		}
		for _, e := range entries {
			thread, err := strconv.Atoi(e.Name())
			if err != nil {
				continue
			}
			all = append(all, thread)
			children, err := os.ReadFile(dir + e.Name() + "/children")
			if err != nil {
				continue // it has ended
			}
			for _, field := range strings.Fields(string(children)) {
				if child, err := strconv.Atoi(field); err == nil {
					all = append(all, threadsOf([]int{child})...)
				}
			}
		}
	}
	return all
}
