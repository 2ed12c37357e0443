package gvisor_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// coresOfThreads returns on how many cores each thread of a sandbox may run: threads of the processes that runsc has started, and of their
// descendants, which run the guest's code and have none of runsc's arguments on their command line.
func coresOfThreads(t *testing.T, dir string) (cores []int) {
	t.Helper()
	names, err := filepath.Glob("/proc/[0-9]*/task/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	parents := map[string]string{}
	for _, name := range names {
		stat, err := os.ReadFile(name + "/stat")
		if err != nil {
			continue // it has ended
		}
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		parents[strings.Split(name, "/")[2]] = fields[1]
	}
	ours := func(pid string) bool {
		for ; pid != "" && pid != "0"; pid = parents[pid] {
			if line, err := os.ReadFile("/proc/" + pid + "/cmdline"); err == nil && bytes.Contains(line, []byte("--root="+dir)) {
				return true
			}
		}
		return false
	}
	for _, name := range names {
		if parts := strings.Split(name, "/"); ours(parts[2]) {
			var set unix.CPUSet
			thread, _ := strconv.Atoi(parts[4]) // it is a number
			if unix.SchedGetaffinity(thread, &set) == nil {
				cores = append(cores, set.Count())
			}
		}
	}
	return cores
}

// allHave reports whether all threads may run on that many cores.
func allHave(cores []int, want int) bool {
	for _, n := range cores {
		if n != want {
			return false
		}
	}
	return len(cores) > 10 // the sentry's threads alone
}

// TestPinned keeps a sandbox on one core while it does little, on all its cores while something lasts, and on one again after that. A
// server that attaches to it knows all of its cores.
func TestPinned(t *testing.T) {
	if runtime.NumCPU() < 2 {
		t.Log("there is one core only")
		return
	}
	dir := sandboxtest.Dir(t)
	sb, c := newSandboxIn(t, dir, sandbox.CreateOptions{})
	has := func(what string, n int) {
		t.Helper()
		sandboxtest.Eventually(t, what, func() bool { return allHave(coresOfThreads(t, filepath.Join(dir, "sandboxes", sb.ID())), n) })
	}
	has("one core at first", 1)
	for range 20 {
		sandboxtest.Run(t, c, "true")
	}
	has("one core after short commands", 1)
	all := min(2, runtime.NumCPU())
	for range 2 {
		s, err := c.Start(context.Background(), agent.StartRequest{Command: "for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done; wait"})
		if err != nil {
			t.Fatal(err)
		}
		has("all cores while something lasts", all)
		sandboxtest.Run(t, c, "true")
		has("all cores beside a short command", all)
		if _, err := c.Kill(t.Context(), s.Process.ID); err != nil {
			t.Fatal(err)
		}
		has("one core after that", 1)
	}
	r, _ := newRuntime(t)
	machine, err := r.Attach(t.Context(), filepath.Join(dir, "sandboxes", sb.ID())) // as the next server does
	if err != nil {
		t.Fatal(err)
	}
	defer machine.Pipe().Close()
	if err := machine.(sandbox.CorePinner).Pin(false); err != nil {
		t.Fatal(err)
	}
	has("all cores for who attaches", all)
}

// TestOneCore: a sandbox that may use only one core is bound to it from its boot on, and stays so.
func TestOneCore(t *testing.T) {
	dir := sandboxtest.Dir(t)
	sb, c := newSandboxIn(t, dir, sandbox.CreateOptions{Limits: sandbox.Limits{CPU: 1}})
	if _, err := c.Start(t.Context(), agent.StartRequest{Command: "sleep 1000"}); err != nil {
		t.Fatal(err)
	}
	if going, err := c.Busy(t.Context(), new(bool)); err != nil || !going { // it returns when that is so
		t.Fatal(going, err)
	}
	if cores := coresOfThreads(t, filepath.Join(dir, "sandboxes", sb.ID())); !allHave(cores, 1) {
		t.Errorf("its threads may run on %v cores", cores)
	}
}
