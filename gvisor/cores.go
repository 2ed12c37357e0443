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

	"soulbox.dev/soulbox/sandbox"
)

// pickCores picks as many of the server's cores for a machine as its limit allows: an ordinary user cannot bound CPU time in any other way.
// The machine is on the first core while it does little. It is bound at its boot only if it may not use all cores, so it boots even if the
// kernel does not say which cores there are.
func pickCores(limit float64) (cores, bound []int, err error) {
	mine, err := coresOf(0)
	cores, unbound := chooseCores(mine, runtime.NumCPU(), limit, rand.Int()) // at random, because many servers do this
	if unbound {
		return cores, nil, nil
	}
	return cores, cores, err
}

// chooseCores chooses want cores from mine, beginning at first. all is how many cores the server had at its start; mine may be fewer by
// now.
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

// coresOf returns the cores on which a thread may run; 0 is the calling thread.
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

// bind binds a thread to cores; 0 is the calling thread.
func bind(thread int, cores []int) error {
	var set unix.CPUSet
	for _, core := range cores {
		set.Set(core)
	}
	return unix.SchedSetaffinity(thread, &set)
}

// onCores calls do on a thread that is bound to cores, if there are any; processes that do starts are bound too.
func onCores(cores []int, do func() error) error {
	if len(cores) == 0 {
		return do()
	}
	done := make(chan error)
	go func() {
		// Never unlocked: the thread ends with the goroutine, so no other goroutine inherits its mask.
		runtime.LockOSThread()
		if err := bind(0, cores); err != nil {
			done <- fmt.Errorf("bind to cores: %w", err)
			return
		}
		done <- do()
	}()
	return <-done
}

var _ sandbox.CorePinner = (*machine)(nil)

// Pin implements sandbox.CorePinner.
func (m *machine) Pin(one bool) error {
	cores := m.cores
	if len(cores) < 2 {
		return nil
	}
	if one {
		cores = cores[:1]
	}
	var failed error
	bound := map[int]bool{}
	for range 10 { // the next round finds threads that were made meanwhile by a thread that was not bound yet
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
			// With these errors it has ended, or is only said to be one of the machine's.
			if err := bind(thread, cores); err != nil && err != unix.ESRCH && err != unix.EPERM {
				failed = fmt.Errorf("bind thread %d to cores: %w", thread, err)
			}
		}
		if len(bound) == before {
			break // later threads are made by threads that are bound
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

// threadsOf returns all threads of processes and of all their descendants: gVisor runs each process of the guest in some of them. If the
// kernel does not list children (proc(5), children), they are missing.
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
